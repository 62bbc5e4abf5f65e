"""Random calls of the Hopper forward against the reference, on a GPU: a program for test_forward.py, or to run by hand.

    python hopper_cases.py [--json FILE] [--only PREFIX,...]
                                              every kind (whose name begins so), in processes of their own: a CUDA error
                                              spoils only one; prints a summary, and writes it
    python hopper_cases.py KIND [COUNT] [I]   one kind, in this process, from its case I on

A case prints one line when it is done. The parent stops a child that prints nothing for LIMIT seconds (a kernel that
waits for ever cannot be stopped from inside) and goes on with the case after. Exit status: 0 if every case was right.
"""

from __future__ import annotations

import argparse
import json
import os
import queue
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[2] / "src")]

import hopper_masks  # noqa: E402

LIMIT = 60.0  #: seconds a case may take, the compiler's not counted
COUNT = 10  #: cases of a kind
AT_A_TIME = 6  #: kinds, on one GPU: each disturbs the others, as it should
REPEATS = 3
WORST = {torch.bfloat16: 4e-3, torch.float16: 1e-3}  #: norm of the error over the norm of the reference
DEVICE = "cuda"
OTHER_WORK = 2048  #: a product of that size runs beside every call, on another stream


@dataclass(frozen=True)
class Kind:
    """What one binary serves; shapes, lengths, windows and layouts are drawn."""

    dims: tuple[tuple[int, int], ...]  #: head dim, value dim
    band: str  #: "full", "causal", "chunk" (more keys than queries, or fewer), "window", "left", "right", "any"
    dtype: torch.dtype = torch.bfloat16
    q_lengths: bool = False
    kv_lengths: bool = False
    sinks: torch.dtype | None = None
    softcap: bool = False
    lse: bool = False
    masks: tuple[str, ...] = ()  #: see `hopper_masks`; lengths beside those that are no Segments


