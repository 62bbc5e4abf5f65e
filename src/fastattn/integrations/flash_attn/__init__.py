"""flash-attn's functions, through fastattn: for code that is written against them.

`dense` has `flash_attn_func`, `varlen` has `flash_attn_varlen_func`, `kvcache` has `flash_attn_with_kvcache`. All three
bring their arguments into one form (`arguments`), make ALiBi's mask (`alibi`) and call the op (`attend`).
"""

from __future__ import annotations

from .dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .kvcache import flash_attn_with_kvcache
from .varlen import flash_attn_varlen_func, flash_attn_varlen_kvpacked_func, flash_attn_varlen_qkvpacked_func

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
