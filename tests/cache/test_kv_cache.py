"""`KVCache` against attention over all tokens so far, recorded in lists."""

from __future__ import annotations

import os
import random
from typing import Any

import naive
import pytest
import torch
from torch import Tensor

from fastattn import KVCache, debug

HEADS, GROUP, DIM, VALUE_DIM = 2, 2, 8, 16
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


class History:
    """The expected content of a cache: for each row the keys and values of its tokens, `[Hkv, D]` each."""

    def __init__(self, layers: int, batch: int) -> None:
        self.rows: list[list[list[tuple[Tensor, Tensor]]]] = [[[] for _ in range(layers)] for _ in range(batch)]

    def attention(self, row: int, layer: int, q: Tensor, window: int | None, sinks: Tensor | None) -> Tensor:
        """q: `[Hq, n, D]`, the row's last n tokens."""
        k, v = (torch.stack(x, 1)[None].double() for x in zip(*self.rows[row][layer], strict=True))
        left = -1 if window is None else window - 1
        return naive.attention(q[None].double(), k, v, mask="causal", window=(left, -1), sinks=sinks).out[0]


def make(windows: Any = None, capacity: int | None = 40, batch: int = 3, layers: int = 2, **more: Any) -> KVCache:
    options = {"kv_heads": HEADS, "head_dim": DIM, "value_dim": VALUE_DIM, "dtype": torch.float32, "device": "cpu"}
    return KVCache(layers=layers, batch=batch, capacity=capacity, windows=windows, **(options | more))


def step(cache: KVCache, history: History, tokens: int, counts: list[int] | None = None, check: bool = True) -> None:
    """One step with random tokens; every result is compared."""
    device = cache.device
    given = None if counts is None else torch.tensor(counts, dtype=torch.int32, device=device)
    before = cache.lengths.tolist()
    positions = cache.step(tokens, given)
    assert positions.tolist() == [[n + i for i in range(tokens)] for n in before]
    taken = [tokens] * cache.batch if counts is None else [min(max(n, 0), tokens) for n in counts]
    sinks = torch.randn(HEADS * GROUP, device=device)
    for layer in range(cache.layers):
        q = torch.randn(cache.batch, HEADS * GROUP, tokens, DIM, device=device)
        k = torch.randn(cache.batch, tokens, HEADS, DIM, device=device).transpose(1, 2)
        v = torch.randn(cache.batch, HEADS, tokens, VALUE_DIM, device=device)
        for row, n in enumerate(taken):  # what a row does not get may hold anything
            k[row, :, n:] = v[row, :, n:] = torch.nan
        out = cache.attend(layer, q, k, v, sinks=sinks)
        assert out.shape == (cache.batch, HEADS * GROUP, tokens, VALUE_DIM)
        for row, n in enumerate(taken):
            history.rows[row][layer] += [(k[row, :, i], v[row, :, i]) for i in range(n)]
            assert bool((out[row, :, n:] == 0).all())
            if check and n:
                want = history.attention(row, layer, q[row, :, :n], cache.windows[layer], sinks)
                torch.testing.assert_close(out[row, :, :n].double(), want, rtol=2e-4, atol=2e-4)
    assert cache.lengths.tolist() == [len(row[0]) for row in history.rows]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("windows", [None, 5, [None, 7], [1, None], 30], ids=str)
@pytest.mark.parametrize("capacity", [40, None])
def test_steps_of_any_size(device: str, windows: Any, capacity: int | None) -> None:
    cache, history = make(windows, capacity, device=device), History(2, 3)
    for tokens in (9, 1, 1, 4, 1, 12, 1, 1):
        step(cache, history, tokens)


@pytest.mark.parametrize("windows", [None, 5, [None, 3]], ids=str)
def test_rows_of_different_lengths(windows: Any) -> None:
    cache, history, rng = make(windows, 64), History(2, 3), random.Random(3)
    step(cache, history, 10, [10, 3, 0])
    for _ in range(8):
        tokens = rng.choice([1, 1, 2, 6])
        step(cache, history, tokens, [rng.randint(0, tokens) for _ in range(3)])
    step(cache, history, 1)
    step(cache, history, 3)
    step(cache, history, 2, [-4, 99, 1])


