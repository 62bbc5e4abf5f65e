"""The name "fastattn" for transformers. Importing this module registers it:

    import fastattn.hf
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="fastattn")

The code is in `fastattn.integrations.transformers`.
"""

from __future__ import annotations

from .integrations.transformers import NAME, StaticCache, attention_forward, interval_mask

__all__ = ["NAME", "StaticCache", "attention_forward", "interval_mask"]
