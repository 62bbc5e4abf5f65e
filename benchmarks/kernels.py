"""The kernels of the forward calls of `fastattn sweep users`, one by one; needs a GPU.

    python -m benchmarks.kernels [ROW ...] [--backend NAME] [--json FILE]

ROW: words of the names of rows; without any those under a tensor mask with a row for each query. Of each kernel the
median in microseconds over many calls in a row, by torch's profiler; "call" is one call in a CUDA graph, hot, so that
the gaps between its kernels are what is missing in their sum.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

import fastattn
from fastattn.bench import output
from fastattn.bench.users.rows import chosen

from .command import captured, end, parser_of, write
from .forward import ROWS
from .turns import best, kernel_times

MASKED = ["ALiBi", "causal as", "prefix", "T5", "Swin"]
CALLS = 30


def kernels_of(call: Callable[[], Any]) -> dict[str, float]:
    """Microseconds of each kernel of a call that has run before, and of the call."""

    def work() -> None:
        for _ in range(CALLS):
            call()

    found = {name: round(statistics.median(times), 1) for name, times in kernel_times(work).items()}
    return found | {"call": best(captured(call))}


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = parser_of("kernels", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW")
    parser.add_argument("--backend", help="of fastattn (default: as calls are routed)")
    arguments = parser.parse_args(argv)
    output.check([arguments.json])
    if not torch.cuda.is_available():
        print("kernels: needs a GPU, torch sees none", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for row in chosen(arguments.rows or MASKED, ROWS):
        (x,) = row.tensors(torch.device("cuda"))
        options = row.ours(x) | ({"backend": arguments.backend} if arguments.backend else {})

        def call(x: Any = x, options: Any = options) -> Any:
            return fastattn.scaled_dot_product_attention(x.q, x.k, x.v, **options)

        with torch.inference_mode():
            call()
            found[row.name] = kernels_of(call)
        print(f"{row.name:24} {found[row.name]}", flush=True)
    write(arguments.json, "kernels", argv, torch.device("cuda"), {"benchmark": "kernels", "unit": "us", "rows": found})
    return 0


if __name__ == "__main__":
    end(main)
