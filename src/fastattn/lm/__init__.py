"""Language models: load one (a directory or a preset with random weights), prefill, generate."""

from .generate import generate_tokens, prefill
from .load import Loaded, load, set_attention

__all__ = ["Loaded", "generate_tokens", "load", "prefill", "set_attention"]
