"""Context parallel attention: one long sequence over several GPUs.

    cp = fastattn.parallel.ContextParallel(mesh["cp"])
    out = cp.attention(q, k, v, length=length, mask="causal")         # shards in, shards out, with gradients

    with cp.model(model, length):                                     # a model of transformers
        model(input_ids=cp.shard(ids, 1), position_ids=cp.positions(length), **cp.targets(ids))

`layout.py` says which rank holds which tokens, `plan.py` what each rank computes, `strategies.py` how keys and values
travel (on `exchange.py`), `blocks.py` what is computed with them, `cost.py` which strategy suits a call. All attention
is `fastattn.scaled_dot_product_attention`; all communication is torch.distributed's.
"""

from __future__ import annotations

from .context import ContextParallel
from .cost import Hardware, Prediction, Work, predict
from .layout import Layout

__all__ = ["ContextParallel", "Hardware", "Layout", "Prediction", "Work", "predict"]
