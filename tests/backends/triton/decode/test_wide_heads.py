"""Head dims that are no powers of two or above 256, groups of many heads, and values that are the keys' first columns.

On the CPU through Triton's interpreter, on a GPU natively. The truth is `naive.attention` in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import naive
import pytest
import torch
from cases import BF16, FP16, FP32, FP64, TOLERANCE, Case, a_problem, check, lse_error, relative_error
from torch import Tensor

import fastattn
from fastattn import Intervals
from fastattn.backends.triton.binaries.triton_kernel import NamedKernel
from fastattn.backends.triton.decode import launch_config as launch
from fastattn.backends.triton.decode.forward import DecodeKernel
from fastattn.backends.triton.representative import representative

pytestmark = pytest.mark.usefixtures("poison")

DIMS = ((72, 72), (80, 80), (96, 96), (192, 128), (320, 256), (512, 512), (576, 512))
#: Several steps of 16 keys and several splits; 8 rows to a tile, lengths that are multiples of nothing.
CASE = Case(batch=2, q_heads=4, kv_heads=1, q_len=2, kv_len=75, dtype=FP32, return_lse=True)
FEATURES = {
    "plain": CASE,
    "causal": CASE.but(mask="causal", dtype=FP16),
    "lengths": CASE.but(mask="causal", kv_lengths=(33, 0), q_lengths=(1, 2), sinks=FP32),
    "window": CASE.but(window=(20, 3), q_len=4, kv_lengths=(60, 75)),
    "intervals": CASE.but(mask="intervals:bq", q_len=4),
    "intervals-shared": CASE.but(mask="intervals:b1", dtype=FP16, sinks=BF16),
    "bool": CASE.but(mask="bool:b1qk", keep=0.3),
    "everything": CASE.but(
        mask="additive:b1qk", mask_dtype=FP64, window=(50, 1), kv_lengths=(75, 40), sinks=FP32, softcap=4.0, scale=0.3
    ),
}


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dims: tuple[int, int], device: str, force: Callable[..., None]) -> None:
    """Without splits where the index is even, with more than there are steps for the shortest rows where it is odd."""
    force(splits=1 + 2 * ((list(FEATURES).index(name) + DIMS.index(dims)) % 2), block_n=16)
    check(FEATURES[name].but(head_dim=dims[0], value_dim=dims[1]), "decode", device)


@pytest.mark.parametrize("columns", [32, 128, 512])
@pytest.mark.parametrize("splits", [2, 20])
@pytest.mark.parametrize("name", ["plain", "causal", "lengths", "window", "intervals", "intervals-shared"])
def test_as_few_rows_are_launched(
    name: str, splits: int, columns: int, device: str, force: Callable[..., None]
) -> None:
    """q with the keys of each step, scores in two parts, and the kernel that reads 128, 32 or 8 splits at once. Of 20
    there are 5 with work at the most; what the others leave is whatever the memory held."""
    force(splits=splits, block_n=16, head=(256, 256), columns=columns)
    check(FEATURES[name].but(head_dim=512, value_dim=512), "decode", device)


@pytest.mark.parametrize("splits", [9, 13, 20])
def test_more_splits_with_work_than_are_read_at_once(splits: int, device: str, force: Callable[..., None]) -> None:
    """13 at the most, 8 at once: what the first ones left counts less when a greater score comes."""
    force(splits=splits, block_n=16, columns=512)
    check(FEATURES["plain"].but(head_dim=512, value_dim=512, kv_len=200), "decode", device)


def test_late_queries_of_two_parts(device: str, force: Callable[..., None]) -> None:
    force(splits=3, block_n=16, columns=64)
    check(FEATURES["lengths"].but(head_dim=576, value_dim=320), "decode", device)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_rows_that_see_none_of_a_split_s_keys(value: float, device: str, force: Callable[..., None]) -> None:
    """What is hidden from them alone is not theirs, in whichever split."""
    force(splits=5, block_n=16, head=(256, 256), columns=128)
    q, k, v = (torch.randn(1, heads, n, 512, device=device).to(FP16) for heads, n in ((4, 2), (1, 75), (1, 75)))
    lengths = torch.tensor([60], dtype=torch.int32, device=device)
    k[..., 60:, :] = v[..., 60:, :] = value
    out = fastattn.scaled_dot_product_attention(q, k, v, mask="causal", kv_lengths=lengths, backend="decode")
    want = naive.attention(q.double(), k[..., :60, :].double(), v[..., :60, :].double(), mask="causal")
    assert relative_error(out, want.out) < TOLERANCE[FP16][0]


@pytest.mark.parametrize("dims", [(512, 512), (576, 512), (320, 256)], ids=str)
@pytest.mark.parametrize("name", ["lengths", "intervals", "everything"])
def test_as_the_rules_launch(name: str, dims: tuple[int, int], device: str) -> None:
    check(FEATURES[name].but(head_dim=dims[0], value_dim=dims[1], kv_len=130), "decode", device)


@pytest.mark.parametrize("layout", ["bhsd", "bshd", "sliced", "cache", "expanded", "strided", "misaligned", "dmajor"])
def test_layouts(layout: str, device: str) -> None:
    check(CASE.but(layout=layout, head_dim=320, value_dim=192, dtype=FP16, kv_heads=2), "decode", device)


MANY_HEADS = CASE.but(batch=1, q_heads=70, head_dim=64, mask="causal", kv_len=50)  #: 140 rows to a K/V head
GROUPS = {
    "blocks": MANY_HEADS,
    "lengths": MANY_HEADS.but(batch=2, q_len=1, kv_lengths=(0, 41), q_lengths=(1, 1), sinks=FP32),
    "heads": MANY_HEADS.but(q_heads=132, kv_heads=2, q_len=1),
    "intervals": MANY_HEADS.but(mask="intervals:bq", q_heads=66),
    "wide": MANY_HEADS.but(head_dim=512, q_heads=6, kv_heads=2, q_len=7, window=(13, 0)),
    "wide-half": MANY_HEADS.but(head_dim=512, q_heads=36, q_len=1, dtype=FP16),
    "wide-many-queries": MANY_HEADS.but(head_dim=264, q_heads=4, q_len=30, softcap=5.0),  # blocks without splits
}


@pytest.mark.parametrize("splits", [1, 3])
@pytest.mark.parametrize("name", GROUPS)
def test_blocks_of_rows(name: str, splits: int, device: str, force: Callable[..., None]) -> None:
    """More heads than a tile has rows, and more rows than a tile of wide heads has."""
    force(splits=1 if name == "wide-many-queries" else splits, block_n=16)
    check(GROUPS[name], "decode", device)


@pytest.mark.parametrize("name", ["plain", "everything"])
def test_tiles_of_64_rows(name: str, device: str, force: Callable[..., None]) -> None:
    """Of wide heads only Hopper takes them."""
    force(splits=2, block_n=16, block_m=64, near=True)
    check(
        FEATURES[name].but(head_dim=576, value_dim=512, q_heads=33, dtype=FP16, kv_len=40, kv_lengths=None),
        "decode",
        device,
    )


# Values that are the keys' first columns.

SHAPE = (2, 1, 40, 576)  #: of the keys
LATENTS: dict[str, Callable[[Callable[..., Tensor]], Tensor]] = {
    "own": lambda fill: fill(*SHAPE),
    "cache": lambda fill: fill(2, 1, 100, 576)[:, :, :40],
    "pages": lambda fill: fill(3, 45, 1, 640)[1:, 5:, :, :576].transpose(1, 2),  # a piece of a larger buffer
    "row": lambda fill: fill(1, 40, 576).unsqueeze(1).expand(*SHAPE),
    "odd": lambda fill: fill(2, 1, 40, 577)[..., :576],  # rows that do not begin at 16 bytes
    "strided": lambda fill: fill(2, 1, 40, 1152)[..., ::2],  # copied, and then two tensors
}


@pytest.fixture
def kinds(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of the kernel whether it took the values from the keys."""
    pytest.importorskip("triton")
    from fastattn.backends.triton.decode.forward import DecodeKernel

    found: list[bool] = []
    forward = DecodeKernel.forward

    def spy(self, call):
        found.append(self.same)
        return forward(self, call)

    monkeypatch.setattr(DecodeKernel, "forward", spy)
    return found


