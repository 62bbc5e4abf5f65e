"""Context parallel attention: one long sequence over several GPUs.

    cp = fastattn.parallel.ContextParallel(mesh["cp"])
    out = cp.attention(q, k, v, length=length, mask="causal")         # shards in, shards out, with gradients

    with cp.model(model, length):                                     # a model of transformers
        model(input_ids=cp.shard(ids, 1), position_ids=cp.positions(length), **cp.targets(ids))

`layout.py`: which rank holds which tokens. `plan.py`: the blocks of attention that each rank computes.
`strategies.py`: how keys and values reach the ranks (`exchange.py` communicates, `blocks.py` computes). `cost.py`:
which strategy is the fastest for a call. `attention.py` combines these; `context.py` adds models of transformers
(`transformers.py`). All attention is `fastattn.scaled_dot_product_attention`; all communication torch.distributed's.
"""

from __future__ import annotations

from .context import ContextParallel
from .cost import Hardware, Prediction, Work, predict
from .layout import Layout

__all__ = ["ContextParallel", "Hardware", "Layout", "Prediction", "Work", "predict"]
