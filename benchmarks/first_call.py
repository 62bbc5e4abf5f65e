"""The first attention calls of a process, timed: `python -m benchmarks.first_call NAME DEVICE LENGTH`.

NAME is fastattn or torch-cudnn. Prints one line of JSON: the milliseconds of the first causal forward without
gradients, of the first forward and backward, and of both once more. What is not attention is done before: CUDA, cuBLAS,
random inputs.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any


def main(name: str, device_name: str, length: int, heads: tuple[int, int, int] = (32, 8, 128)) -> dict[str, float]:
    """Milliseconds by what was done."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention as torch_attention

    device = torch.device(device_name)
    q_heads, kv_heads, dim = heads

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    x = normal(64, 64)
    (x @ x).sum().item()
    q, k, v = (normal(1, length, n, dim).transpose(1, 2) for n in (q_heads, kv_heads, kv_heads))
    grad = normal(1, length, q_heads, dim).transpose(1, 2)
    leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]

    import fastattn

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        if name == "fastattn":
            return fastattn.scaled_dot_product_attention(q, k, v, mask="causal")
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return torch_attention(q, k, v, is_causal=True, enable_gqa=True)

    def forward() -> None:
        with torch.no_grad():
            attend(q, k, v)

    def both() -> None:
        torch.autograd.grad(attend(*leaves), leaves, grad)

    def milliseconds(call: Callable[[], None]) -> float:
        synchronize()
        begin = time.perf_counter()
        call()
        synchronize()
        return (time.perf_counter() - begin) * 1e3

    steps = {"forward": forward, "forward and backward": both}
    steps |= {f"{step}, again": call for step, call in steps.items()}
    return {step: milliseconds(call) for step, call in steps.items()}


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
