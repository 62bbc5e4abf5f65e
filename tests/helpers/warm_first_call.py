"""First calls of a process over binaries that are on disk, with a driver that launches nothing; a program.

    python warm_first_call.py write     writes a stand-in for every binary that the calls need
    python warm_first_call.py call      makes the calls, and prints what they needed as JSON

Tensors are the CPU's, and every layer below `Problem` takes them for those of an H100.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from typing import Any

import torch
from stand_in_compiler import Driver
from torch import Tensor

import fastattn
from fastattn import Intervals, Segments
from fastattn._compat import torch as torch_internals
from fastattn.backends.triton import cuda_driver
from fastattn.backends.triton.binaries import launcher
from fastattn.backends.triton.binaries.flag_set import Binary
from fastattn.backends.triton.binaries.label import FILES, label
from fastattn.backends.triton.binaries.launcher import BinaryLauncher
from fastattn.call import Call, Problem


class Anything:
    def __eq__(self, other: object) -> bool:
        return True

    def __hash__(self) -> int:
        return 0


def pretend() -> Driver:
    """To be called before a module of a kernel's launch is imported."""
    driver, problem_of = Driver(), Problem.of

    def on_gpu(call: Call, *rest: Any) -> Problem:
        return dataclasses.replace(problem_of(call, *rest), device="cuda", index=0, capability=(9, 0))

    def launcher_of(kernel: Any, grid: Any, device: torch.device, *rest: Any, **options: Any) -> BinaryLauncher:
        return BinaryLauncher(
            kernel, grid, device if device.type == "meta" else torch.device("cuda", 0), *rest, **options
        )

    Problem.of = staticmethod(on_gpu)  # type: ignore[method-assign, assignment]
    launcher.launcher_of = launcher_of
    cuda_driver._driver = lambda: driver  # type: ignore[assignment]
    torch_internals.current_device = Anything  # type: ignore[assignment]
    torch_internals.raw_stream = lambda index: 7  # type: ignore[assignment]
    from fastattn.backends.triton import limits
    from fastattn.backends.triton.decode import forward
    from fastattn.backends.triton.hopper import launch

    for module, name, value in (
        (forward, "sm_count", 132), (forward, "shared_memory", 227 << 10), (launch, "sm_count", 132)
    ):  # fmt: skip
        setattr(module, name, lambda index, value=value: value)
    assert limits.sm_count is not forward.sm_count
    return driver


def calls() -> list[tuple[str, int, dict[str, Any]]]:
    """Backend, queries, options."""
    ints = {"dtype": torch.int32}
    key_mask = torch.ones(2, 1, 1, 600, dtype=torch.bool)
    segments = Segments.left_padded(torch.tensor([0, 7], **ints), 600, 600)  # type: ignore[arg-type]
    return [
        ("decode", 1, {"mask": "causal", "kv_lengths": torch.tensor([600, 3], **ints)}),  # type: ignore[arg-type]
        ("decode", 4, {"mask": torch.ones(2, 1, 4, 600, dtype=torch.bool)}),
        ("hopper", 600, {"mask": "causal"}),
        ("hopper", 600, {"mask": segments}),
        ("hopper", 600, {"mask": Intervals(torch.zeros(2, 1, **ints), torch.tensor([[600], [3]], **ints))}),  # type: ignore[arg-type]
        ("prefill", 600, {"mask": "causal", "softcap": 30.0, "return_lse": True}),
        ("prefill", 600, {"mask": key_mask}),
        ("prefill", 600, {"mask": segments}),
    ]


def tensors(q_len: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.zeros(2, n, heads, 128, dtype=torch.bfloat16) for heads, n in ((8, q_len), (2, 600), (2, 600)))
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def write() -> None:
    from prepared import prepared

    from fastattn.backends.triton.bounds import Bounds
    from fastattn.dispatch import registry

    for name, q_len, options in calls():
        made = prepared(*tensors(q_len), **options)
        problem = Problem.of(made)
        every = list(registry.backend(name).binaries(problem))  # type: ignore[attr-defined]
        if name == "hopper" and problem.mask == "intervals":
            every += [x.flags(*rest) for x, *rest in Bounds(problem, made, 128, ordered=True).launches(made)]  # type: ignore
        for flags in every:
            FILES.store(label(flags), Binary(b"\x7fELF", "a_kernel", 1024, 128).packed())


def call(driver: Driver) -> dict[str, Any]:
    launched = []
    for name, q_len, options in calls():
        before = len(driver.launched)
        fastattn.scaled_dot_product_attention(*tensors(q_len), **options, backend=name)
        launched.append(len(driver.launched) - before)
    compilers = [name for name in sys.modules if name.partition(".")[0] == "triton"]
    return {"launched": launched, "imported": compilers, **fastattn.stats()["binaries"]}


if __name__ == "__main__":
    made = pretend()
    if sys.argv[1] == "write":
        write()
    else:
        print(json.dumps(call(made)))
