"""Runners: what runs a language model for the engine, and which model gets which.

The fastest one first: `fused` (Llama's kind of layers in few kernels), `module` (transformers' own modules over a cache
with lengths on the device), `per_row` (one forward pass per row), `recompute` (one forward pass over the whole text per
token). `select.make_runner` takes the first one that accepts a model and reproduces the model's own logits.
"""

from ..runner import Runner as Runner
from .module import ModuleRunner as ModuleRunner
from .select import make_runner as make_runner
