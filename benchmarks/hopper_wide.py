"""The Hopper forward for wide heads: its results, and its times beside the portable kernels; needs an H100 or H200.

    python -m benchmarks.hopper_wide [--json FILE] [--only TEXT,...] [--check | --time]

First each case of `CASES` three times, against attention in float32: the error's norm over the result's, and whether
the runs agree in every bit. Then the times of `ROWS`, medians in microseconds of GPU work in CUDA graphs: "cold" with
the L2 cache flushed before each call, "hot" over many calls in a row. Beside them those of the decode kernel and the
prefill kernel, and of torch where it has one. Takes a minute: rows that would begin later are left out, with a line.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from fastattn.backends.triton.binaries.flag_set import FlagSet
from fastattn.backends.triton.binaries.policy import waiting
from fastattn.bench import output
from fastattn.call import Call, Problem

from .command import end, parser_of, write
from .turns import FLUSHED, measure

BUDGET = 55.0  #: seconds
DEVICE = "cuda"
WORST = {"bf16": 4e-3, "fp16": 1e-3}
#: Batch, query heads, K/V heads, queries, keys, head dim, value dim (0: the keys' first 512 columns), what else.
Sizes = tuple[int, int, int, int, int, int, int]
CASES: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "causal": ((1, 8, 1, 300, 300, 512, 512), {"right": 0}),
    "full": ((2, 4, 2, 100, 700, 512, 512), {}),
    "causal, 2048": ((1, 8, 1, 2048, 2048, 512, 512), {"right": 0}),
    "chunk": ((2, 16, 2, 200, 1500, 512, 512), {"right": 0}),
    "more queries than keys": ((1, 8, 1, 500, 130, 512, 512), {"right": 0}),
    "window": ((1, 8, 2, 700, 900, 512, 512), {"left": 200, "right": 0}),
    "one head a group": ((1, 3, 3, 300, 300, 512, 512), {"right": 0, "lse": True}),
    "six heads a group": ((1, 12, 2, 200, 300, 512, 512), {"lse": True}),
    "lengths": ((5, 8, 1, 300, 800, 512, 512), {"right": 0, "lengths": True, "lse": True}),
    "everything": (
        (3, 8, 2, 200, 600, 512, 512),
        {"left": 300, "right": 5, "lengths": True, "softcap": 30.0, "sinks": True, "lse": True, "dtype": "fp16"},
    ),
    "padded": ((1, 8, 1, 400, 500, 264, 320), {"right": 0}),
    "narrow values": ((1, 8, 1, 400, 500, 512, 64), {"lse": True}),
    "narrow keys": ((1, 8, 1, 400, 500, 128, 512), {"right": 0}),
    "head-major": ((2, 8, 1, 300, 400, 512, 512), {"right": 0, "head_major": True}),
    "decode": ((1, 128, 1, 1, 4096, 576, 0), {"lse": True}),
    "decode, batch": ((32, 128, 1, 1, 4096, 576, 0), {}),
    "decode, 64 heads": ((7, 64, 1, 1, 1234, 576, 0), {"lse": True}),
    "decode, lengths": ((20, 128, 1, 1, 3000, 576, 0), {"lengths": True, "lse": True, "sinks": True}),
    "decode, four queries": ((4, 128, 1, 4, 2000, 576, 0), {"right": 0, "lse": True}),
    "MLA chunk": ((1, 128, 1, 150, 700, 576, 0), {"right": 0}),
    "MLA, values apart": ((2, 128, 1, 2, 900, 576, 512), {"right": 0, "lse": True}),
    "MLA, fp16": ((2, 16, 1, 64, 900, 576, 0), {"right": 0, "dtype": "fp16"}),
}
ROWS: dict[str, tuple[Sizes, dict[str, Any]]] = {
    "Gemma 4 causal 2048": ((1, 8, 1, 2048, 2048, 512, 512), {"right": 0}),
    "Gemma 4 causal 8192": ((1, 8, 1, 8192, 8192, 512, 512), {"right": 0}),
    "Gemma 4 full 2048": ((1, 8, 1, 2048, 2048, 512, 512), {}),
    "MLA decode 1x4096": ((1, 128, 1, 1, 4096, 576, 0), {}),
    "MLA decode 8x4096": ((8, 128, 1, 1, 4096, 576, 0), {}),
    "MLA decode 32x4096": ((32, 128, 1, 1, 4096, 576, 0), {}),
    "MLA decode 64x4096": ((64, 128, 1, 1, 4096, 576, 0), {}),
    "MLA chunk 512/4096": ((1, 128, 1, 512, 4096, 576, 0), {"right": 0}),
    "Gemma 4 chunk 512/8192": ((1, 8, 1, 512, 8192, 512, 512), {"right": 0}),
    "Gemma 4 causal 512": ((1, 8, 1, 512, 512, 512, 512), {"right": 0}),
    "Gemma 4 causal 32768": ((1, 8, 1, 32768, 32768, 512, 512), {"right": 0}),
}
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status: 1 where a result is wrong."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("hopper_wide", __doc__)
    parser.add_argument("--only", default="", metavar="TEXT,...", help="what has one of these in its name")
    parser.add_argument("--check", action="store_true", help="no times")
    parser.add_argument("--time", action="store_true", help="no results")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
        print("hopper_wide: needs a GPU of compute capability 9.0, torch sees none", file=sys.stderr)
        return 2
    begun = time.monotonic()
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = False
    cases, rows = (
        {name: x for name, x in every.items() if any(text in name for text in arguments.only.split(","))}
        for every in ({} if arguments.time else CASES, {} if arguments.check else ROWS)
    )
    compile_all([*cases.values(), *rows.values()])
    print(f"binaries after {time.monotonic() - begun:.0f} s", flush=True)
    with waiting():
        return _run(cases, rows, begun, arguments.json, argv)


def _run(cases: Any, rows: Any, begun: float, path: str | None, argv: Sequence[str]) -> int:
    found: dict[str, Any] = {"benchmark": "hopper wide", "unit": "us", "cases": {}, "rows": {}}
    wrong = 0
    try:
        for name, (sizes, what) in cases.items():
            error, equal = checked(sizes, what)
            right = error < WORST[what.get("dtype", "bf16")] and equal
            wrong += not right
            found["cases"][name] = {"error": error, "equal": equal}
            print(f"{name:24}{error:.1e}{'' if equal else '  runs differ'}{'' if right else '  WRONG'}", flush=True)
        flush = torch.empty(FLUSHED, dtype=torch.uint8, device=DEVICE)
        for name, (sizes, what) in rows.items():
            if time.monotonic() - begun > BUDGET:
                print(f"{name:24} left out: no time")
                continue
            runs = runs_of(call_of(sizes, what))
            row = found["rows"][name] = measure(runs, flush, 5, ("wide",))
            rate = operations(sizes, what) / 1e6
            cells = [f"{peer} {times['hot']:.1f} ({rate / times['hot']:.0f})" for peer, times in row.items()]
            print(f"{name:24}" + "  ".join(cells), f" cold {row['wide']['cold']:.1f}", flush=True)
            del runs
    finally:  # what there is, should a row fail
        write(path, "hopper_wide", argv, torch.device(DEVICE), found)
    print(f"{wrong} wrong; {time.monotonic() - begun:.0f} s")
    return int(wrong > 0)


def call_of(sizes: Sizes, what: dict[str, Any]) -> Call:
    """A call on the GPU; what lengths exclude is NaN."""
    batch, heads, kv_heads, q_len, kv_len, dim, value_dim = sizes
    dtype = _DTYPES[what.get("dtype", "bf16")]

    def random(n: int, length: int, columns: int) -> torch.Tensor:
        if what.get("head_major"):
            return torch.randn(batch, n, length, columns, device=DEVICE, dtype=dtype)
        return torch.randn(batch, length, n, columns, device=DEVICE, dtype=dtype).transpose(1, 2)

    q, k = random(heads, q_len, dim), random(kv_heads, kv_len, dim)
    v = random(kv_heads, kv_len, value_dim) if value_dim else k[..., :512]
    lengths: dict[str, Any] = {}
    if what.get("lengths"):
        for name, most, tensors in ("q_lengths", q_len, (q,)), ("kv_lengths", kv_len, (k, v)):
            lengths[name] = torch.randint(0, most + 1, (batch,), dtype=torch.int32, device=DEVICE)
            beyond = torch.arange(most, device=DEVICE)[None] >= lengths[name][:, None]
            for x in tensors:
                x.masked_fill_(beyond[:, None, :, None], torch.nan)
    return Call(
        q, k, v, sinks=torch.randn(heads, device=DEVICE, dtype=dtype) if what.get("sinks") else None,
        scale=dim**-0.5, left=what.get("left", -1), right=what.get("right", -1), softcap=what.get("softcap", 0.0),
        return_lse=what.get("lse", False), **lengths,
    )  # fmt: skip


def compile_all(wanted: Sequence[tuple[Sizes, dict[str, Any]]]) -> None:
    """All binaries, side by side."""
    from fastattn.backends.triton.binaries.launcher import flag_sets
    from fastattn.backends.triton.binaries.store import shared
    from fastattn.backends.triton.decode import DecodeBackend
    from fastattn.backends.triton.hopper_wide import launch
    from fastattn.backends.triton.hopper_wide.schedule import grid_of
    from fastattn.backends.triton.limits import sm_count
    from fastattn.backends.triton.prefill import PrefillBackend

    sets: set[FlagSet] = set()
    for sizes, what in wanted:
        call = call_of(sizes, what)
        p, same = Problem.of(call), not sizes[6]
        split = grid_of(p, sm_count(p.index), same).splits > 1
        sets.add(launch.flags(p, split, same, None if call.sinks is None else call.sinks.dtype))
        if split:
            sets.update(flag_sets([launch.second(p, 2, torch.device("meta"))]))
        if (sizes, what) in ROWS.values():
            for backend in (DecodeBackend(), PrefillBackend()):
                if not backend.reasons(p):
                    sets.update(backend.binaries(p)[:2])
    for flag_set, why in shared.make_all(sets, torch.cuda.current_device()):
        if why:
            raise RuntimeError(f"{flag_set}: {why}")


def wide(call: Call) -> Callable[[Call], Any]:
    """The kernel, bound to calls like this one."""
    from fastattn.backends.triton.hopper_wide import launch

    return launch.bind(Problem.of(call), call).forward


def runs_of(call: Call) -> dict[str, Callable[[], Any]]:
    """The kernel and its peers."""
    from torch.nn.functional import scaled_dot_product_attention as sdpa

    from fastattn.backends.triton.decode import DecodeBackend
    from fastattn.backends.triton.prefill import PrefillBackend

    p = Problem.of(call)
    runs: dict[str, Callable[[], Any]] = {"wide": partial(wide(call), call)}
    for name, backend in ("decode", DecodeBackend()), ("prefill", PrefillBackend()):
        if not backend.reasons(p):
            runs[name] = partial(backend.bind(p, call).forward, call)
    if p.q_len == p.kv_len <= 8192:
        causal = call.right == 0
        runs["torch"] = partial(sdpa, call.q, call.k, call.v, is_causal=causal, scale=call.scale, enable_gqa=True)
    return runs


def operations(sizes: Sizes, what: dict[str, Any]) -> float:
    """Of both products, in all visible scores."""
    batch, heads, _, q_len, kv_len, dim, value_dim = sizes
    hidden = q_len * (q_len - 1) / 2 if what.get("right") == 0 else 0
    return 2.0 * batch * heads * (q_len * kv_len - hidden) * (dim + (value_dim or 512))


def checked(sizes: Sizes, what: dict[str, Any]) -> tuple[float, bool]:
    """The largest relative error of output and log-sum-exp, and whether three runs agree in every bit."""
    call = call_of(sizes, what)
    run = wide(call)
    results = [run(call) for _ in range(3)]
    torch.cuda.synchronize()
    expected = reference(call)
    found = results[0]
    errors = [relative(found[0].float(), expected[0])]
    if call.return_lse:
        assert found[1] is not None
        seen = ~expected[1].isinf()
        same = torch.equal(found[1].isinf(), expected[1].isinf())
        errors.append(relative(found[1][seen], expected[1][seen]) if same else float("inf"))
    equal = all(torch.equal(one[0], found[0]) for one in results[1:])
    return max(errors), equal


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the error over that of what is expected; infinite where there is NaN."""
    error = float((found - expected).norm() / expected.norm().clamp(min=1e-20))
    return error if error == error else float("inf")


