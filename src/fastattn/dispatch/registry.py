"""The backends by name, and which of them may serve calls here and now.

The first backend of the list without a reason to refuse serves a call; for some calls `preference.py` asks others
first. `FASTATTN_BACKENDS` (a comma-separated list), `FASTATTN_CUDNN=0` and `use_backend` shorten or reorder the list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

from .._compat.torch import constant_when_traced
from ..backends.base import Backend
from ..config import any_set, is_on, setting

NAMES = (
    "decode",
    "hopper",
    "cudnn",
    "torch",
    "prefill",
    "reference",
)  #: all backends, in the order in which most calls ask

_chosen: ContextVar[tuple[str, ...] | None] = ContextVar("fastattn_backends", default=None)


class BackendError(ValueError):
    """No allowed backend can serve a call; the text lists every refusal."""


@cache
def backend(name: str) -> Backend:
    """The backend of that name; its module is imported on first use."""
    if name == "decode":
        from ..backends.triton.decode import DecodeBackend

        return DecodeBackend()
    if name == "cudnn":
        from ..backends.cudnn import CudnnBackend

        return CudnnBackend()
    if name == "hopper":
        from ..backends.triton.hopper import HopperBackend

        return HopperBackend()
    if name == "prefill":
        from ..backends.triton.prefill import PrefillBackend

        return PrefillBackend()
    if name == "torch":
        from ..backends.torch import TorchBackend

        return TorchBackend()
    from ..backends.reference import ReferenceBackend

    return ReferenceBackend()


def check_names(names: Sequence[str], argument: str) -> tuple[str, ...]:
    """The names as a tuple. Raises ValueError, naming the argument, unless all are backends."""
    unknown = [name for name in names if not isinstance(name, str) or name not in NAMES]
    if unknown or not names:
        found = ", ".join(str(name) for name in unknown) or "none"
        raise ValueError(f"{argument}: expected one or more of {', '.join(NAMES)}, got {found}")
    return tuple(names)


def listed() -> tuple[str, ...]:
    """FASTATTN_BACKENDS."""
    value = setting("FASTATTN_BACKENDS")
    return NAMES if not value else check_names([n.strip() for n in value.split(",")], "FASTATTN_BACKENDS")


@constant_when_traced
def allowed() -> tuple[str, ...]:
    """The backends that may serve a call here and now, in order. Under torch.compile: when the graph was traced."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    if not any_set("FASTATTN_BACKENDS", "FASTATTN_CUDNN"):
        return NAMES
    names = listed()
    if not is_on("FASTATTN_CUDNN", True):
        names = tuple(name for name in names if name != "cudnn")
    return names


def names_for(backend: str | None) -> tuple[str, ...]:
    """The backends that may serve a call with this argument `backend`. Raises ValueError where it is none's name."""
    return allowed() if backend is None else check_names((backend,), "backend")


@contextmanager
def use_backend(*names: str) -> Iterator[None]:
    """Within the block, only the named backends serve calls (of this thread or task).

    names: one or more of "decode", "hopper", "cudnn", "torch", "prefill", "reference". Named in this order, the fastest
    of them that can serve a call does; in another order, the first. A call that none of them can serve raises
    `BackendError`, a ValueError. Takes precedence over `FASTATTN_BACKENDS` and `FASTATTN_CUDNN`. The backward of a
    call is computed by the backends that were allowed in its forward.
    """
    token = _chosen.set(check_names(names, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)
