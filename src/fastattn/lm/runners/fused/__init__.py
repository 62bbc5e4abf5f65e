"""Llama's kind of layers in few kernels: prefill near the speed of its GEMMs, decode near the memory bandwidth."""

from .runner import FusedRunner as FusedRunner
