"""Decoder layers of Llama's kind in few kernels: prefill near the speed of its products, decode near the memory's."""

from .runner import FusedRunner as FusedRunner