def filled(device: str) -> Callable[..., Tensor]:
    return lambda *shape: torch.randn(shape, device=device).to(FP16)


def compare(q: Tensor, k: Tensor, v: Tensor, **options) -> Tensor:
    """The output of decode; it and the log-sum-exp are those of the truth, in which NaN in k and v is 0."""
    out, lse = fastattn.scaled_dot_product_attention(q, k, v, **options, return_lse=True, backend="decode")
    clean = [x.double().nan_to_num(nan=0.0) for x in (q, k, v)]
    want = naive.attention(*clean, **options)
    assert relative_error(out, want.out) < TOLERANCE[q.dtype][0]
    assert lse_error(lse, want.lse) < 1e-3
    return out


@pytest.mark.parametrize("heads", [5, 35])
@pytest.mark.parametrize("layout", LATENTS)
def test_values_in_keys(layout: str, heads: int, device: str, kinds: list[bool], force: Callable[..., None]) -> None:
    force(splits=3 if heads == 5 else 1, block_n=16)
    k = LATENTS[layout](filled(device))
    compare(filled(device)(2, heads, 1, 576), k, k[..., :512], scale=0.05)
    assert kinds == [layout != "strided"]


@pytest.mark.parametrize("name", ["lengths", "intervals", "window", "bool", "softcap"])
def test_values_in_keys_with_features(name: str, device: str, kinds: list[bool]) -> None:
    """And NaN in what lengths and intervals exclude."""
    k, q = LATENTS["cache"](filled(device)), filled(device)(2, 9, 2, 576)

    def integers(*numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=device)

    hidden = torch.zeros(2, 40, dtype=torch.bool, device=device)
    options = {"scale": 0.05, "mask": "causal"}
    if name == "lengths":
        options |= {"kv_lengths": integers(30, 0), "sinks": torch.randn(9, device=device)}
        hidden[0, 30:], hidden[1] = True, True
    elif name == "intervals":  # one for each query, and a gap between them
        lo, hi = integers(5, 22).expand(2, 2).contiguous(), integers(9, 31).expand(2, 2).contiguous()
        options["mask"] = Intervals(lo, hi)
        hidden[:, :5], hidden[:, 9:22], hidden[:, 31:] = True, True, True
    elif name == "window":
        options |= {"window": (20, 0)}
        hidden[:, :18] = True
    elif name == "bool":
        options["mask"] = torch.rand(2, 1, 2, 40, device=device) < 0.4
    else:
        options["softcap"] = 3.0
    k.masked_fill_(hidden[:, None, :, None], torch.nan)
    compare(q, k, k[..., :512], **options)
    assert kinds == [True]