_K = TypeVar("_K", bound=Kind)
_128, _64 = ((128, 128),), ((64, 64),)
KINDS = {
    "causal": Kind(_128, "causal"),
    "full": Kind(_128, "full"),
    "chunk": Kind(_128, "chunk"),
    "causal-lse": Kind(_128, "causal", lse=True),
    "full-lse": Kind(_128, "full", lse=True),
    "window-lse": Kind(_128, "window", lse=True),
    "left": Kind(_128, "left", torch.float16),
    "right": Kind(_128, "right", torch.float16),
    "sinks": Kind(_128, "window", sinks=torch.bfloat16, lse=True),
    "sinks-float": Kind(_128, "causal", sinks=torch.float32),
    "softcap": Kind(_128, "chunk", softcap=True),
    "softcap-lse": Kind(_128, "causal", softcap=True, lse=True),
    "keys": Kind(_128, "full", kv_lengths=True, lse=True),
    "keys-chunk": Kind(_128, "chunk", kv_lengths=True),
    "both": Kind(_128, "chunk", q_lengths=True, kv_lengths=True, lse=True),
    "both-full": Kind(_128, "full", q_lengths=True, kv_lengths=True),
    "queries": Kind(_128, "chunk", q_lengths=True),
    "everything": Kind(
        _128, "window", torch.float16, q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True, lse=True
    ),
    "padded": Kind(((72, 72), (80, 80), (96, 96), (104, 88), (128, 64), (40, 120)), "chunk", lse=True),
    "padded-full": Kind(((72, 72), (80, 80), (96, 96), (104, 88)), "full"),
    "64": Kind(_64, "causal"),
    "64-full": Kind(((64, 64), (32, 32), (48, 8), (8, 56)), "full"),
    "64-window": Kind(_64, "window", sinks=torch.bfloat16, lse=True),
    "64-keys": Kind(_64, "full", kv_lengths=True),
    "64-everything": Kind(_64, "window", q_lengths=True, kv_lengths=True, sinks=torch.bfloat16, softcap=True, lse=True),
    "192": Kind(((192, 128), (136, 128), (192, 64)), "causal", lse=True),
    "192-chunk": Kind(((192, 128), (192, 120)), "chunk", kv_lengths=True),
    "256": Kind(((256, 256), (192, 192), (64, 256)), "causal"),
    "256-full": Kind(((256, 256), (160, 256)), "full", lse=True),
    "256-window": Kind(((256, 256),), "window", q_lengths=True, kv_lengths=True, lse=True),
}
_SEGMENTS = ("packed", "left", "chunks", "gaps", "wild")
_INTERVALS = ("intervals", "entry", "holes")
_KEYS = ("bool", "bias", "edge")
#: By what hides keys; each in both dtypes.
MASKED = {
    "mask-packed": Kind(_128, "any", lse=True, masks=("packed",)),
    "mask-packed-plain": Kind(_128, "any", masks=("packed",)),
    "mask-left": Kind(_128, "any", lse=True, masks=("left",)),
    "mask-left-plain": Kind(_128, "causal", masks=("left",)),
    "mask-chunks": Kind(_128, "chunk", lse=True, masks=("chunks",)),
    "mask-gaps": Kind(_128, "any", lse=True, masks=("gaps", "wild")),
    "mask-intervals": Kind(_128, "any", lse=True, masks=("intervals", "entry")),
    "mask-holes": Kind(_128, "any", masks=("holes",)),
    "mask-bool": Kind(_128, "any", lse=True, masks=("bool",)),
    "mask-bias": Kind(_128, "any", lse=True, masks=("bias",)),
    "mask-edge": Kind(_128, "any", masks=("edge",)),
    "mask-lengths": Kind(_128, "any", lse=True, q_lengths=True, kv_lengths=True, masks=_INTERVALS + _KEYS),
    "mask-everything": Kind(_128, "any", sinks=torch.float32, softcap=True, lse=True, masks=_SEGMENTS + _INTERVALS),
    "mask-everything-keys": Kind(
        _128, "any", q_lengths=True, kv_lengths=True, sinks=torch.float32, softcap=True, lse=True, masks=_KEYS
    ),
    "mask-padded": Kind(((72, 72), (80, 80), (96, 96), (104, 88)), "any", lse=True, masks=_SEGMENTS),
    "mask-64": Kind(_64, "any", lse=True, masks=_SEGMENTS + _INTERVALS),
    "mask-64-keys": Kind(((64, 64), (32, 32), (48, 8)), "any", lse=True, masks=_KEYS),
    "mask-192": Kind(((192, 128), (136, 128)), "any", lse=True, masks=_SEGMENTS + _INTERVALS),
    "mask-192-keys": Kind(((192, 128),), "any", masks=_KEYS),
    "mask-256": Kind(((256, 256), (160, 256)), "any", lse=True, masks=_SEGMENTS + _INTERVALS),
    "mask-256-keys": Kind(((256, 256),), "any", masks=_KEYS),
}
_ROWS = tuple(hopper_masks.ROWS)[:4]
MASKED |= {
    **{name: Kind(_128, "any", lse=True, masks=(name,)) for name in _ROWS},
    "rows-plain": Kind(_128, "full", masks=("rows-bool", "rows-bf16")),
    "rows-causal": Kind(_128, "causal", masks=_ROWS),
    "rows-lengths": Kind(_128, "any", lse=True, q_lengths=True, masks=_ROWS),
    "rows-everything": Kind(_128, "any", q_lengths=True, sinks=torch.float32, softcap=True, lse=True, masks=_ROWS),
    "rows-sinks": Kind(_128, "chunk", sinks=torch.bfloat16, masks=_ROWS),
    "rows-padded": Kind(((72, 72), (80, 80), (104, 88), (128, 64)), "any", lse=True, masks=_ROWS),
    "rows-64": Kind(_64, "any", lse=True, masks=_ROWS),
    "rows-64-plain": Kind(((64, 64), (32, 32), (48, 8)), "full", masks=_ROWS),
    "rows-64-everything": Kind(_64, "any", q_lengths=True, sinks=torch.bfloat16, softcap=True, lse=True, masks=_ROWS),
    "rows-192": Kind(((192, 128), (136, 128)), "any", lse=True, masks=_ROWS),
    "rows-256": Kind(((256, 256), (160, 256)), "any", lse=True, masks=_ROWS),
    "rows-odd": Kind(((128, 128), (64, 64)), "any", lse=True, masks=tuple(hopper_masks.ROWS)[4:]),
}
KINDS |= MASKED | {f"{name}-fp16": replace(kind, dtype=torch.float16) for name, kind in MASKED.items()}


