"""Language models: load one (a directory or a preset with random weights), prefill, generate."""

from .generation.engine import Engine, Event, make_engine
from .generation.greedy import generate_tokens, prefill
from .generation.results import Piece, Result, Usage
from .generation.sampling import Sampling
from .generation.stream import batch_generate, generate, stream_batch, stream_generate
from .loading.attention import set_attention
from .loading.load import load
from .loading.loaded import Loaded
from .runners.select import make_runner

__all__ = [
    "Engine",
    "Event",
    "Loaded",
    "Piece",
    "Result",
    "Sampling",
    "Usage",
    "batch_generate",
    "generate",
    "generate_tokens",
    "load",
    "make_engine",
    "make_runner",
    "prefill",
    "set_attention",
    "stream_batch",
    "stream_generate",
]
