"""Whole attention calls as data: how to make one, the reference results, and how far results are from them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import naive
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import fastattn
from fastattn import Intervals, Segments
from fastattn.call import Problem

BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64


@dataclass(frozen=True)
class Case:
    """One call. The mask is "none", "causal" or "kind:shape".

    Kinds: "bool"; "additive" (a few -inf), "finfo" (additive; a few of the dtype's most negative number), "intervals".
    Shape: a letter for each dim, b, h, q, k in full, 1 broadcast: "b1qk", "qk", "" (0-d); for intervals "bq", "b1"...
    "segments:3", "segments:5": some of each batch entry's tokens in segments, queries and keys alike or apart;
    "segments:2", "segments:4": the same in the first batch entry alone, of which the table then says nothing;
    "segments:p": left padding. With a "c" behind: causal.
    """

    batch: int = 2
    q_heads: int = 4
    kv_heads: int = 2
    q_len: int = 9
    kv_len: int = 13
    head_dim: int = 16
    value_dim: int | None = None  #: None: head_dim
    dtype: torch.dtype = BF16
    layout: str = "bhsd"  #: of q, k, v, grad_out; see LAYOUTS
    mask: str = "none"
    mask_dtype: torch.dtype | None = None  #: of additive masks; None: dtype
    keep: float = 0.7  #: share of the keys that a tensor mask lets through
    sinks: torch.dtype | None = None
    window: tuple[int, int] | None = None
    softcap: float | None = None
    scale: float | None = None
    q_lengths: tuple[int, ...] | None = None
    kv_lengths: tuple[int, ...] | None = None
    return_lse: bool = False
    grads: str = ""  #: of which inputs, a subset of "qkvms"

    def __str__(self) -> str:
        """The fields that say anything, on one line."""
        p = self
        parts = [f"B{p.batch} H{p.q_heads}/{p.kv_heads} S{p.q_len}x{p.kv_len} D{p.head_dim}"]
        parts[0] += "" if p.value_dim is None else f"/{p.value_dim}"
        shown = ("batch", "q_heads", "kv_heads", "q_len", "kv_len", "head_dim", "value_dim")
        for f in dataclasses.fields(p):
            value = getattr(p, f.name)
            if f.name not in shown and (value != f.default or f.name == "dtype"):
                parts.append(f"{f.name}={value}".replace("torch.", ""))
        return " ".join(parts)

    def but(self, **changes: Any) -> Case:
        return dataclasses.replace(self, **changes)

    @property
    def mask_kind(self) -> str:
        kind = self.mask.partition(":")[0]
        return "additive" if kind == "finfo" else kind

    @property
    def leaves(self) -> str:
        """The inputs that can have a gradient at all."""
        return "qkv" + "m" * (self.mask_kind == "additive") + "s" * (self.sinks is not None)


@dataclass
class Inputs:
    """A case's tensors. Where lengths, Intervals or Segments hide a key or a query from everybody, q, k, v hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    clean: tuple[Tensor, Tensor, Tensor]  #: q, k, v, the poison replaced by numbers
    options: dict[str, Any]  #: the op's keyword arguments
    seen: Tensor  #: naive.visible of the call
    grad_out: Tensor
    grad_lse: Tensor
    leaves: dict[str, Tensor] = field(default_factory=dict)  #: "qkvms" -> the input, of those in case.grads


# Layouts: (shape, fill) -> a tensor [B,H,S,D] over memory that `fill(shape)` gives.
LAYOUTS: dict[str, Callable[[Any, Callable[..., Tensor]], Tensor]] = {
    "bhsd": lambda s, fill: fill(*s),
    "bshd": lambda s, fill: fill(s[0], s[2], s[1], s[3]).transpose(1, 2),
    # a piece of a bigger token-major buffer: the first tokens, heads and numbers of each head are somebody else's
    "sliced": lambda s, fill: fill(s[0], s[2] + 5, s[1] + 1, s[3] + 8)[:, 2 : 2 + s[2], 1:, 8:].transpose(1, 2),
    "cache": lambda s, fill: fill(s[0], s[1], 2 * s[2] + 3, s[3])[:, :, : s[2]],  # the filled part of a K/V cache
    "expanded": lambda s, fill: fill(1, s[1], s[2], s[3]).expand(*s),  # one batch entry in memory
    "strided": lambda s, fill: fill(s[0], s[1], s[2], 2 * s[3])[..., ::2],  # last stride 2
    "misaligned": lambda s, fill: fill(s[0], s[1], s[2], s[3] + 1)[..., 1:],  # no row starts at 16 bytes
    "dmajor": lambda s, fill: fill(s[0], s[1], s[3], s[2]).mT,
}


def make(case: Case, device: str | torch.device = "cpu", seed: int | None = None) -> Inputs:
    """Fresh random inputs: q, k, v and the upstream gradients standard normal, the memory around them NaN."""
    generator = torch.Generator(device).manual_seed(torch.initial_seed() if seed is None else seed)
    c, value_dim = case, case.head_dim if case.value_dim is None else case.value_dim

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    def nans(*shape: int) -> Tensor:
        return torch.full(shape, torch.nan, dtype=c.dtype, device=device)

    def tensor(length: int, heads: int, dim: int) -> Tensor:
        x = LAYOUTS[c.layout]((c.batch, heads, length, dim), nans)
        source = x[:1] if c.layout == "expanded" else x
        source.copy_(normal(*source.shape))
        return x

    q, k = tensor(c.q_len, c.q_heads, c.head_dim), tensor(c.kv_len, c.kv_heads, c.head_dim)
    v, grad_out = tensor(c.kv_len, c.kv_heads, value_dim), tensor(c.q_len, c.q_heads, value_dim)
    lengths = {name: getattr(c, name) for name in ("q_lengths", "kv_lengths")}
    options: dict[str, Any] = {
        "scale": c.scale,
        "mask": _mask(c, uniform, normal),
        "sinks": None if c.sinks is None else normal(c.q_heads).to(c.sinks),
        "window": c.window,
        "softcap": c.softcap,
        **{n: None if x is None else torch.tensor(x, dtype=torch.int32, device=device) for n, x in lengths.items()},
        "return_lse": c.return_lse,
    }
    clean = (q.clone(), k.clone(), v.clone())
    seen = naive.visible(q, k, **_masking(options))
    if c.layout != "expanded":  # one memory for all batch entries cannot be poisoned for one of them
        hidden = naive.visible(q, k, **(_masking(options) | {"window": None, "mask": _excluding(options["mask"])}))
        q.masked_fill_(~hidden.any(3, keepdim=True), torch.nan)
        keys = hidden.any(2)
        if keys.shape[1] > 1:
            keys = keys.unflatten(1, (c.kv_heads, -1)).any(2)
        k.masked_fill_(~keys[..., None], torch.nan)
        v.masked_fill_(~keys[..., None], torch.nan)
    inputs = Inputs(q, k, v, clean, options, seen, grad_out, normal(*q.shape[:3]))
    if c.mask.startswith("finfo"):
        # A row of nothing but finfo.min: the scores drown in it, and the log-sum-exp has no bits left for log(n), from
        # which kernels recompute the probabilities. Such rows are padding: nothing flows back into them.
        lost = ((options["mask"] == torch.finfo(options["mask"].dtype).min) | ~seen).all(-1)
        inputs.grad_out = inputs.grad_out.masked_fill(lost[..., None], 0.0)
        inputs.grad_lse.masked_fill_(lost, 0.0)
    for name, x in zip("qkvms", (q, k, v, options["mask"], options["sinks"])):
        if name in c.grads:
            inputs.leaves[name] = x.requires_grad_()
    return inputs


def _mask(c: Case, uniform: Callable[..., Tensor], normal: Callable[..., Tensor]) -> Any:
    kind, _, letters = c.mask.partition(":")
    if kind in ("none", "causal"):
        return None if kind == "none" else kind
    sizes = {"b": c.batch, "h": c.q_heads, "q": c.q_len, "k": c.kv_len, "1": 1}
    shape = [sizes.get(letter, 1) for letter in letters]
    if kind == "intervals":  # some empty, some beyond the keys on either side
        lo = (uniform(*shape) * (c.kv_len + 2)).int() - 2
        return Intervals(lo, lo + (uniform(*shape) * (c.kv_len + 4)).int() - 1)
    if kind == "segments":
        return _segments(c, letters, uniform)
    kept = uniform(*shape) < c.keep
    if "q" in letters and c.q_len > 3:
        kept.select(letters.index("q") - len(letters), 1).fill_(False)  # a row that sees nothing
    if kind == "bool":
        return kept
    mask = normal(*shape).to(c.mask_dtype or c.dtype)
    mask.masked_fill_(~kept, -torch.inf if kind == "additive" else torch.finfo(mask.dtype).min)
    if c.layout == "sliced" and mask.dim():  # of a mask made for more keys
        mask = torch.cat([mask, torch.full_like(mask, torch.nan)], -1)[..., : mask.shape[-1]]
    return mask


def _segments(c: Case, letters: str, uniform: Callable[..., Tensor]) -> Segments:
    causal = letters.endswith("c")
    if letters.startswith("p"):
        padding = (uniform(c.batch) * (c.kv_len + 1)).int()
        return Segments.left_padded(padding, c.q_len, c.kv_len, causal=causal)
    row = torch.arange(c.batch, dtype=torch.int32).repeat_interleave(3)
    columns = [row.to(uniform(1).device)]
    for length in (c.q_len,) if letters[0] in "23" else (c.q_len, c.kv_len):
        cuts = (uniform(c.batch, 6) * (length + 1)).int().sort(1).values  # gaps between them, some empty
        columns += [cuts[:, ::2].flatten(), cuts[:, 1::2].flatten()]
    if letters[0] in "24":
        return Segments(torch.stack([x[:3] for x in columns[1:]]), causal)
    return Segments(torch.stack(columns), causal)


def _masking(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in ("mask", "window", "q_lengths", "kv_lengths")}


def _excluding(mask: Any) -> Any:
    """What of a mask excludes keys that may hold anything. (What a tensor or a band hides must be finite.)"""
    if isinstance(mask, Segments):
        return mask._replace(causal=False)
    return mask if isinstance(mask, Intervals) else None


def run(inputs: Inputs, backend: str | None = None, poison: bool = True) -> dict[str, Tensor]:
    """The op's results: "out", "lse" if asked for, and "dq"... for the leaves."""
    if poison:
        poison_free_memory(inputs)
    found = fastattn.scaled_dot_product_attention(inputs.q, inputs.k, inputs.v, **inputs.options, backend=backend)
    return _results(inputs, inputs.leaves, found, inputs.grad_out, inputs.grad_lse)


def reference_results(inputs: Inputs, reference: bool = False) -> dict[str, Tensor]:
    """The same in float64, by `naive.attention` or, where its memory would not do, by the package's reference."""
    # Additive masks and sinks: float64 copies too, so that their gradients are not rounded.
    q, k, v = (x.detach().double() for x in inputs.clean)
    options = {n: x.detach().double() if _floating(x) else x for n, x in inputs.options.items()}
    sources = dict(zip("qkvms", (q, k, v, options["mask"], options["sinks"])))
    leaves = {name: sources[name].requires_grad_() for name in inputs.leaves}
    with_lse = options.pop("return_lse")
    if reference:
        found = fastattn.scaled_dot_product_attention(q, k, v, **options, return_lse=with_lse, backend="reference")
    else:
        found = tuple(naive.attention(q, k, v, **options)) if with_lse else naive.attention(q, k, v, **options).out
    return _results(inputs, leaves, found, inputs.grad_out.double(), inputs.grad_lse.double())


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def _results(inputs: Inputs, leaves: dict[str, Tensor], found: Any, grad_out: Tensor, grad_lse: Tensor) -> Any:
    out, lse = found if isinstance(found, tuple) else (found, None)
    results = {"out": out.detach()} | ({} if lse is None else {"lse": lse.detach()})
    if leaves:
        outputs, upstream = [out], [grad_out]
        if lse is not None and lse.requires_grad:  # the naive one knows that it does not depend on v
            outputs, upstream = [out, lse], [grad_out, grad_lse.to(lse.dtype)]
        gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
        results |= {f"d{name}": x for name, x in zip(leaves, gradients)}
    return results


def poison_free_memory(inputs: Inputs) -> None:
    """Leaves NaN in the freed blocks that the call's outputs are likely to get, so that what is not written shows.

    An allocator hands a freed block of the same size out again: certainly CUDA's caching one, mostly malloc.
    (`fill_uninitialized_memory` would be surer, but needs deterministic algorithms, and those are not what users run.)
    """
    rows = inputs.q[..., 0].numel() if inputs.q.shape[3] else 0
    for x in (inputs.q, inputs.k, inputs.v, inputs.grad_out):
        blocks = [torch.full((x.numel(),), torch.nan, dtype=x.dtype, device=x.device) for _ in range(3)]
        blocks += [torch.full((rows,), torch.nan, device=x.device) for _ in range(2)]
        del blocks


#: Accepted relative errors: (outputs, gradients).
TOLERANCE = {FP64: (1e-12, 1e-11), FP32: (1e-5, 2e-5), FP16: (1e-3, 2e-3), BF16: (4e-3, 8e-3)}
#: A row may be this much worse than the whole: few numbers average less. A wrong number among 128 is beyond it.
ROW_ALLOWANCE = 10


def relative_error(x: Tensor, ref: Tensor, floor: float = 0.0) -> float:
    """The norm of the difference over the norm of the reference; inf for NaN and the like.

    floor: the least norm that is taken for the reference's, for results whose terms cancel. A single row that is off
    by more than ROW_ALLOWANCE times as much as the whole may be counts too.
    """
    x, ref = x.detach().double(), ref.detach().double().to(x.device)
    if x.shape != ref.shape or not bool(torch.isfinite(x).all()):
        return math.inf
    if ref.numel() == 0:
        return 0.0
    difference = (x - ref).reshape(-1, ref.shape[-1] if ref.dim() else 1)
    rows = ref.reshape(difference.shape).norm(dim=1)
    size = max(float(rows.norm()), floor)
    if size == 0.0:
        return float(difference.norm())
    typical = size / math.sqrt(max(1, int((rows > 0).sum())))
    worst = float((difference.norm(dim=1) / rows.clamp(min=typical / 2)).max())
    return max(float(difference.norm()) / size, worst / ROW_ALLOWANCE)


def lse_error(x: Tensor, ref: Tensor) -> float:
    """The largest difference over 1 + |reference|; -inf must be where it is in the reference."""
    x, ref = x.detach().double(), ref.detach().double()
    if x.shape != ref.shape or not torch.equal(x == -math.inf, ref == -math.inf) or bool(x.isnan().any()):
        return math.inf
    difference = ((x - ref).abs() / (1 + ref.abs()))[ref != -math.inf]
    return float(difference.max()) if difference.numel() else 0.0


def errors(case: Case, inputs: Inputs, got: dict[str, Tensor], want: dict[str, Tensor]) -> dict[str, float]:
    """The error of each result, as a share of what is accepted: up to 1 is right."""
    assert got.keys() == want.keys()
    forward, backward = TOLERANCE[case.dtype]
    found = {}
    for name, x in got.items():
        source = inputs.q if name in ("out", "lse") else inputs.leaves[name[1:]]
        if name == "lse":
            assert x.dtype == (FP64 if case.dtype == FP64 else FP32)
            found[name] = lse_error(x, want[name]) / min(forward, 1e-3)
            continue
        assert x.dtype == source.dtype, (name, x.dtype)
        # A mask or sinks of fewer bits than q cannot have a finer gradient than they can hold.
        limit = forward if name == "out" else max(backward, TOLERANCE[source.dtype][0])
        if name in ("dm", "ds"):  # few numbers, each the sum of many that cancel
            limit *= 2
        found[name] = relative_error(x, want[name], _floor(case, inputs, name)) / limit
    return found


def _floor(case: Case, inputs: Inputs, name: str) -> float:
    """Half the norm that a result would have did nothing cancel: with one visible key dq and dk are exactly 0, and
    relative to 0 every rounding error is infinite.

    For standard normal data a row with n visible keys has probabilities of about 1/n, an output of about 1/sqrt(n), and
    ds of about p * sqrt(Dv).
    """
    seen = inputs.seen.expand(case.batch, case.q_heads, case.q_len, case.kv_len)
    n = seen.sum(-1).double()
    n = n[n > 0]
    value_dim = inputs.v.shape[3]
    if name == "ds":
        return 0.5 * math.sqrt(value_dim * float((1 / (n * (n + 1) ** 2)).sum()))
    norm = 0.5 * math.sqrt(value_dim * float((1 / n).sum()))
    scale = 1 / math.sqrt(case.head_dim or 1) if case.scale is None else abs(case.scale)
    return norm * scale * math.sqrt(case.head_dim) if name in ("dq", "dk") else norm


def assert_right(case: Case, inputs: Inputs, got: dict[str, Tensor], want: dict[str, Tensor] | None = None) -> None:
    found = errors(case, inputs, got, reference_results(inputs) if want is None else want)
    assert max(found.values()) <= 1, f"{case}: shares of the accepted error: {found}"


def check(case: Case, backend: str | None, device: str | torch.device = "cpu", seed: int | None = None) -> None:
    """Asserts that a backend computes a case as `naive` does."""
    inputs = make(case, device, seed)
    assert_right(case, inputs, run(inputs, backend))


def refusals(inputs: Inputs, backend: str) -> list[str]:
    """Why the backend cannot serve the case."""
    options = inputs.options | {"backend": backend}
    return fastattn.explain(inputs.q, inputs.k, inputs.v, **options).reasons[backend]


def a_problem(**fields: Any) -> Problem:
    """A causal call of one query on an H100, but for the fields given."""
    common = {
        "device": "cuda", "index": 0, "capability": (9, 0), "dtype": BF16, "batch": 1, "q_heads": 32, "kv_heads": 8,
        "q_len": 1, "kv_len": 8192, "head_dim": 128, "value_dim": 128, "mask": "none", "mask_shape": (),
        "mask_dtype": None, "left": -1, "right": 0, "softcap": 0.0, "sinks": False, "q_lengths": False,
        "kv_lengths": False, "return_lse": False, "grads": "",
    }  # fmt: skip
    return Problem(**(common | fields))


class Watcher(TorchDispatchMode):
    """Sees every operator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(function))
        return function(*args, **(kwargs or {}))