def test_a_cache_without_a_capacity_grows() -> None:
    cache, history = make(None, None, batch=1, layers=1), History(1, 1)
    step(cache, history, 250)
    assert cache.capacity == 256
    step(cache, history, 10)
    assert cache.capacity == 512 and cache.keys[0].shape[2] == 512
    step(cache, history, 1)
    assert cache.nbytes == 512 * HEADS * (DIM + VALUE_DIM) * 4


def test_a_ring_holds_its_window_and_no_more() -> None:
    cache, history = make(4, 8), History(2, 3)  # (a capacity does not bound layers that all have windows)
    assert cache.keys[0].shape[2] == 4
    for _ in range(3):
        step(cache, history, 7)
    for _ in range(6):
        step(cache, history, 1)


@pytest.mark.parametrize("windows", [None, 6], ids=str)
def test_reorder_add_and_reset_rows(windows: Any) -> None:
    cache, history = make(windows, 64), History(2, 3)
    step(cache, history, 9, [9, 4, 7])
    order = [2, 0, 2]
    cache.reorder(torch.tensor(order))
    history.rows = [[list(layer) for layer in history.rows[i]] for i in order]
    step(cache, history, 1)
    cache.reorder(torch.tensor([1], dtype=torch.int32))
    history.rows = [history.rows[1]]
    step(cache, history, 2)
    cache.add_rows(2)
    history.rows += [[[], []], [[], []]]
    step(cache, history, 3, [1, 3, 2])
    cache.reset(torch.tensor([0]))
    history.rows[0] = [[], []]
    step(cache, history, 4, [4, 0, 1])
    step(cache, history, 1)
    cache.reset()
    history.rows = [[[], []] for _ in range(3)]
    step(cache, history, 5)


def test_a_full_cache_raises_or_drops() -> None:
    cache, history = make(None, 10), History(2, 3)
    step(cache, history, 10)
    with pytest.raises(ValueError, match="tokens: the cache is full: 10 tokens of 10, 1 more do not fit"):
        cache.step(1)
    cache.reset()
    history = History(2, 3)
    step(cache, history, 8, [8, 2, 8])
    cache.step(4)  # only the device knows; what is too much is dropped
    assert cache.lengths.tolist() == [10, 6, 10]
    first = cache.keys[0][0].clone()
    new = torch.randn(3, HEADS, 4, DIM)
    cache.attend(0, torch.randn(3, HEADS * GROUP, 4, DIM), new, torch.randn(3, HEADS, 4, VALUE_DIM))
    assert torch.equal(cache.keys[0][0][:, :8], first[:, :8]), "what was there stays"
    assert torch.equal(cache.keys[0][0][:, 8:], new[0][:, :2])


def test_tokens_that_a_full_row_still_takes() -> None:
    """They see what they would in a cache with room; those that it drops give 0."""
    small, large = make(None, 10, layers=1), make(None, 20, layers=1)
    for tokens, counts in ((8, [8, 2, 9]), (4, None), (1, None)):
        q, k, v = (
            torch.randn(3, HEADS * GROUP, tokens, DIM),
            *(torch.randn(3, HEADS, tokens, n) for n in (DIM, VALUE_DIM)),
        )
        found = []
        for cache in (small, large):
            cache.step(tokens, None if counts is None else torch.tensor(counts, dtype=torch.int32))
            found.append(cache.attend(0, q, k, v))
        taken = small._lengths.counts
        for row, n in enumerate(taken.tolist()):
            torch.testing.assert_close(found[0][row, :, :n], found[1][row, :, :n])
            assert not found[0][row, :, n:].any()
    assert taken.tolist() == [0, 1, 0]