def draw(kind: Kind, rng: random.Random, i: int) -> dict[str, Any]:
    """Shapes and numbers of one call."""
    while True:
        batch, kv_heads, group = rng.randint(1, 4), rng.choice((1, 2, 4, 8)), rng.choice((1, 2, 4, 7, 8))
        if rng.random() < 0.1:
            batch = rng.randint(30, 70)  # more entries than the lanes of a warp
        longest = rng.choice((64, 300, 1100, 2600))
        q_len, kv_len = rng.randint(1, longest), rng.randint(1, longest)
        if i % 5 == 0:
            q_len = kv_len = rng.choice((127, 128, 129, 255, 256, 257, 384, 640, 1024))
        if kind.band == "causal":
            kv_len = q_len
        elif kind.band == "chunk" and rng.random() < 0.7:
            q_len, kv_len = sorted((q_len, kv_len))
        elif kind.band == "any" and rng.random() < 0.6:  # Segments of one length for both
            kv_len = q_len
        if batch * kv_heads * group * q_len * kv_len < 6e7:
            break
    left = right = -1
    if kind.band in ("causal", "chunk"):
        right = 0
    if kind.band == "any":
        left, right = rng.choice((-1, -1, -1, 0, 64, 127, 700)), rng.choice((-1, 0, 0, 0, 3, 100))
    if kind.band in ("window", "left"):
        left = rng.choice((0, 1, 63, 64, 127, 128, 200, 1000, rng.randint(0, longest)))
    if kind.band in ("window", "right"):
        right = rng.choice((0, 0, 0, 1, 64, 100, rng.randint(0, longest)))

    def lengths(most: int) -> list[int]:
        special = (0, 1, most, most + 5, most // 2, most, most)
        return [rng.choice(special) if rng.random() < 0.3 else rng.randint(0, most) for _ in range(batch)]

    return {
        "dims": rng.choice(kind.dims),
        "sizes": (batch, kv_heads, group, q_len, kv_len),
        "left": left,
        "right": right,
        "scale": rng.choice((None, None, 0.05, 0.3, 0.1)) if kind.lse else None,
        "softcap": rng.choice((5.0, 30.0, 50.0)) if kind.softcap else 0.0,
        "q_lengths": lengths(q_len) if kind.q_lengths else None,
        "kv_lengths": lengths(kv_len) if kind.kv_lengths else None,
        "layout": rng.choice(("token", "head", "packed", "cache", "odd")),
        "mask": (rng.choice(kind.masks), rng.randrange(1 << 30)) if kind.masks else None,  # and its seed
    }


def tensor(layout: str, batch: int, heads: int, length: int, dim: int, dtype: torch.dtype) -> torch.Tensor:
    """A random `[B, H, S, D]`, NaN in whatever else lies in its memory."""

    def memory(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)

    if layout == "token":
        x = memory(batch, length, heads, dim).transpose(1, 2)
    elif layout == "head":
        x = memory(batch, heads, length, dim)
    elif layout == "packed":  # one of q, k, v of a fused projection
        x = memory(batch, length, 3, heads, dim)[:, :, 1].transpose(1, 2)
    elif layout == "cache":  # the first tokens of a longer cache
        x = memory(batch, heads, length + 77, dim)[:, :, :length]
    else:  # what the copy engine cannot read
        x = memory(batch, length, heads, dim + 1)[..., 1:].transpose(1, 2)
    return x.copy_(torch.randn(batch, heads, length, dim, device=DEVICE))


def check(kind: Kind, case: dict[str, Any], seed: int) -> tuple[bool, str]:
    """Whether the kernel computes the case right, and a line about it."""
    import naive

    from fastattn.backends.triton.hopper import HopperBackend
    from fastattn.backends.triton.hopper.launch import reasons
    from fastattn.call import Call, Problem

    torch.manual_seed(seed)
    batch, kv_heads, group, q_len, kv_len = case["sizes"]
    dim, value_dim = case["dims"]
    heads = kv_heads * group
    q = tensor(case["layout"], batch, heads, q_len, dim, kind.dtype)
    k = tensor(case["layout"], batch, kv_heads, kv_len, dim, kind.dtype)
    v = tensor(case["layout"], batch, kv_heads, kv_len, value_dim, kind.dtype)
    sinks = None if kind.sinks is None else 2 * torch.randn(heads, device=DEVICE, dtype=kind.sinks)
    found = {
        name: None if case[name] is None else torch.tensor(case[name], dtype=torch.int32, device=DEVICE)
        for name in ("q_lengths", "kv_lengths")
    }
    softcap, scale = case["softcap"], case["scale"] or dim**-0.5
    if softcap:
        q *= 8  # scores that the cap bends
    fields, mask, window = {}, None, (case["left"], case["right"])
    if case["mask"]:
        name, mask_seed = case["mask"]
        fields, mask, _ = hopper_masks.draw(name, random.Random(mask_seed), batch, heads, q_len, kv_len, DEVICE)
    expected = naive.attention(
        q.double(),
        k.double(),
        v.double(),
        scale=scale,
        mask=mask,
        window=window,
        sinks=sinks,
        softcap=softcap or None,
        **found,
    )
    for b in range(batch):
        if case["q_lengths"]:
            q[b, :, min(case["q_lengths"][b], q_len) :] = torch.nan
        if case["kv_lengths"]:
            for x in (k, v):
                x[b, :, min(case["kv_lengths"][b], kv_len) :] = torch.nan
    if case["mask"] and case["mask"][0] in hopper_masks.ROWS:  # whatever they hold, but that is finite
        keys = hopper_masks.hidden(mask)
        k.masked_fill_(keys, 100.0)
        v.masked_fill_(keys, 1000.0)
    elif case["mask"]:
        visible = naive.visible(q, k, mask=None if isinstance(mask, torch.Tensor) else mask, window=window, **found)
        rows, keys = hopper_masks.unseen(visible)
        q.masked_fill_(rows, torch.nan)
        k.masked_fill_(keys, torch.nan)
        v.masked_fill_(keys, torch.inf if seed % 2 else torch.nan)
    call = Call(
        q, k, v, sinks=sinks, **fields, **found, scale=scale, left=case["left"], right=case["right"],
        softcap=softcap, return_lse=kind.lse,
    )  # fmt: skip
    problem = Problem.of(call)
    assert not reasons(problem), reasons(problem)
    forward = HopperBackend().bind(problem, call).forward
    beside, stream = torch.randn(OTHER_WORK, OTHER_WORK, device=DEVICE), torch.cuda.Stream()
    results = []
    for _ in range(REPEATS):
        with torch.cuda.stream(stream):
            beside @ beside
        results.append(forward(call))
        torch.cuda.synchronize()
    out, lse = results[0]
    error = ((out.double() - expected.out).norm() / expected.out.norm().clamp(min=1e-9)).item()
    # Where a row sees nothing but keys that a bias makes low, scores of that size are rounded to float32.
    near = expected.lse > -1e30  # what a mask makes lower is clamped: see `key_bias`
    largest = expected.lse[near].abs().max().item() if near.any() else 0.0
    fine = error < WORST[kind.dtype] + largest * 2**-23 and out.shape == expected.out.shape
    # A row at a time too, so that a wrong one does not drown in many right ones.
    row = ((out.double() - expected.out).norm(dim=-1) / expected.out.norm(dim=-1).clamp(min=0.05)).max().item()
    fine &= row < 0.05
    same = all(torch.equal(out.view(torch.int16), o.view(torch.int16)) for o, _ in results)
    text = f"error {error:.1e}, worst row {row:.1e}"
    if kind.lse:
        seen = expected.lse > -torch.inf
        apart = (lse.double() - expected.lse)[near].abs().max().item() if near.any() else 0.0
        fine &= apart < 2e-3 + largest * 2**-22 and torch.equal(lse > -torch.inf, seen)
        same &= all(torch.equal(lse.view(torch.int32), x.view(torch.int32)) for _, x in results)
        text += f", lse {apart:.1e}"
    return bool(fine and same), text + ("" if same else ", DIFFERENT BITS")


def run_kind(name: str, count: int, start: int) -> int:
    """One kind in this process. Returns how many cases were wrong."""
    torch.use_deterministic_algorithms(True)  # fills with NaN what is allocated
    torch.backends.cuda.matmul.allow_tf32 = True  # of the other work
    return run_cases(name, KINDS[name], draw, check, range(start, count))


def run_cases(
    name: str,
    kind: _K,
    draw: Callable[[_K, random.Random, int], dict[str, Any]],
    check: Callable[[_K, dict[str, Any], int], tuple[bool, str]],
    which: range,
) -> int:
    """Cases of a kind by their numbers, with lines that `supervise` reads. Returns how many were wrong."""
    bad = 0
    for i in which:
        seed = int(os.environ.get("FASTATTN_TEST_SEED") or 0) * 1000 + i
        case = draw(kind, random.Random(f"{name} {seed}"), i)
        print(f"start {i} {case}", flush=True)
        fine, text = check(kind, case, seed)
        bad += not fine
        print(f"{'done' if fine else 'WRONG'} {i} {text}", flush=True)
    return bad


def needed(kinds: dict[str, Kind]) -> set[Any]:
    """The binaries that the kinds' cases take, as far as their flags do not depend on what is drawn."""
    from fastattn.backends.triton.hopper.launch import flags
    from fastattn.call import Problem

    found = set()
    for name, kind in kinds.items():
        for i in range(COUNT):
            case = draw(kind, random.Random(f"{name} {i}"), i)
            what = case["mask"][0] if case["mask"] else ""
            mask = "additive" if what in _KEYS else "segments" if what in _SEGMENTS else "intervals" if what else "none"
            shape: tuple[int, ...] = (1, 1, 1, 1) if what in _KEYS else (5, 1) if what in _SEGMENTS else ()
            mask_dtype = hopper_masks.ROWS.get(what)
            if mask_dtype:
                mask, shape = "bool" if mask_dtype == torch.bool else "additive", (1, 1, *case["sizes"][3:])
            for dim, value_dim in kind.dims:
                batch, kv_heads, group, q_len, kv_len = case["sizes"]
                problem = Problem(
                    "cuda", 0, (9, 0), kind.dtype, batch, kv_heads * group, kv_heads, q_len, kv_len, dim, value_dim,
                    mask, shape, mask_dtype, case["left"], case["right"], case["softcap"], kind.sinks is not None,
                    kind.q_lengths, kind.kv_lengths, kind.lse, "",
                )  # fmt: skip
                found.add(flags(problem, kind.sinks))
                if mask == "segments":  # how many is drawn
                    found |= {flags(replace(problem, mask_shape=(5, n)), kind.sinks) for n in (1, 1 << 20)}
    return found


def compile_all(wanted: Collection[Any]) -> None:
    """Compiles binaries side by side, and keeps them on the disk."""
    from fastattn.backends.triton.binaries.store import shared

    start = time.monotonic()
    for flags, why in shared.make_all(wanted):
        if why:
            print(f"{flags}: {why}", flush=True)
    print(f"compiled {int(shared.stats()['compiles'])} binaries in {time.monotonic() - start:.0f} s", flush=True)


def supervise(name: str, count: int, program: str) -> tuple[int, list[str]]:
    """One kind in processes of its own, of this program or one like it. Returns the number of right
    cases, and a line for each other one."""
    start, right, wrong, running = 0, 0, [], ""
    while start < count:
        command = [sys.executable, program, name, str(count), str(start)]
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        lines: queue.Queue[str | None] = queue.Queue()

        def read(child: Any = child, lines: Any = lines) -> None:
            for line in child.stdout:
                lines.put(line.rstrip())
            lines.put(None)

        threading.Thread(target=read, daemon=True).start()
        last: list[str] = []
        at = start
        while True:
            try:
                line = lines.get(timeout=LIMIT)
            except queue.Empty:
                child.kill()
                wrong.append(f"{name} HANGS: {running}")
                break
            if line is None:
                if child.wait() and not (last and last[-1].startswith(("done", "WRONG"))):
                    wrong.append(f"{name} DIES: {running}: {' | '.join(last[-4:])}")
                break
            last.append(line)
            if line.startswith("start "):
                running, at = line, int(line.split()[1]) + 1
            elif line.startswith("done "):
                right += 1
            elif line.startswith("WRONG "):
                wrong.append(f"{name} {line}: {running}")
        done = child.poll() == 0 or (last and last[-1].startswith(("done", "WRONG")) and at == count)
        start = count if done else max(at, start + 1)
    return right, wrong


def run_all(kinds: Collection[str], supervise: Callable[[str, int], tuple[int, list[str]]], path: str | None) -> int:
    """All kinds, several at a time. path: of the summary. Returns the exit status."""
    bad: list[str] = []
    found: dict[str, Any] = {}

    def run(name: str) -> None:
        if sum("HANGS" in line for line in bad) > 4:
            print(f"{name}: left out, too many hang")
            found[name] = None
            return
        begun = time.monotonic()
        right, wrong = supervise(name, COUNT)
        bad.extend(wrong)
        took = time.monotonic() - begun
        found[name] = {"right": right, "of": COUNT, "seconds": round(took, 1), "wrong": wrong}
        print(f"{name}: {right} of {COUNT} right, {took:.0f} s", *wrong, sep="\n  ", flush=True)

    with ThreadPoolExecutor(AT_A_TIME) as pool:
        list(pool.map(run, kinds))
    right, of = (sum(x[what] for x in found.values() if x) for what in ("right", "of"))
    print(f"{right} of {of} cases of {len(kinds)} kinds right, {len(bad)} wrong")
    if path:
        about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "right": right, "of": of}
        Path(path).write_text(json.dumps(about | {"kinds": found}, indent=1) + "\n")
    return min(len(bad), 1)


