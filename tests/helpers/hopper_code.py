"""Compiles binaries of the Hopper forward for SM 9.0 and reads their machine code: a program, and what it finds.

    python hopper_code.py [NAME ...]

No GPU is needed, only Triton, whose wheel brings NVIDIA's assembler and disassembler. Prints one JSON object: by name
the `Code` of a binary.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2] / "src"))

from fastattn.backends.triton.hopper.binary import ALIGNED, BAND, FULL, INTERVALS, SEGMENTS, Flags

_128, _64, _256 = (128, 128), (64, 64), (256, 256)
NAMES = {
    "full": Flags("bf16", _128, FULL),
    "full-lse-keys": Flags("fp16", _128, FULL, kv_lengths=True, lse=True),
    "causal": Flags("bf16", _128, ALIGNED),
    "causal-sinks-lse": Flags("bf16", _128, ALIGNED, sinks="bf16", lse=True),
    "band-everything": Flags("fp16", _128, BAND, q_lengths=True, kv_lengths=True, sinks="fp32", softcap=True, lse=True),
    "short": Flags("bf16", _128, ALIGNED, short=True),
    "64": Flags("bf16", _64, FULL),
    "64-band-everything": Flags(
        "bf16", _64, BAND, q_lengths=True, kv_lengths=True, sinks="bf16", softcap=True, lse=True
    ),
    "192": Flags("bf16", (256, 128), ALIGNED, lse=True),
    "256-band": Flags("bf16", _256, BAND, q_lengths=True, kv_lengths=True, lse=True),
    "intervals": Flags("bf16", _128, INTERVALS),
    "intervals-everything": Flags("fp16", _128, INTERVALS, sinks="fp32", softcap=True, lse=True),
    "intervals-short": Flags("bf16", _128, INTERVALS, lse=True, short=True),
    "64-intervals": Flags("bf16", _64, INTERVALS, lse=True),
    "192-intervals": Flags("bf16", (256, 128), INTERVALS),
    "256-intervals": Flags("bf16", _256, INTERVALS, lse=True),
    "segments": Flags("bf16", _128, SEGMENTS),
    "segments-lse": Flags("bf16", _128, SEGMENTS, lse=True),
    "segments-everything": Flags("fp16", _128, SEGMENTS, sinks="fp32", softcap=True, lse=True),
    "segments-short": Flags("bf16", _128, SEGMENTS, lse=True, short=True),
    "64-segments": Flags("bf16", _64, SEGMENTS, lse=True),
    "64-segments-short": Flags("bf16", _64, SEGMENTS, short=True),
    "192-segments": Flags("bf16", (256, 128), SEGMENTS),
    "256-segments": Flags("bf16", _256, SEGMENTS, lse=True),
    "keys": Flags("bf16", _128, INTERVALS, keys=True),
    "keys-everything": Flags("fp16", _128, INTERVALS, keys=True, sinks="fp32", softcap=True, lse=True),
    "keys-short": Flags("bf16", _128, INTERVALS, keys=True, lse=True, short=True),
    "64-keys": Flags("bf16", _64, INTERVALS, keys=True, lse=True),
    "256-keys": Flags("bf16", _256, INTERVALS, keys=True),
    "rows-bool": Flags("bf16", _128, FULL, tiles="bool", listed=True),
    "rows-bias": Flags("bf16", _128, BAND, tiles="bf16", listed=True),
    "rows-everything": Flags(
        "fp16",
        _128,
        BAND,
        tiles="fp32",
        listed=True,
        q_lengths=True,
        kv_lengths=True,
        sinks="fp32",
        softcap=True,
        lse=True,
    ),
    "rows-dense": Flags("bf16", _128, BAND, tiles="bf16", lse=True),
    "64-rows-bool": Flags("bf16", _64, FULL, tiles="bool", listed=True),
    "64-rows-bias": Flags("bf16", _64, FULL, tiles="bf16"),
    "64-rows-float": Flags("fp16", _64, BAND, tiles="fp32", listed=True, lse=True),
    "192-rows-bias": Flags("bf16", (256, 128), BAND, tiles="bf16", listed=True),
    "256-rows-bool": Flags("bf16", _256, FULL, tiles="bool", listed=True),
    "256-rows-bias": Flags("bf16", _256, BAND, tiles="fp16", listed=True, lse=True),
}


@dataclass
class Loop:
    """What an innermost loop with products holds, in instructions."""

    products: int  #: HGMMA
    waits: int  #: for products
    stores: int  #: of spilled registers
    loads: int
    turns: int  #: barriers between the two consumers: waited for
    passed: int  #: and passed on
    exponentials: int
    beside: int  #: exponentials between the wait for the scores and that for the output: they run beside a product


@dataclass
class Code:
    """What a binary holds."""

    registers: int  #: a thread when the kernel starts
    raised: int  #: to what the consumers raise them, from what is in the machine code
    lowered: int  #: the producer
    shared: int
    arguments: int  #: of the kernel, as the driver counts them
    stores: int  #: of spilled registers, all of them
    loops: list[Loop]


def _count(pattern: str, lines: list[str]) -> int:
    return sum(re.search(pattern, line) is not None for line in lines)


def _without_rare(lines: list[str]) -> list[str]:
    """A loop without what only tiles with gaps do in it: `drop_unseen`, a branch that ends in a fence."""
    fence = next((i for i, line in enumerate(lines) if "FENCE.VIEW.ASYNC" in line), None)
    if fence is None:
        return lines
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    for i in range(fence, -1, -1):
        jump = re.search(r"@!?P\d BRA.*`\((\.L_x_\d+)\)", lines[i])
        if jump and labels.get(jump[1], 0) > fence:
            return lines[: i + 1] + lines[labels[jump[1]] :]
    return lines


def _loop(lines: list[str]) -> Loop:
    lines = _without_rare(lines)
    waits = [i for i, line in enumerate(lines) if "WARPGROUP.DEPBAR" in line]
    between = lines[waits[0] : waits[-1]] if waits else []
    return Loop(
        products=_count(r"\bHGMMA", lines),
        waits=len(waits),
        stores=_count(r"\bSTL\b", lines),
        loads=_count(r"\bLDL\b", lines),
        turns=_count(r"BAR\.SYNC\S* (0x9|0xa), 0x100", lines),
        passed=_count(r"BAR\.ARV\S* (0x9|0xa), 0x100", lines),
        exponentials=_count(r"MUFU\.EX2", lines),
        beside=_count(r"MUFU\.EX2", between),
    )


def _innermost(lines: list[str]) -> list[list[str]]:
    """The innermost loops that hold products: from a label to the jump back to it."""
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"\s*(\.L_x_\d+):", line))}
    spans = []
    for i, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L_x_\d+)\)", line)
        if jump and labels.get(jump[1], i) < i:
            spans.append((labels[jump[1]], i))
    spans = [(a, b) for a, b in spans if _count(r"\bHGMMA", lines[a : b + 1])]
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in spans)]
    # A wait that has to be repeated is placed behind everything else, and jumps back from there: no loop over blocks.
    found = [lines[a : b + 1] for a, b in inner]
    return [body for body in found if not _count(r"\b(UTMASTG|STG)\b", body)]


def read(name: str) -> Code:
    from fastattn.backends.triton.hopper.binary import compile_kernel

    return read_compiled(compile_kernel(NAMES[name]))


def read_compiled(compiled: Any) -> Code:
    """compiled: Triton's own result."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])

        def run(tool: str, *arguments: str) -> str:
            command = [str(tools / tool), *arguments, str(cubin)]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout

        usage, lines = run("cuobjdump", "-res-usage"), run("nvdisasm", "-c").splitlines()
    registers = re.search(r"REG:(\d+)", usage)
    changes = [re.search(r"USETMAXREG\.(\w+).*\b0x([0-9a-f]+)", line) for line in lines if "USETMAXREG" in line]
    return Code(
        registers=int(registers[1]) if registers else 0,
        raised=max((int(m[2], 16) for m in changes if m and m[1] == "TRY_ALLOC" and int(m[2], 16) < 256), default=0),
        lowered=min((int(m[2], 16) for m in changes if m and m[1] == "DEALLOC"), default=0),
        shared=compiled.metadata.shared,
        arguments=_count(r"\.param .*_param_\d+", compiled.asm["ptx"].split(".entry")[1].split(")")[0].splitlines()),
        stores=_count(r"\bSTL\b", lines),
        loops=[_loop(found) for found in _innermost(lines)],
    )


def main(names: Collection[str], read: Callable[[str], Code]) -> None:
    """What the command line of a program like this one asks for."""
    wanted = sys.argv[1:] or list(names)
    with ProcessPoolExecutor(min(2, os.cpu_count() or 1), get_context("spawn")) as pool:
        print(json.dumps({name: asdict(code) for name, code in zip(wanted, pool.map(read, wanted), strict=True)}))


def codes(program: str, cache: Path) -> dict[str, Any]:
    """For tests: what a program like this one finds, compiled anew, in a process that is not told to interpret Triton.
    program: name of its file, without the ending. cache: an empty folder."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, str(Path(__file__).with_name(f"{program}.py"))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main(NAMES, read)
