"""Compiles the decode kernels for a GPU that need not be there; a program, run by test_decode_native.py.

    python compile_decode.py MAJOR MINOR [--wide | --every]

Compiles the flag sets that launches name, as the process that compiles does. Prints one line of JSON per kernel: what
it is, its registers, the bytes of shared memory that it takes and of registers that it spills, what it loads before it
waits for anything, Hopper's products and whether they wait for one another. --every: all launches of wide heads that
the rules can choose, which takes minutes; --wide: some of them; else also those of other heads.
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

from fastattn.backends.triton.binaries.flag_set import Binary
from fastattn.backends.triton.binaries.launcher import BinaryLauncher
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.backends.triton.decode import shapes
from fastattn.backends.triton.decode.forward import DecodeKernel
from fastattn.call import Call, Problem
from fastattn.masks import Intervals


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
    yield from chunks()


def chunks() -> Iterator[tuple[str, tuple[Any, ...], dict[str, Any]]]:
    """More rows than a tile for few queries has, and keys to divide."""
    lengths, bounds = torch.ones(1, dtype=torch.int32), torch.zeros(1, 32, dtype=torch.int32)
    bits, more = {"dtype": torch.bfloat16}, {"return_lse": True, "sinks": torch.empty(32)}
    rows = torch.empty(1, 1, 32, 4096, dtype=torch.float32)
    for dims, options in (
        ((128, 128), {"mask": "causal", "kv_lengths": lengths, "q_lengths": lengths}),
        ((64, 64), {"window": (2047, 0), **more}),
        ((256, 256), {"mask": "causal", "softcap": 30.0, **more}),
        ((192, 128), {"mask": "causal"}),
        ((72, 72), {}),
        ((128, 128), {"mask": Intervals(bounds, bounds)}),
        ((128, 128), {"mask": rows}),
    ):
        q, k = torch.empty(1, 32, 32, dims[0], **bits), torch.empty(1, 8, 4096, dims[0], **bits)
        yield "chunk", (q, k, torch.empty(1, 8, 4096, dims[1], **bits)), options


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


def meta(call: Call) -> Call:
    """The call on the meta device, where nothing is launched."""
    return Call(*[x.to("meta") if isinstance(x, torch.Tensor) else x for x in call])


def code(binary: Binary) -> dict[str, Any]:
    """What the machine code says of itself."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.cubin)
        file.flush()

        def run(*command: str) -> str:
            done = subprocess.run([str(tools / command[0]), *command[1:], file.name], capture_output=True, check=True)
            return done.stdout.decode()

        usage, lines = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c").splitlines()
    loads = [i for i, line in enumerate(lines) if re.search(r"\bLDG\.\S*128", line)]
    copies, shuffles = ([i for i, line in enumerate(lines) if word in line] for word in ("LDGSTS", "SHFL"))
    numbers = {name: int(number) for name, number in re.findall(r"(REG|STACK):(\d+)", usage)}
    products, waits = (sum(word in line for line in lines) for word in ("HGMMA", "WARPGROUP.DEPBAR"))
    return {
        "shared": binary.shared,
        "registers": numbers["REG"],
        "spilled": numbers["STACK"],
        "products": products,
        "ahead": sum(i < shuffles[0] for i in loads) if shuffles else 0,  # loads before threads exchange anything
        "serial": products > 0 and waits >= products,
    }


def main(major: int, minor: int, flag: str = "") -> None:
    every = flag == "--every"
    others = [] if flag else [(name, False, tensors, options) for name, tensors, options in calls()]
    seen = set()
    for name, same, (q, k, v), options in (*others, *wide(every)):
        call = meta(prepared(q, k, v, **options))
        problem = dataclasses.replace(Problem.of(call), device="none", capability=(major, minor))
        if same and not launch.may_be_same(problem):
            continue
        chosen = launch.choose(problem, 132, None, same)
        launches = DecodeKernel(problem, call, chosen, same).launches(call)
        for launcher, tensors, floats in launches[:1] if every else launches:
            assert isinstance(launcher, BinaryLauncher)
            flags = launcher.flags(tensors, floats)
            assert "i64" not in flags.types  # one compilation has to serve every length and layout
            if every and flags in seen:
                continue
            seen.add(flags)
            binary = flags.compile()
            said = {"call": name, "kernel": binary.name, "wide": shapes.is_wide(problem), "rows": chosen.block_m}
            print(json.dumps(said | {"keys": chosen.block_n, "stages": chosen.stages} | code(binary)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