def main(
    about: str | None,
    program: str,
    kinds: Mapping[str, _K],
    needed: Callable[[dict[str, _K]], Collection[Any]],
    run_kind: Callable[[str, int, int], int],
) -> int:
    """What the command line of a program like this one asks for. about, program: its docstring and file."""
    os.environ.setdefault("FASTATTN_COMPILE", "wait")
    if len(sys.argv) > 1 and not sys.argv[1].startswith("-"):
        count, start = (int(x) for x in (*sys.argv[2:], *(COUNT, 0)[len(sys.argv) - 2 :]))
        return min(run_kind(sys.argv[1], count, start), 1)
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--only", default="", metavar="PREFIX,...")
    arguments = parser.parse_args()
    wanted = {name: kind for name, kind in kinds.items() if name.startswith(tuple(arguments.only.split(",")))}
    torch.cuda.init()
    compile_all(needed(wanted))
    return run_all(wanted, partial(supervise, program=program), arguments.json)


def child(program: str, name: str, count: int, seed: int) -> subprocess.CompletedProcess[str]:
    """For tests: cases of one kind in a process of their own, that can be stopped: a kernel that waits for ever cannot
    be stopped from inside. program: name of this file, or of one like it, without its ending."""
    command = [sys.executable, str(Path(__file__).with_name(f"{program}.py")), name, str(count)]
    environment = os.environ | {"FASTATTN_TEST_SEED": str(seed % 1000)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or the reference would not be deterministic
    from fastattn.backends.triton.hopper import segments

    segments.LEAST_QUERIES = 0  # short segments have tiles of their own, too: the kind "mask-intervals" has the bounds
    sys.exit(main(__doc__, __file__, KINDS, needed, run_kind))
