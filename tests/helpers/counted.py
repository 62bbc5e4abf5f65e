"""What a call costs the host, in counts: they are the same on every machine, as times are not."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import fastattn

_SOURCE = str(Path(fastattn.__file__).parent)


class Counts(NamedTuple):
    """Of one call."""

    calls: int  #: of Python functions of fastattn
    builtins: int  #: that these call: methods of dicts and tensors, constructors of tuples
    operators: int  #: of torch that somebody in Python called: each allocates, or launches a kernel, or both


def counted(run: Callable[[], Any], warmups: int = 3) -> Counts:
    """The counts of one call, after some that make what is kept between calls. Frames of torch, of the tests and of
    stand-ins for kernels are not fastattn's; the operators that they call count."""
    for _ in range(warmups):
        run()
    calls = builtins = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal calls, builtins
        if event in ("call", "c_call") and frame.f_code.co_filename.startswith(_SOURCE):
            calls += event == "call"
            builtins += event == "c_call"

    gc.collect()
    gc.disable()  # finalizers are Python functions too
    try:
        sys.setprofile(note)
        try:
            run()
        finally:
            sys.setprofile(None)
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            run()
    finally:
        gc.enable()
    events = [event for event in profiled.events() if event.name.startswith("aten::")]
    operators = [e for e in events if e.cpu_parent is None or not e.cpu_parent.name.startswith("aten::")]
    return Counts(calls, builtins, len(operators))


def without_gradients(run: Callable[[], Any]) -> Callable[[], Any]:
    def within() -> Any:
        with torch.no_grad():
            return run()

    return within