def reference(call: Call) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in float32, one batch entry at a time."""
    outs, lses = [], []
    group = call.q.shape[1] // call.k.shape[1]
    for b in range(call.q.shape[0]):
        q_len = int(call.q_lengths[b]) if call.q_lengths is not None else call.q.shape[2]
        kv_len = int(call.kv_lengths[b]) if call.kv_lengths is not None else call.k.shape[2]
        q, k, v = call.q[b, :, :q_len].float(), call.k[b, :, :kv_len].float(), call.v[b, :, :kv_len].float()
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        s = q @ k.transpose(1, 2) * call.scale
        if call.softcap:
            s = call.softcap * torch.tanh(s / call.softcap)
        at = torch.arange(q_len, device=DEVICE)[:, None] + kv_len - q_len
        j = torch.arange(kv_len, device=DEVICE)[None]
        if call.left >= 0:
            s = s.masked_fill(j < at - call.left, -torch.inf)
        if call.right >= 0:
            s = s.masked_fill(j > at + call.right, -torch.inf)
        if call.sinks is not None:
            s = torch.cat([call.sinks.float()[:, None, None].expand(-1, q_len, 1), s], -1)
        lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:2], -torch.inf)
        p = (s - torch.where(lse.isinf(), 0.0, lse)[..., None]).exp()
        out = p[..., int(call.sinks is not None) :] @ v
        rest = call.q.shape[2] - q_len
        empty = -torch.inf if call.sinks is None else call.sinks.float()[:, None].expand(-1, rest)
        filler = out.new_zeros(out.shape[0], rest) + empty
        outs.append(torch.cat([out, out.new_zeros(out.shape[0], rest, out.shape[2])], 1))
        lses.append(torch.cat([lse, filler], 1))
    return torch.stack(outs), torch.stack(lses)


if __name__ == "__main__":
    end(main)
