"""liger-kernel's fused operations in a model that runs through transformers' own modules.

transformers computes a norm, a rotary embedding or a gated activation in several small kernels. liger-kernel has one
for each, with a backward. They are put into one model and taken out again: no class and no global of transformers is
changed, so that other models are unaffected, and so is this one after `undo`.

A module is replaced if it computes what liger-kernel computes, which is tried on random numbers: `norms` and `mlps`
compare it with formulas, bit for bit and roundings included; `rotary` compares an attention module, its gradients
included, with the same module with another rotary function. A model that computes anything differently keeps its
module.

Not replaced, on purpose:

- a merged gate and up projection (Phi3, GLM): liger-kernel would copy both halves, which costs more than it gains;
- experts: liger-kernel's wait for the device, and tune themselves again for other numbers of tokens;
- cross entropy, unless asked for: `find_fused_ops`, `loss`.
"""

from .replace import FusedOps as FusedOps
from .replace import check_fused_ops as check_fused_ops
from .replace import choose_fused_ops as choose_fused_ops
from .replace import find_fused_ops as find_fused_ops
from .replace import use_fused_ops as use_fused_ops
