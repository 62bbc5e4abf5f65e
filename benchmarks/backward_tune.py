"""Which tiles the passes of the portable backward are quickest with: `python -m benchmarks.backward --tune`.

Every candidate fits the registers (compiled for SM 9.0, its inner loops hold few spilled ones, or none) and the shared
memory. All are compiled first, side by side; then each is timed, hot, as a whole backward with the other passes as
`launch_config` lists them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor

from fastattn.call import Call, Problem

from .row_commands import tuned
from .torchs_backward import Run

#: The rows that are tuned where none is named: one of each kind that `launch_config` tells apart.
ROWS = (
    "ALiBi full 2048",
    "T5 bias B8 512",
    "Swin B1024 49",
    "BERT padding B32 384",
    "ALiBi keys 2048",
    "fp32 2048",
    "256 2048",
)
_Numbers = tuple[int, int, int, int]  #: queries, keys, warps, stages
_STAGES = [(64, 64, 4, stages) for stages in (1, 2, 3)]

#: By bytes of an element and the larger dim, up to which they are; for each pass. "rows": of the passes over keys and
#: over queries under a mask with rows, whose tile is the same.
CANDIDATES: dict[tuple[int, int], dict[str, Sequence[_Numbers]]] = {
    (2, 64): {
        "keys": [*_STAGES, (64, 128, 8, 1), (64, 128, 8, 2), (64, 128, 8, 3), (128, 64, 4, 2), (32, 64, 4, 2),
                 (32, 128, 8, 2), (32, 128, 8, 3)],
        "queries": [*_STAGES, (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (64, 128, 4, 1), (64, 128, 4, 2),
                    (128, 128, 8, 2), (64, 32, 4, 3)],
        "rows": [*_STAGES, (32, 64, 4, 2), (64, 32, 4, 2), (64, 128, 8, 2), (128, 64, 8, 2), (128, 128, 8, 1),
                 (128, 128, 8, 2)],
        "bias": [*_STAGES, (64, 64, 8, 1), (64, 64, 8, 2), (128, 64, 8, 2), (64, 128, 8, 2), (128, 64, 4, 2)],
    },
    (2, 128): {
        "keys": [*_STAGES, (64, 128, 8, 1), (64, 128, 8, 2), (32, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 2),
                 (32, 128, 8, 3)],
        "queries": [*_STAGES, (128, 64, 8, 1), (128, 64, 8, 2), (128, 64, 8, 3), (64, 32, 4, 2), (64, 32, 4, 3),
                    (128, 32, 8, 3), (128, 128, 8, 1)],
        "rows": [*_STAGES, (32, 64, 4, 2), (32, 64, 4, 3), (64, 32, 4, 2), (64, 128, 8, 1), (64, 128, 8, 2)],
        "bias": [*_STAGES, (64, 64, 8, 1), (64, 64, 8, 2), (128, 64, 8, 1)],
    },
    (2, 256): {
        "keys": [(32, 64, 8, 1), (32, 64, 8, 2), (64, 64, 8, 1), (32, 32, 4, 2), (32, 128, 8, 1), (16, 64, 8, 2)],
        "queries": [(64, 32, 4, 1), (64, 32, 4, 2), (64, 32, 8, 2), (128, 32, 8, 1), (128, 64, 8, 1), (64, 64, 4, 1)],
        "rows": [(32, 64, 8, 1), (32, 64, 8, 2), (32, 32, 4, 2), (64, 32, 4, 1)],
        "bias": [(64, 32, 8, 1), (64, 32, 4, 1), (32, 64, 4, 1), (64, 64, 8, 1)],
    },
    (4, 128): {
        "keys": [(32, 128, 8, 1), (64, 64, 4, 1), (32, 64, 4, 1), (16, 128, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1)],
        "queries": [(128, 32, 8, 1), (64, 64, 4, 1), (64, 32, 4, 1), (64, 32, 4, 2), (32, 32, 4, 1), (64, 64, 8, 1)],
        "rows": [(64, 64, 4, 1), (64, 64, 8, 1), (32, 64, 4, 1), (32, 32, 4, 1)],
        "bias": [(64, 64, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1)],
    },
}  # fmt: skip


@dataclass(frozen=True)
class Found:
    """Of one pass: hot microseconds of a backward by the pass's numbers, the quickest first, and what is listed."""

    kind: str  #: which table of `launch_config` it is in, and where
    times: dict[str, float]
    listed: str

    def line(self) -> str:
        """The best, what is listed beside it, and the next ones."""
        if not self.times:
            return f"{self.kind}: none ran"
        (name, us), *others = self.times.items()
        own = self.times.get(self.listed)
        beside = "not timed" if own is None else f"{own:.0f} us, {own / us:.3f}"
        then = ", ".join(f"{x} {y / us:.2f}" for x, y in others[:3])
        return f"{self.kind}: best ({name}) {us:.0f} us; listed ({self.listed}) {beside}; then {then}"


