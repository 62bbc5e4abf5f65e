"""The first attention calls of a process, timed: `python -m benchmarks.first_call NAME DEVICE LENGTH`.

NAME is fastattn or torch-cudnn. Prints one line of JSON: the milliseconds of the first causal forward without
gradients, of the first forward and backward, and of both once more. What is not attention is done before: CUDA, cuBLAS,
random inputs.
"""

from __future__ import annotations

import json
import sys

import torch

from fastattn.bench import timing
from fastattn.bench.case import Case
from fastattn.bench.implementations import IMPLEMENTATIONS
from fastattn.bench.inputs import make_inputs, with_gradients


def main(name: str, device_name: str, case: Case) -> dict[str, float]:
    """Milliseconds by what was done."""
    device, implementation = torch.device(device_name), IMPLEMENTATIONS[name]
    a = torch.randn(64, 64, dtype=torch.bfloat16, device=device)
    (a @ a).sum().item()
    (x,) = make_inputs(case, device, torch.Generator(device).manual_seed(0), 1)
    leaves = with_gradients(x)

    def forward() -> None:
        with implementation.active():
            implementation.bind(case, x)()

    def both() -> None:
        with implementation.active(gradients=True):
            out = implementation.bind(case, leaves)()
            torch.autograd.grad(out, (leaves.q, leaves.k, leaves.v), x.grad_out)

    steps = {"forward": forward, "forward and backward": both}
    steps |= {f"{step}, again": call for step, call in steps.items()}
    return {step: timing.once(call, device)[1] for step, call in steps.items()}


if __name__ == "__main__":
    length = int(sys.argv[3])
    print(json.dumps(main(sys.argv[1], sys.argv[2], Case(length, length))))
