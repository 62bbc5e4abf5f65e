"""Launches of the native module beside Python's, over the driver of `hopper_launches.py`, which runs nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hopper_launches import Described, HopperGpu, Launched
from native_driver import NativeDriver
from torch import Tensor

from fastattn import Intervals, Segments
from fastattn.dispatch.native import calls

B, H, HKV, S = 2, 4, 2, 300


def made(heads: int, length: int = S, dim: int = 64) -> Tensor:
    return torch.randn(B, length, heads, dim, dtype=torch.bfloat16).transpose(1, 2)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def segments() -> Segments:
    return Segments(ints(0, 0, 9, 0, 9, 200, 1, 3, 300).view(3, 3).T.contiguous().T, True)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"mask": "causal"},
    "full": dict,
    "scaled": lambda: {"scale": 0.2},
    "window": lambda: {"mask": "causal", "window": (100, -1)},
    "softcap": lambda: {"mask": "causal", "softcap": 30.0},
    "sinks": lambda: {"mask": "causal", "sinks": torch.randn(H)},
    "lengths": lambda: {"mask": "causal", "q_lengths": ints(7, 300), "kv_lengths": ints(300, 11)},
    "intervals": lambda: {"mask": Intervals(ints(0, 3)[:, None], ints(200, 300)[:, None])},
    "segments": lambda: {"mask": segments()},
}


class Symbols:
    """Names of addresses: those of tensors that are known, and the rest by their order within a piece of memory."""

    def __init__(self, known: dict[str, Tensor]) -> None:
        self.known = {x.data_ptr(): name for name, x in known.items()}

    def of(self, launches: list[Launched]) -> list[Any]:
        found = []
        unknown: dict[int, str] = {}

        def named(address: int) -> str:
            if address in self.known:
                return self.known[address]
            assert address % 16 == 0 and address > 0
            return unknown.setdefault(address, f"new {len(unknown)}")

        for launch in launches:
            arguments = []
            for name, x in launch.arguments.items():
                if isinstance(x, Described):
                    arguments.append((name, named(x.address), x.shape, x.strides, x.box))
                elif isinstance(x, int) and x > 1 << 32:
                    arguments.append((name, named(x)))
                else:
                    arguments.append((name, x))
            found.append((launch.kernel, launch.flags, launch.programs, launch.stream, arguments))
        return found


def both_ways(
    gpu: HopperGpu, driver: NativeDriver, run: Callable[[], Any], known: Callable[[], dict[str, Tensor]]
) -> tuple[list[Any], list[Any]]:
    """The launches of Python and of the module for the same call."""
    run()
    gpu.taken()
    module, calls.module = calls.module, None
    module.clear()  # what operators run is asked of it, not of `calls`
    before = driver.launches
    out = run()
    assert driver.launches == before, "the module launched something"
    python = Symbols(known() | results(out)).of(gpu.taken())
    calls.module = module
    for _ in range(3):
        run()
    gpu.taken()
    before = driver.launches
    out = run()
    launched = gpu.taken()
    assert driver.launches - before == len(launched), "Python launched something"
    return python, Symbols(known() | results(out)).of(launched)


def results(out: Any) -> dict[str, Tensor]:
    found = out if isinstance(out, tuple) else (out,)
    return {f"result {i}": x for i, x in enumerate(found)}


def tensors_of(options: dict[str, Any]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, x in options.items():
        parts = x if isinstance(x, tuple) else (x,)
        found |= {f"{name} {i}": part for i, part in enumerate(parts) if isinstance(part, Tensor)}
    return found
