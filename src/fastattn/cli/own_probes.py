"""Probes of `fastattn doctor`: the backends, kernels and plans, and the switches that are set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..common.machine import switches as switches_set
from .finding import Finding, has_gpu

SWITCHES = {
    "FASTATTN_BACKENDS": "the backends that may serve calls, in this order",
    "FASTATTN_COMMAND": "the command that result files name, where another program starts it with paths of its own",
    "FASTATTN_COMMIT": "the commit that result files name where the source is no git checkout",
    "FASTATTN_COMPILE": "our own kernels: wait = a call waits for its own; off = only those on disk are used",
    "FASTATTN_CUDNN": "0 turns the cuDNN backend off",
    "FASTATTN_DEBUG": "1 checks layouts and more at run time, and shows tracebacks on the command line",
    "FASTATTN_INTERPRET": "1 lets decode and prefill run on a CPU, with TRITON_INTERPRET=1: for tests",
    "FASTATTN_NATIVE": "0: calls that came back before go through Python too",
    "FASTATTN_PLANS": "cuDNN plans: static = one for each shape, built at once; dynamic = only those for every length",
    "FASTATTN_PLAN_CACHE": "the directory where cuDNN plans and compiled kernels are kept, or off",
    "FASTATTN_TEST_SEED": "other random inputs for the tests",
    "FASTATTN_UNTESTED_TRITON": "1 lets a version of Triton compile our own kernels that was not tested",
    "TRITON_INTERPRET": "1 runs Triton's kernels in Python: right, and very slow",
}

#: Of these, those that are on or off.
ON_OR_OFF = (
    "FASTATTN_CUDNN",
    "FASTATTN_DEBUG",
    "FASTATTN_INTERPRET",
    "FASTATTN_NATIVE",
    "FASTATTN_UNTESTED_TRITON",
)

#: Largest relative error of a working backend, by the dtype in which it is tried.
TOLERANCE = {"bfloat16": 1e-2, "float32": 1e-5}


def names() -> tuple[str, ...]:
    """The backends."""
    from ..dispatch.registry import NAMES

    return NAMES


def backend(name: str) -> Iterator[Finding]:
    """Runs a typical call on the backend and compares it with the float64 reference."""
    subject = f"backend {name}"
    refusals, error = _try(name, gradients=False)
    if refusals:
        missing = has_gpu() and (name != "hopper" or _is_hopper())
        yield Finding(subject, "missing" if missing else "none", "; ".join(refusals))
        return
    refusals, backward = _try(name, gradients=True)
    done = f"forward only ({'; '.join(refusals)})" if refusals else "forward and backward"
    error = max(error, backward)
    if not error < TOLERANCE[_dtype_name()]:
        yield Finding(subject, "broken", f"{done} run, and are wrong: relative error {error:.1e}", "please report this")
    elif name not in _allowed():
        yield Finding(subject, "off", f"{done} would work; switched off by an environment variable")
    else:
        yield Finding(subject, "ok", f"{done}, relative error {error:.1e}")


def _is_hopper() -> bool:
    import torch

    return torch.cuda.get_device_capability() == (9, 0)


def _allowed() -> tuple[str, ...]:
    from ..dispatch import registry

    try:
        return registry.allowed()
    except ValueError:  # a name that does not exist in FASTATTN_BACKENDS: `switches` says so, once
        return registry.NAMES


def _try(name: str, gradients: bool) -> tuple[list[str], float]:
    """The backend's reasons to refuse a typical call, and its largest relative error if it refuses none."""
    import torch

    from .. import explain, scaled_dot_product_attention
    from ..backends.triton.binaries.policy import waiting

    device = "cuda" if has_gpu() else "cpu"
    queries = 1 if name == "decode" else 200
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 8, queries, 64), (2, 2, 200, 64), (2, 2, 200, 64))
    data = [torch.randn(shape, generator=generator).to(getattr(torch, _dtype_name())) for shape in shapes]

    def run(backend: str, dtype: torch.dtype) -> list[Any]:
        q, k, v = (x.to(device, dtype, copy=True).requires_grad_(gradients) for x in data)
        out = scaled_dot_product_attention(q, k, v, mask="causal", backend=backend)
        assert isinstance(out, torch.Tensor)
        if not gradients:
            return [out]
        out.sum().backward()
        return [out.detach(), q.grad, k.grad, v.grad]

    inputs = [x.to(device, copy=True).requires_grad_(gradients) for x in data]
    with waiting():  # for the kernel's binary: what is asked is whether it works
        refusals = explain(*inputs, mask="causal", backend=name).reasons[name]
        if refusals:
            return refusals, 0.0
        found = run(name, getattr(torch, _dtype_name()))
    expected = run("reference", torch.float64)
    return [], max(float((x.double() - y).norm() / y.norm()) for x, y in zip(found, expected))


def kernels() -> Iterator[Finding]:
    """Whether our own kernels may be compiled here."""
    from ..backends.triton.binaries import policy

    why = policy.hindrance()
    if not why:
        how = {"background": "in the background, other backends serve until then", "wait": "while a call waits"}
        yield Finding("kernels", "ok", f"compiled {how[policy.mode()]}")
    elif policy.mode() == "off":
        yield Finding("kernels", "off", f"{why}: only those on disk are used")
    else:
        needed = "tested" in why or has_gpu()
        yield Finding("kernels", "missing" if needed else "none", f"those that are not on disk are not compiled: {why}")


def native() -> Iterator[Finding]:
    """Whether calls that came back are served without Python."""
    from ..dispatch.native import calls

    state, text = calls.state()
    advice = "with a C++ compiler (Debian: g++) small calls cost the host less time" if state == "none" else ""
    yield Finding("native calls", "missing" if state == "none" and has_gpu() else state, text, advice)


def plans() -> Iterator[Finding]:
    from ..common import disk

    folder, refusal = disk.directory(), disk.refusal()
    if folder is None:
        yield Finding("plans on disk", "off", "none are kept, each process builds its own")
    elif refusal:
        advice = f"give {folder} and what leads to it to this user alone (FASTATTN_PLAN_CACHE names another folder)"
        yield Finding("plans on disk", "broken", f"none are kept: {refusal}", advice)
    else:
        yield Finding("plans on disk", "ok", str(folder))


def switches() -> Iterator[Finding]:
    from ..backends.cudnn.plan_policy import policy
    from ..backends.triton.binaries.policy import mode
    from ..config import complaint, is_on
    from ..dispatch.registry import listed

    checks: dict[str, Callable[[], object]]
    checks = {"FASTATTN_BACKENDS": listed, "FASTATTN_COMPILE": mode, "FASTATTN_PLANS": policy}
    checks |= {name: partial(is_on, name, False) for name in ON_OR_OFF}
    for name, value in switches_set().items():
        text = SWITCHES.get(name, "")
        wrong = complaint(checks[name]) if name in checks else ""
        wrong = wrong if text else "no switch of fastattn's: a typing error?"
        yield Finding(f"{name}={value}", "broken" if wrong else "ok", wrong or text)


def _dtype_name() -> str:
    return "bfloat16" if has_gpu() else "float32"
