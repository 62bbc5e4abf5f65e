"""Language models: load one (a directory or a preset with random weights), prefill, generate."""

from .engine import Engine, Event, make_engine
from .load import Loaded, load, set_attention
from .loop import generate_tokens, prefill
from .runners import make_runner
from .sampling import Sampling
from .stream import Piece, Result, Usage, batch_generate, generate, stream_batch, stream_generate

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
