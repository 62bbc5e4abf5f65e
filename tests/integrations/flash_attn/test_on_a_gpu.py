"""flash-attn's functions on a GPU against themselves in float64 on the CPU, which other tests compare with loops."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import relative_error
from torch import Tensor

from fastattn.flash import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

pytestmark = pytest.mark.gpu
BF16 = torch.bfloat16


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def on_the_cpu(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    found = x.detach().cpu()
    return (found.double() if found.is_floating_point() else found).requires_grad_(x.requires_grad)


SLOPES = torch.tensor([0.5, 0.25, 0.1, 0.01])
OPTIONS: list[dict[str, Any]] = [
    {"causal": True},
    {"window_size": (63, 0)},
    {"causal": True, "alibi_slopes": SLOPES},
    {"alibi_slopes": SLOPES},
    {"softcap": 5.0, "causal": True},
    {"causal": True, "deterministic": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options))
@pytest.mark.parametrize("kind", ["dense", "varlen"])
def test_in_bfloat16(kind: str, options: dict[str, Any]) -> None:
    function: Any = flash_attn_func
    shapes, lengths = [(2, 150, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64)], []
    if kind == "varlen":
        function, shapes = flash_attn_varlen_func, [(300, 4, 64), (400, 2, 64), (400, 2, 64)]
        lengths = [ints(0, 100, 300).cuda(), ints(0, 150, 400).cuda(), 200, 250]
    leaves = [torch.randn(shape, device="cuda").to(BF16).requires_grad_() for shape in shapes]
    options = {name: x.cuda() if isinstance(x, Tensor) else x for name, x in options.items()}
    out = function(*leaves, *lengths, **options)
    exact = [on_the_cpu(x) for x in leaves]
    want = function(*exact, *map(on_the_cpu, lengths), **{name: on_the_cpu(x) for name, x in options.items()})
    assert relative_error(out.cpu(), want) < 4e-3
    upstream = torch.randn_like(out)
    got, right = (torch.autograd.grad(x, inputs, up) for x, inputs, up in (
        (out, leaves, upstream), (want, exact, on_the_cpu(upstream))))  # fmt: skip
    for g, r in zip(got, right):
        assert relative_error(g.cpu(), r) < 1e-2


@pytest.mark.parametrize("options", [{}, {"rotary": True}, {"alibi_slopes": SLOPES}, {"pages": 16}], ids=str)
def test_one_graph_serves_every_length(options: dict[str, Any]) -> None:
    """A captured step, replayed as the rows grow."""
    options, device = dict(options), "cuda"
    lengths = ints(17, 40).to(device)
    shape = (8, 16, 2, 64) if "pages" in options else (2, 64, 2, 64)
    caches = [torch.randn(shape, device=device).to(BF16) for _ in "kv"]
    if options.pop("pages", None):
        options["block_table"] = torch.arange(8, dtype=torch.int32, device=device).reshape(2, 4)
    if options.pop("rotary", None):
        options |= {name: torch.randn(64, 16, device=device).to(BF16) for name in ("rotary_cos", "rotary_sin")}
    options = {name: x.to(device) for name, x in options.items()}
    step = [torch.empty(2, 1, heads, 64, device=device, dtype=BF16) for heads in (4, 2, 2)]
    exact = [on_the_cpu(x) for x in caches]

    def run() -> Tensor:
        return flash_attn_with_kvcache(step[0], *caches, *step[1:], cache_seqlens=lengths, causal=True, **options)

    for x in step:
        x.normal_()
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for _ in range(5):
        for x in step:
            x.normal_()
        graph.replay()
        now, more = on_the_cpu(lengths), {name: on_the_cpu(x) for name, x in options.items()}
        q, k, v = map(on_the_cpu, step)
        want = flash_attn_with_kvcache(q, *exact, k, v, cache_seqlens=now, causal=True, **more)
        assert relative_error(out.cpu(), want) < 1e-2
        for cache, right in zip(caches, exact):
            torch.testing.assert_close(cache.cpu().double(), right, rtol=1e-2, atol=1e-2)
            right.copy_(cache.cpu())  # the same rounding from here on
        lengths += 1
