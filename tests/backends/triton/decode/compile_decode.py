"""Compiles the decode kernels for a GPU that need not be there; a program, run by test_decode_native.py.

    python compile_decode.py MAJOR MINOR

Prints one line of JSON per kernel compiled: what it is, and the bytes of shared memory that it takes.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "helpers"))

from prepared import prepared
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from fastattn.backends.triton.decode import combine, forward, kernel
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.call import Problem
from fastattn.masks import Intervals

TYPES = {
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}


class Recorder:
    """Stands in for a kernel: takes down the launches instead of making them."""

    def __init__(self, jitted: Any) -> None:
        self.jitted = jitted
        self.launches: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def __getitem__(self, grid: Any) -> Any:
        return lambda *args, **kwargs: self.launches.append((args, kwargs))

    def compile(self, target: GPUTarget) -> Iterator[Any]:
        names = self.jitted.arg_names
        fixed = {parameter.name for parameter in self.jitted.params if parameter.is_constexpr}
        for args, kwargs in self.launches:
            options = {name: value for name, value in kwargs.items() if name not in names}
            values = dict(zip(names, args)) | {name: value for name, value in kwargs.items() if name in names}
            signature, constants, attributes = {}, {}, {}
            for index, name in enumerate(names):
                value = values[name]
                if value is None or name in fixed:
                    signature[name], constants[index,] = "constexpr", value
                elif isinstance(value, torch.Tensor):
                    signature[name], attributes[index,] = "*" + TYPES[value.dtype], [["tt.divisibility", 16]]
                elif isinstance(value, int):
                    # One compilation has to serve every length and layout.
                    assert name in self.jitted.do_not_specialize, name
                    signature[name] = "i32"
                else:
                    signature[name] = "fp32"
            yield compile(ASTSource(self.jitted, signature, constants, attributes), target=target, options=options)


def calls() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """Every feature, with the smallest and the largest tile that a dtype can have."""
    lengths = torch.ones(1, dtype=torch.int32)
    for q_len in (1, 16):

        def qkv(dtype: torch.dtype, dim: int, value_dim: int, rows: int = q_len) -> tuple[torch.Tensor, ...]:
            q, k = torch.empty(1, 32, rows, dim, dtype=dtype), torch.empty(1, 8, 4096, dim, dtype=dtype)
            return q, k, torch.empty(1, 8, 4096, value_dim, dtype=dtype)

        bounds = torch.zeros(1, q_len, dtype=torch.int32)
        yield "bfloat16", qkv(torch.bfloat16, 128, 128), {"mask": "causal", "kv_lengths": lengths}
        yield "window", qkv(torch.bfloat16, 64, 64), {"window": (15, 0), "sinks": torch.empty(32), "return_lse": True}
        yield "float16", qkv(torch.float16, 256, 256), {"softcap": 30.0, "q_lengths": lengths, "return_lse": True}
        yield "float32", qkv(torch.float32, 256, 256), {"mask": "causal"}
        yield "bool", qkv(torch.bfloat16, 192, 128), {"mask": torch.empty(1, 1, q_len, 4096, dtype=torch.bool)}
        yield "additive", qkv(torch.float16, 72, 8), {"mask": torch.empty(q_len, 4096, dtype=torch.float64)}
        yield "intervals", qkv(torch.bfloat16, 128, 128), {"mask": Intervals(bounds, bounds)}
    for dim, dtype in ((128, torch.bfloat16), (256, torch.float16), (128, torch.float32), (256, torch.float32)):
        yield "many queries", qkv(dtype, dim, dim, 512), {"mask": "causal", "softcap": 50.0, "return_lse": True}


def main(major: int, minor: int) -> None:
    target = GPUTarget("cuda", 10 * major + minor, 32)
    recorders = [Recorder(kernel.attend_kernel), Recorder(combine.combine_kernel)]
    forward.attend_kernel, forward.combine_kernel = recorders
    for name, (q, k, v), options in calls():
        call = prepared(q, k, v, **options)
        problem = dataclasses.replace(Problem.of(call), device="none", capability=(major, minor))
        forward.DecodeKernel(problem, call, launch.choose(problem, 132)).forward(call)
        for recorder in recorders:
            for compiled in recorder.compile(target):
                print(json.dumps({"call": name, "kernel": compiled.name, "shared": compiled.metadata.shared}))
            recorder.launches.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
