"""flash-attn's functions with flash-attn's arguments and layouts, for code that is written against them:

    from fastattn.flash import flash_attn_func  # in place of: from flash_attn import flash_attn_func

The code is in `fastattn.integrations.flash_attn`; docs/flash-attn.md has a table of all arguments.
"""

from __future__ import annotations

from .integrations.flash_attn.dense import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from .integrations.flash_attn.kvcache import flash_attn_with_kvcache
from .integrations.flash_attn.varlen import (
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)

__all__ = [
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]