@pytest.mark.parametrize("dims", [(192, 128), (128, 128), (192, 192), (320, 256)], ids=str)
def test_other_dims_with_values_in_keys(dims: tuple[int, int], device: str, kinds: list[bool]) -> None:
    k = filled(device)(2, 2, 40, dims[0])
    compare(filled(device)(2, 6, 1, dims[0]), k, k[..., : dims[1]], mask="causal")
    assert kinds == [True]


def test_the_next_call_may_be_another(device: str, kinds: list[bool]) -> None:
    """Calls of one kind, of which some hold the values in the keys and others beside them."""
    q, k, other = filled(device)(2, 3, 1, 576), *(filled(device)(*SHAPE) for _ in range(2))
    first = compare(q, k, k[..., :512])
    second = compare(q, k, other[..., :512])
    compare(q, other, other[..., :512])
    compare(q, other, k[..., :512])
    assert kinds == [True, False, True, False]
    assert relative_error(second, first) > 0.1


def test_values_elsewhere_in_the_keys(device: str, kinds: list[bool]) -> None:
    """Not the first columns, other tokens, another batch: two tensors."""
    q, k = filled(device)(2, 3, 1, 576), filled(device)(2, 1, 80, 576)
    compare(q, k, k[..., 64:])  # as many strides, another address
    compare(q, k[:, :, ::2], k[:, :, :40, :512])  # the same address, other strides
    compare(q, k[:1].expand(2, -1, -1, -1), k[..., :512])
    compare(q, k[:, :, 1:], k[:, :, :-1, :512])
    assert kinds == [False] * 4


def test_float32_reads_both(device: str, kinds: list[bool]) -> None:
    k = torch.randn(SHAPE, device=device)
    compare(torch.randn(2, 9, 1, 576, device=device), k, k[..., :512])
    assert kinds == [False]


