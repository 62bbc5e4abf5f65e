"""Calls drawn at random, with the memory layouts of their tensors."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from cases import BF16, FP16, FP32, FP64, LAYOUTS, Case, Inputs, Watcher, make, run
from features import BROADCASTS
from hypothesis import strategies as st
from torch import Tensor

import fastattn
from fastattn import reference

LONGEST = 300
DTYPES = (BF16, FP16, FP32, FP64)

#: Layouts in which several elements share memory: x -> a tensor of its shape, with some of its elements.
SHARED: dict[str, Callable[[Tensor], Tensor]] = {
    "one entry": lambda x: x[:1].expand_as(x),
    "one head": lambda x: x[:, :1].expand_as(x),
    "one token": lambda x: x[:, :, :1].expand_as(x),
    "one element": lambda x: x[:1, :1, :1, :1].expand_as(x),
    "overlapping": lambda x: _memory(x).unfold(2, x.shape[3], 1),  # each token begins one element after the last one
}
#: Layouts in which no elements share memory. (`cases` has "expanded", which `SHARED` calls "one entry".)
OWN = {name: layout for name, layout in LAYOUTS.items() if name != "expanded"} | {
    "shifted": lambda s, fill: fill(math.prod(s) + 1)[1:].view(s),  # packed, at no address that is a multiple of 16
}
#: Layouts of a mask tensor.
MASK_LAYOUTS = ("packed", "expanded", "key-major", "gaps")
#: Entries of a call: the function; torch's dispatcher, as in a compiled model; a list of allowed backends.
ENTRIES = ("alone", "operator", "list")


@dataclass(frozen=True)
class Drawn:
    """One problem. Its repr is Python: paste it where a counterexample is to be kept."""

    case: Case
    layouts: tuple[str, str, str] = ("bhsd", "bhsd", "bhsd")  #: of q, k, v: of `OWN` or `SHARED`
    mask_layout: str = "packed"
    entry: str = "alone"
    chunk: int = 1 << 21  #: scores that the reference holds at a time
    seed: int = 0  #: of the data


def inputs_of(drawn: Drawn, device: str = "cpu", seed: int | None = None) -> Inputs:
    """The problem's tensors, with NaN in all that no query sees and in the memory around the tensors."""
    case = drawn.case
    found = make(case.but(layout="bhsd", grads=""), device, drawn.seed if seed is None else seed)
    tensors, clean = [], []
    for x, whole, layout in zip((found.q, found.k, found.v), found.clean, drawn.layouts, strict=True):
        if layout in SHARED:  # an element that one query must not see another one may: no NaN
            x = SHARED[layout](whole) if x.numel() else x
            whole = x.clone()
        else:
            placed = OWN[layout](x.shape, lambda *s: torch.full(s, torch.nan, dtype=case.dtype, device=device))
            x = placed.copy_(x)
        tensors.append(x)
        clean.append(whole)
    options = dict(found.options)
    if isinstance(options["mask"], Tensor):
        options["mask"] = _mask_laid(options["mask"], drawn)
    q, k, v = tensors
    leaves = {
        name: x.requires_grad_()
        for name, x in zip("qkvms", (q, k, v, options["mask"], options["sinks"]), strict=True)
        if name in case.grads
    }
    return dataclasses.replace(found, q=q, k=k, v=v, clean=tuple(clean), options=options, leaves=leaves)


def another(drawn: Drawn) -> Drawn:
    """The same kind of call with other data: all that could be cached of the first call is wrong for it."""
    case = drawn.case
    turned = {
        name: None if lengths is None else tuple((n + 3) % (most + 1) for n in reversed(lengths))
        for name, lengths, most in (
            ("q_lengths", case.q_lengths, case.q_len),
            ("kv_lengths", case.kv_lengths, case.kv_len),
        )
    }
    return dataclasses.replace(drawn, case=case.but(scale=0.37, keep=0.5, **turned), seed=drawn.seed ^ 1)


def results(drawn: Drawn, inputs: Inputs, backend: str) -> dict[str, Tensor]:
    """A backend's results for the problem, by the entry that was drawn."""
    with _chunks(drawn.chunk):
        if drawn.entry == "operator":
            with Watcher() as watcher:
                found = run(inputs, backend)
            assert "fastattn.attention.default" in watcher.seen
            return found
        if drawn.entry == "list":
            with fastattn.use_backend(backend, *(name for name in ("reference", "torch") if name != backend)):
                before = fastattn.stats()["calls"].get(backend, 0)
                found = run(inputs)
                assert fastattn.stats()["calls"][backend] == before + 1
            return found
        return run(inputs, backend)


@contextmanager
def _chunks(size: int) -> Iterator[None]:
    kept = dict(reference.CHUNK_ELEMENTS)
    reference.CHUNK_ELEMENTS.update(dict.fromkeys(kept, size))
    try:
        yield
    finally:
        reference.CHUNK_ELEMENTS.update(kept)