def tune(call: Call, upstream: tuple[Tensor, Tensor, Tensor]) -> dict[str, Found]:
    """What is found of each pass of a call's backward. upstream: out, lse, grad_out."""
    from fastattn.backends.triton.backward import backward, launch_config
    from fastattn.backends.triton.backward.sizes import Walk
    from fastattn.backends.triton.binaries import store
    from fastattn.backends.triton.binaries.launcher import flag_sets
    from fastattn.backends.triton.representative import representative

    p, (out, lse, grad_out) = Problem.of(call), upstream
    listed, width = launch_config.choose(p), max(p.head_dim, p.value_dim)
    size = next((x for x in CANDIDATES if x[0] == p.dtype.itemsize and width <= x[1]), None)
    if size is None:
        return {}
    grids = CANDIDATES[size]
    whole = "m" in p.grads and Walk.of(p, listed).whole
    passes = ["bias"] if "m" in p.grads else []
    if not whole:
        passes = ["keys and queries", "keys", "queries", *passes] if p.masked_rows else ["keys", "queries", *passes]

    def bound(one: Any) -> Run:
        return partial(backward.bind(p, call, one).backward, call, out, lse, grad_out, None)

    def launches(name: str) -> dict[str, Any]:
        def with_tile(numbers: Iterable[int], exact: str = listed.exact) -> Any:
            return replace(listed, exact=exact, **dict.fromkeys(name.split(" and "), launch_config.Tile(*numbers)))

        own = astuple(getattr(listed, name.split(" ")[0]))
        if p.masked_rows and name in ("keys", "queries"):  # the blocks of both are the same
            tiles: list[Any] = [(*own[:2], *x) for x in product((4, 8), (1, 2, 3))]
        else:
            tiles = list(grids["rows" if name == "keys and queries" else name])
        found = {_text(numbers): with_tile(numbers) for numbers in dict.fromkeys([own, *tiles])}
        if p.dtype == torch.float32:
            found |= {f"{_text(x)} tf32x3": with_tile(x, "tf32x3") for x in (own, *tiles[-2:])}
        return found

    dim = next(n for n in (64, 128, 256, 512) if width <= n)
    table = ("_HALF" if p.dtype.itemsize == 2 else "_FLOAT") + "_MASKED" * p.masked_rows
    tried = {name: launches(name) for name in passes}
    stands = representative(p)
    every = [one for own in tried.values() for one in own.values()]
    kernels = [backward.BackwardKernel(p, stands, one) for one in dict.fromkeys(every)]
    needed = dict.fromkeys(flags for kernel in kernels for flags in flag_sets(kernel.launches(stands)))
    for flags, why in store.shared.make_all(needed, call.q.device.index):
        if why:
            print(f"{str(flags)[:90]}: {why[:140]}", file=sys.stderr)
    found = {}
    for name, own in tried.items():
        times = tuned((key, partial(bound, one)) for key, one in own.items())
        kind = f"{table}[{dim}] {name}" + " whole" * whole
        found[name] = Found(kind, times, _text(astuple(getattr(listed, name.split(" ")[0]))))
    return found


def _text(numbers: Iterable[Any]) -> str:
    return " ".join(map(str, numbers))