def test_a_full_row_raises_when_debugging(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = make(None, 10)
    cache.step(8, torch.tensor([8, 2, 8], dtype=torch.int32))
    monkeypatch.setattr(debug, "ENABLED", True)
    with pytest.raises(ValueError, match="tokens: a row of 12 tokens in a cache of 10"):
        cache.step(4)


@pytest.mark.parametrize(
    "options, text",
    [
        ({"layers": 0}, "layers: expected an int >= 1, got 0"),
        ({"batch": True}, "batch: expected an int >= 1, got True"),
        ({"capacity": -3}, "capacity: expected an int >= 1, got -3"),
        ({"windows": [3]}, "windows: expected 2, one per layer, got 1"),
        ({"windows": 0}, "windows: expected ints >= 1 or None, got 0"),
        ({"dtype": torch.int8}, "dtype: expected float16"),
    ],
)
def test_bad_settings(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=text):
        make(**options)


def test_bad_steps() -> None:
    cache = make()
    q, k, v = torch.randn(3, 4, 2, DIM), torch.randn(3, 2, 2, DIM), torch.randn(3, 2, 2, VALUE_DIM)
    for bad in (0, -1, True, 1.0):
        with pytest.raises(ValueError, match="tokens: expected an int >= 1"):
            cache.step(bad)
    for counts in (torch.ones(3), torch.ones(2, dtype=torch.int32)):
        with pytest.raises(ValueError, match="counts: expected"):
            cache.step(2, counts)
    cache.step(2)
    with pytest.raises(ValueError, match=r"layer: expected an int in 0\.\.1, got 2"):
        cache.attend(2, q, k, v)
    with pytest.raises(ValueError, match=r"q: expected \[3, Hq, 2, 8\] for this step, got \[3, 4, 1, 8\]"):
        cache.attend(0, q[:, :, :1], k, v)
    with pytest.raises(ValueError, match=r"v: expected \[3, 2, 2, 16\]"):
        cache.attend(0, q, k, k)
    with pytest.raises(TypeError, match=r"k: expected a torch\.Tensor, got list"):
        cache.attend(0, q, [k], v)
    with pytest.raises(ValueError, match="rows: expected int64 or int32"):
        cache.reorder(torch.tensor([0.0]))
    with pytest.raises(ValueError, match="count: expected an int >= 1"):
        cache.add_rows(0)


@pytest.mark.parametrize(
    "rows", [torch.tensor([-1]), torch.tensor([3]), torch.tensor([0, -3], dtype=torch.int32), torch.tensor([2, 2**40])]
)
def test_bad_row_indices_raise_and_change_nothing(rows: Tensor) -> None:
    cache = make()
    cache.step(4, torch.tensor([4, 2, 3], dtype=torch.int32))
    keys = [x.clone() for x in cache.keys]
    for change in (cache.reset, cache.reorder):
        with pytest.raises(ValueError, match=r"rows: expected indices in 0\.\.2, got "):
            change(rows)
        assert cache.lengths.tolist() == [4, 2, 3]
        assert all(torch.equal(a, b) for a, b in zip(keys, cache.keys, strict=True))


def test_reset_takes_rows_in_any_order() -> None:
    for rows in (torch.tensor([2, 0, 2]), torch.tensor([True, False, True]), torch.tensor([0, 2], dtype=torch.int32)):
        cache = make()
        cache.step(4, torch.tensor([4, 2, 3], dtype=torch.int32))
        cache.reset(rows)
        assert cache.lengths.tolist() == [0, 2, 0]
        cache.reset(torch.tensor([], dtype=torch.int64))
        assert cache.lengths.tolist() == [0, 2, 0]


@pytest.mark.gpu
def test_bad_row_indices_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are not read: nothing becomes of them in `reset`, `reorder` takes the nearest row. Debugging finds them."""
    cache = make(device="cuda")
    cache.step(4, torch.tensor([4, 2, 3], dtype=torch.int32, device="cuda"))
    rows, order = torch.tensor([-1, 0, 3], device="cuda"), torch.tensor([-5, 7, 1], device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        cache.reset(rows)
        lengths = cache.lengths.clone()
        cache.reorder(order)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lengths.tolist() == [0, 2, 3]
    assert cache.lengths.tolist() == [0, 3, 2]
    cache.reset(torch.tensor([1]))
    assert cache.lengths.tolist() == [0, 0, 2], "indices on the host will do"
    monkeypatch.setattr(debug, "ENABLED", True)
    for change in (cache.reset, cache.reorder):
        with pytest.raises(ValueError, match="rows: expected indices"):
            change(torch.tensor([-1], device="cuda"))


def test_default_device(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: Any = {"layers": 1, "batch": 1, "kv_heads": 1, "head_dim": 8}
    assert KVCache(**sizes).device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cache = KVCache(**sizes, dtype=torch.float32)
    assert cache.lengths.device.type == cache.keys[0].device.type == "cpu"
    cache.step(2)
    q = torch.randn(1, 1, 2, 8)
    assert bool(cache.attend(0, q, q, q).isfinite().all())
    for device in ("cuda", "cuda:0", torch.device("cuda", 5)):
        with pytest.raises(ValueError, match=r"device: got 'cuda.*torch sees 0 GPUs"):
            KVCache(**sizes, device=device)


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("new, dim, value_dim", [(1, 8, 8), (5, 24, 40), (70, 64, 128)])
@pytest.mark.parametrize("device", DEVICES)
def test_the_append_kernel_against_torch(device: str, ring: bool, new: int, dim: int, value_dim: int) -> None:
    if device == "cpu" and torch.cuda.is_available():
        pytest.skip("native on a GPU")
    os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))  # before triton is imported
    pytest.importorskip("triton")
    from fastattn.cache.append import append
    from fastattn.cache.host import append_on_the_host

    batch, capacity = 3, 16
    k = torch.randn(batch, new, HEADS, dim, device=device).transpose(1, 2)
    v = torch.randn(batch, HEADS, new + 3, value_dim, device=device)[:, :, 3:]
    counts = torch.tensor([new, 0, (new + 1) // 2], dtype=torch.int32, device=device)
    lengths = counts + torch.tensor([3, 9, 14], dtype=torch.int32, device=device)
    found = []
    for store in (append, append_on_the_host):
        keys, values = torch.zeros(batch, HEADS, capacity, dim), torch.zeros(batch, HEADS, capacity, value_dim)
        found.append((keys.to(device), values.to(device)))
        store(*found[-1], k, v, lengths, counts, ring)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert bool(found[0][0][0].any())


@pytest.mark.gpu
@pytest.mark.parametrize("windows", [None, 8], ids=str)
def test_one_graph_serves_every_length(windows: int | None) -> None:
    """A captured step, replayed as the rows grow, gives what steps that are not captured give."""
    caches = [make(windows, 512, device="cuda", dtype=torch.bfloat16, layers=1) for _ in range(2)]
    shapes = ((3, HEADS * GROUP, 1, DIM), (3, HEADS, 1, DIM), (3, HEADS, 1, VALUE_DIM))
    static = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in shapes]

    def one(cache: KVCache) -> Tensor:
        cache.step(1)
        return cache.attend(0, *static)

    for cache in caches:  # compiles, plans
        cache.step(5, torch.tensor([5, 2, 4], dtype=torch.int32, device="cuda"))
        x = [torch.ones(shape[0], shape[1], 5, shape[3], device="cuda", dtype=torch.bfloat16) for shape in shapes]
        cache.attend(0, *x)
        one(cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    lengths = caches[0].lengths.clone()
    with torch.cuda.graph(graph):
        out = one(caches[0])
    assert torch.equal(caches[0].lengths, lengths), "captured, not run"
    for _ in range(20):
        for x in static:
            x.normal_()
        graph.replay()
        want = one(caches[1])
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        torch.testing.assert_close(out, want)