def _memory(x: Tensor) -> Tensor:
    batch, heads, length, dim = x.shape
    return x.reshape(batch, heads, length * dim)[..., : length + dim - 1].clone()


def _mask_laid(mask: Tensor, drawn: Drawn) -> Tensor:
    c = drawn.case
    if drawn.mask_layout == "expanded":
        return mask.expand(c.batch, c.q_heads, c.q_len, c.kv_len)
    if drawn.mask_layout == "key-major" and mask.dim() > 1:
        return mask.mT.contiguous().mT
    if drawn.mask_layout == "gaps" and mask.dim():
        around = torch.full((*mask.shape, 2), True if mask.dtype == torch.bool else torch.nan, dtype=mask.dtype)
        return around.to(mask.device)[..., 0].copy_(mask)
    return mask


def lengths(least: int, longest: int) -> st.SearchStrategy[int]:
    """Mostly short: long ones add time more than they add kinds of calls."""
    short = st.integers(least, min(40, longest))
    return st.one_of(short, short, short, short, st.integers(least, longest))


@st.composite
def problems(
    draw: st.DrawFn, longest: int = LONGEST, gradients: bool = True, rows: int | None = None, least: int = 0
) -> Drawn:
    """Any call at all.

    least: of lengths and batch entries.
    rows: queries times query heads per K/V head at the most, for a backend that takes so few; nothing else that it
        refuses is drawn then.
    """

    def rarely(strategy: st.SearchStrategy[Any]) -> Any:
        """Mostly None: with every feature in every call, only the reference would accept any."""
        return draw(strategy) if draw(st.integers(0, 3)) == 3 else None

    batch = draw(st.sampled_from([1, 2, 3] if least else [1, 2, 3, 0]))
    kv_heads, group = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    kv_len = draw(lengths(least, longest))
    # Mostly square or one query: random pairs of lengths would rarely be either.
    q_len = draw(st.just(kv_len) | st.just(1) | lengths(least, longest))
    dims = st.sampled_from([8, 16, 40, 33, 3, 1])
    if rows is not None:
        q_len, dims = min(q_len, rows // group), st.sampled_from([8, 16, 40, 64, 72, 264])
        kv_len = draw(st.just(kv_len) | lengths(least, longest))
    floats = st.sampled_from(DTYPES)
    kinds = st.sampled_from(["bool", "additive", "finfo"])
    square = ["2", "2c", "3", "3c"] * (q_len == kv_len)
    mask = draw(
        st.sampled_from(["none", "causal"])
        | st.builds("{}:{}".format, kinds, st.sampled_from(BROADCASTS))
        | st.builds("intervals:{}".format, st.sampled_from(["bq", "b1", "1q", "11"]))
        | st.builds("segments:{}".format, st.sampled_from(["p", "pc", "4c", "5", "5c", *square]))
    )
    takes_lengths = not mask.startswith("segments")  # segments have lengths of their own
    side = st.integers(-1, max(q_len, kv_len) + 5)
    case = Case(
        batch=batch,
        q_heads=kv_heads * group,
        kv_heads=kv_heads,
        q_len=q_len,
        kv_len=kv_len,
        head_dim=draw(dims),
        value_dim=rarely(st.sampled_from([8, 24, 1] if rows is None else [8, 24])),
        dtype=draw(floats if rows is None else st.sampled_from([BF16, FP16, FP32])),
        mask=mask,
        # float64's finfo.min is -inf in float32, and float16's is so small that it only blurs the scores it is added to
        mask_dtype=draw(st.sampled_from([BF16, FP32])) if mask.startswith("finfo") else rarely(floats),
        keep=draw(st.sampled_from([0.7, 0.1, 1.0, 0.0])),
        sinks=rarely(floats),
        window=rarely(st.tuples(side, side)),
        softcap=rarely(st.sampled_from([0.5, 3.0, 50.0])),
        scale=rarely(st.sampled_from([0.0, 0.01, 0.2, -0.1])),
        q_lengths=rarely(st.tuples(*[st.integers(-2, q_len + 2)] * batch)) if takes_lengths else None,
        kv_lengths=rarely(st.tuples(*[st.integers(-2, kv_len + 2)] * batch)) if takes_lengths else None,
        return_lse=draw(st.integers(0, 3)) == 3,
    )
    wanted = draw(st.sets(st.sampled_from("qkv")) | st.sets(st.sampled_from(case.leaves))) if gradients else set()
    layout = st.sampled_from([*OWN]) | st.sampled_from([*SHARED])
    return Drawn(
        case.but(grads="".join(name for name in case.leaves if name in wanted)),
        layouts=(draw(layout), draw(layout), draw(layout)),
        mask_layout=draw(st.sampled_from(MASK_LAYOUTS)),
        entry=draw(st.sampled_from(ENTRIES)),
        chunk=draw(st.sampled_from([1 << 21, 1 << 21, 700, 1])),
        seed=draw(st.integers(0, 2**31)),
    )