# How they are launched.

MLA = {"q_heads": 128, "kv_heads": 1, "head_dim": 576, "value_dim": 512}


def test_splits_of_absorbed_mla() -> None:
    """A split of 128 rows leaves as much to combine as several steps read: two steps each here. All SMs are used."""
    chosen = launch.choose(a_problem(**MLA, kv_len=4096), 132, 227 << 10, True)
    assert (chosen.block_m, chosen.block_n, chosen.near, chosen.splits) == (64, 64, True, 32)
    assert launch.choose(a_problem(**MLA, kv_len=4096, batch=64), 132, 227 << 10, True).splits == 1
    assert launch.choose(a_problem(**MLA, kv_len=1 << 17), 132, 227 << 10, True).splits == 64  # 66 would take no less


def test_splits_of_wide_heads() -> None:
    """Few rows leave little: every SM reads."""
    chosen = launch.choose(a_problem(q_heads=8, kv_heads=1, head_dim=512, value_dim=512, kv_len=8192), 132)
    assert chosen.splits == 128  # two steps of 32 keys each: 132 would take no less
    assert launch.choose(a_problem(**MLA, q_len=300, softcap=1.0, kv_len=8192), 132).splits == 1


GLOBAL = {"q_heads": 8, "kv_heads": 1, "head_dim": 512, "value_dim": 512}  #: as the global layers of Gemma 4


def test_few_rows_of_wide_heads_overlap() -> None:
    for heads, batch, columns in (((8, 1), 1, 32), ((16, 2), 1, 32), ((32, 4), 1, 32), ((8, 1), 8, 128)):
        p = a_problem(**GLOBAL | {"q_heads": heads[0], "kv_heads": heads[1]}, batch=batch)
        found = launch.choose(p, 132)
        assert (found.block_m, found.block_n, found.stages, found.warps, found.head) == (16, 32, 3, 4, (256, 256))
        assert found.meanwhile and found.columns == columns
    assert launch.choose(a_problem(**GLOBAL), 132, None, True).head == (512, 0), "the values are whole, and the keys'"
    assert launch.choose(a_problem(**MLA | {"q_heads": 8}), 132).warps == 8, "four would spill"


@pytest.mark.parametrize(
    "changes",
    [
        {"capability": (8, 0)},
        {"capability": (10, 0)},
        {"dtype": FP32},
        {"q_heads": 32},
        {"mask": "bool", "mask_shape": (1, 1, 1, 8192), "mask_dtype": torch.bool},
    ],
    ids=["8.0", "10.0", "float32", "32 rows", "gaps"],
)
def test_others_do_not(changes: dict[str, Any]) -> None:
    found = launch.choose(a_problem(**GLOBAL | changes), 132)
    assert not (found.meanwhile or found.columns) and found.warps == 8


def test_what_may_start_meanwhile_waits() -> None:
    """Both kernels, where there are two."""
    call = representative(a_problem(**GLOBAL))
    for batch in (1, 200):
        p = a_problem(**GLOBAL, batch=batch)
        found = launch.choose(p, 132)
        kernel = DecodeKernel(p, call, found)
        first, *others = (x.flags(tensors, floats) for x, tensors, floats in kernel.launches(call))
        names = NamedKernel(*first.kernel.rpartition(":")[::2]).load().arg_names
        constants = {names[i]: value for i, value in first.constants}
        assert (found.splits > 1) == bool(others) == (batch == 1)
        assert constants["MEANWHILE"] and all(dict(x.options)["launch_pdl"] for x in (first, *others))


@pytest.mark.parametrize("same", [False, True])
def test_a_growing_cache_needs_no_other_kernel(same: bool) -> None:
    for capability in ((9, 0), (8, 0), (8, 6), (10, 0)):
        for batch in (1, 20, 40, 100):
            compiled = set()
            for length in (*range(1, 200), 500, 2000, 4095, 4096, 5000, 10**5):
                problem = a_problem(**MLA, kv_len=length, batch=batch, capability=capability)
                found = launch.choose(problem, 132, None, same)
                compiled.add((found.splits > 1, found.block_m, found.block_n, found.warps, found.stages, found.columns))
            assert len(compiled) == 1, (capability, batch)


