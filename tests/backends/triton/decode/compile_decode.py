"""Compiles the decode kernels for a GPU that need not be there; a program, run by test_decode_native.py.

    python compile_decode.py MAJOR MINOR [--wide | --every]

Prints one line of JSON per kernel compiled: what it is, its registers, the bytes of shared memory that it takes and of
registers that it spills, Hopper's products and whether they wait for one another. --every: all launches of wide heads
that the rules can choose, which takes minutes; --wide: some of them; else also those of other heads.
"""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton

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


HALF, FLOAT = torch.bfloat16, torch.float32
#: Heads to one K/V head, queries; head dim, value dim; whether the values are in the keys; features.
SOME = [
    (HALF, (8, 1), (512, 512), False, "plain"),
    (HALF, (128, 1), (576, 512), True, "plain"),
    (HALF, (128, 1), (576, 512), True, "batch"),
    (HALF, (128, 1), (576, 512), False, "lse"),
    (HALF, (64, 1), (512, 512), False, "mask"),
    (HALF, (32, 2), (320, 256), False, "intervals"),
    (FLOAT, (128, 1), (576, 512), False, "plain"),
]
EVERY = list(
    product(
        (HALF, FLOAT),
        ((8, 1), (16, 2), (32, 2), (128, 1), (8, 300)),
        ((264, 8), (320, 256), (512, 512), (576, 512), (576, 64)),
        (False, True),
        ("plain", "batch", "lse", "mask", "intervals"),
    )
)


def wide(every: bool) -> Iterator[tuple[str, bool, tuple[Any, ...], dict[str, Any]]]:
    """Name, whether the values are in the keys, tensors, options."""
    for dtype, (heads, q_len), (dim, value_dim), same, feature in EVERY if every else SOME:
        batch = 256 if feature == "batch" else 1  # so many that there are no splits
        q = torch.empty(1, 1, 1, dim, dtype=dtype).expand(batch, heads, q_len, dim)
        k, v = (torch.empty(1, 1, 1, x, dtype=dtype).expand(batch, 1, 4096, x) for x in (dim, value_dim))
        options: dict[str, Any] = {"mask": "causal", "kv_lengths": torch.ones(batch, dtype=torch.int32)}
        if q_len > 16 or feature == "lse":
            options |= {"softcap": 30.0, "return_lse": True, "sinks": torch.empty(heads)}
        if feature == "mask":
            options["mask"] = torch.empty(1, 1, q_len, 4096, dtype=torch.float64)
        elif feature == "intervals":
            bounds = torch.zeros(1, q_len, dtype=torch.int32)
            options["mask"] = Intervals(bounds, bounds)
        name = f"{dtype} {heads}x{q_len} {dim}/{value_dim} {feature}{' same' if same else ''}"
        yield name, same, (q, k, v), options


def code(compiled: Any) -> dict[str, Any]:
    """What the machine code says of itself."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()

        def run(*command: str) -> str:
            done = subprocess.run([str(tools / command[0]), *command[1:], file.name], capture_output=True, check=True)
            return done.stdout.decode()

        usage, lines = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c").splitlines()
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    products, waits = (sum(word in line for line in lines) for word in ("HGMMA", "WARPGROUP.DEPBAR"))
    return {
        "shared": compiled.metadata.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"],
        "products": products,
        "serial": products > 0 and waits >= products,
    }


def main(major: int, minor: int, flag: str = "") -> None:
    target = GPUTarget("cuda", 10 * major + minor, 32)
    recorders = [Recorder(kernel.attend_kernel), Recorder(combine.combine_kernel)]
    forward.attend_kernel, forward.combine_kernel = recorders
    every = flag == "--every"
    others = [] if flag else [(name, False, tensors, options) for name, tensors, options in calls()]
    seen = set()
    for name, same, (q, k, v), options in (*others, *wide(every)):
        call = prepared(q, k, v, **options)
        problem = dataclasses.replace(Problem.of(call), device="none", capability=(major, minor))
        if same and not launch.may_be_same(problem):
            continue
        chosen = launch.choose(problem, 132, None, same)
        forward.DecodeKernel(problem, call, chosen, same).forward(call)
        for recorder in recorders:
            if every and recorder is recorders[0]:
                key = (name.split()[0], *name.split()[2:], dataclasses.replace(chosen, splits=min(chosen.splits, 2)))
                if key in seen:
                    recorder.launches.clear()
                seen.add(key)
            for compiled in recorder.compile(target) if recorder is recorders[0] or not every else ():
                said = {"call": name, "kernel": compiled.name, "wide": launch.is_wide(problem), "rows": chosen.block_m}
                print(json.dumps(said | {"keys": chosen.block_n, "stages": chosen.stages} | code(compiled)), flush=True)
            recorder.launches.clear()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
