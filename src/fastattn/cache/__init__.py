"""Keys and values of the tokens so far, for generation: `KVCache`."""

from .kv_cache import KVCache

__all__ = ["KVCache"]