def test_the_device_says_how_much_shared_memory_there_is() -> None:
    problem = a_problem(**MLA, capability=(8, 0))
    keys = [launch.choose(problem, 108, kib << 10).block_n for kib in (99, 163)]
    assert keys[0] <= keys[1]
    held = [launch.choose(problem, 108, kib << 10) for kib in (99, 227)]
    assert held[0] != held[1]


# Only natively: the sizes that are measured.


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, heads, length, dims", [(1, 8, 8192, (512, 512)), (1, 128, 4096, (576, 512)), (64, 128, 4096, (576, 512))]
)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_measured_sizes(batch: int, heads: int, length: int, dims: tuple[int, int], dtype: torch.dtype) -> None:
    """Of a large batch the first and the last entry are compared. What is past the lengths is NaN."""
    q, k = (torch.randn(batch, *x, device="cuda", dtype=dtype) for x in ((heads, 1, dims[0]), (1, length, dims[0])))
    v = k[..., : dims[1]] if dims[1] < dims[0] else torch.randn(batch, 1, length, dims[1], device="cuda", dtype=dtype)
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    for shorter in (0, 777):
        lengths[-1] = length - shorter
        k[-1, :, length - shorter :] = torch.nan
        v[-1, :, length - shorter :] = torch.nan
        out = fastattn.scaled_dot_product_attention(q, k, v, scale=0.04, kv_lengths=lengths, backend="decode")
        for entry, end in ((0, int(lengths[0])), (-1, length - shorter)):
            parts = q[entry], k[entry, :, :end], v[entry, :, :end]
            want = naive.attention(*(x[None].double() for x in parts), scale=0.04).out
            assert relative_error(out[entry], want[0]) < TOLERANCE[dtype][0]


@pytest.mark.gpu
def test_one_graph_serves_every_length_of_absorbed_mla(kinds: list[bool]) -> None:
    q, k = (
        torch.randn(3, 128, 1, 576, device="cuda", dtype=BF16),
        torch.randn(3, 1, 3000, 576, device="cuda", dtype=BF16),
    )
    lengths = torch.full((3,), 3000, dtype=torch.int32, device="cuda")

    def attend() -> Tensor:
        return fastattn.scaled_dot_product_attention(q, k, k[..., :512], kv_lengths=lengths, backend="decode")

    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    assert kinds == [True, True]
    for entries in ([1, 3000, 64], [0, 65, 2049], [3000] * 3):
        lengths.copy_(torch.tensor(entries, dtype=torch.int32))
        graph.replay()
        want = naive.attention(q.double(), k.double(), k[..., :512].double(), kv_lengths=lengths).out
        assert relative_error(out, want) < TOLERANCE[BF16][0]


@pytest.mark.gpu
@pytest.mark.parametrize("before", ["kernel", "copy", "fill", "join", "nothing"])
def test_a_captured_launch_waits_for_whatever_was_before(before: str) -> None:
    """The kernel may begin before what precedes it has ended, which writes what it reads; and the next call before this
    one has ended, whose splits' memory it takes."""
    q, k, v = (torch.randn(1, n, m, 512, device="cuda", dtype=BF16) for n, m in ((8, 1), (1, 8192), (1, 8192)))
    source, other = torch.randn_like(v), torch.cuda.Stream()

    def attend() -> list[Tensor]:
        found = []
        for _ in range(3):
            if before == "kernel":
                torch.add(source, 1, out=v)
            elif before == "copy":
                v.copy_(source)
            elif before == "fill":
                v.zero_()
            elif before == "join":
                other.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(other):
                    torch.mul(source, 2, out=v)
                torch.cuda.current_stream().wait_stream(other)
            found.append(fastattn.scaled_dot_product_attention(q, k, v, backend="decode"))
            v.mul_(0 if before != "nothing" else 1)
        return found

    first = v.clone()
    attend()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = attend()
    values = {"kernel": source + 1, "copy": source, "fill": source * 0, "join": source * 2, "nothing": first}[before]
    want = naive.attention(q.double(), k.double(), values.double()).out
    for _ in range(20):
        v.copy_(first)
        graph.replay()
        eager = attend() if before != "nothing" else []
        for out in (*captured, *eager):
            if before == "fill":
                assert not out.any()
            else:
                assert relative_error(out, want) < TOLERANCE[BF16][0]
