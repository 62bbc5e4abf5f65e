"""fastattn in Hugging Face transformers. Importing this module registers the name "fastattn":

    import fastattn.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")

A model then calls `mask.interval_mask` once per forward and layer type, and `attention.attention_forward` in every
layer. The mask that the one returns and the other gets has the shape and values of eager attention's additive mask, but
holds O(S) numbers until an operation computes with it (`lazy_mask.py`). `StaticCache` is a cache of fixed capacity for
decoding (`kv_cache.py`).

Needs transformers 5.4 or later: `pip install 'fastattn[hf]'`.
"""

from __future__ import annotations

try:
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError("fastattn.hf needs transformers 5.4 or later: pip install 'fastattn[hf]'") from error

if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 4):
    raise ImportError(
        f"fastattn.hf needs transformers 5.4 or later, found {transformers.__version__}: pip install 'fastattn[hf]'"
    )

from ..._compat.attention_classes import watch_models
from .attention import attention_forward
from .kv_cache import StaticCache
from .mask import interval_mask

NAME = "fastattn"  #: never a name with "sdpa" or "flash" in it: transformers treats both specially wherever they occur

# Both, always: without a registered mask function a model would get no mask at all, and not even be causal.
AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, interval_mask)
watch_models(NAME)

__all__ = ["NAME", "StaticCache", "attention_forward", "interval_mask"]
