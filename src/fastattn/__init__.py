"""fastattn: one attention call for PyTorch, fast in prefill, decode and training."""

from .api import Explanation, explain, scaled_dot_product_attention
from .dispatch import BackendError, FastattnWarning, stats, use_backend
from .masks import Intervals
from .varlen import varlen_attention

__version__ = "0.1.0"

__all__ = [
    "BackendError",
    "Explanation",
    "FastattnWarning",
    "Intervals",
    "explain",
    "scaled_dot_product_attention",
    "stats",
    "use_backend",
    "varlen_attention",
]
