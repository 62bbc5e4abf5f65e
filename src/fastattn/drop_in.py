"""torch's `scaled_dot_product_attention` on fastattn, as a function or under code that calls torch's:

    import fastattn.drop_in
    fastattn.drop_in.patch()

The code is in `fastattn.integrations.torch`.
"""

from __future__ import annotations

from .integrations.torch.patching import patch, patched, unpatch
from .integrations.torch.sdpa import Served, explain, scaled_dot_product_attention

__all__ = ["Served", "explain", "patch", "patched", "scaled_dot_product_attention", "unpatch"]
