"""triton: how a kernel that it compiled is launched."""

from __future__ import annotations

from functools import cache
from inspect import getsource
from typing import Any

#: What Triton itself does last when a kernel is called (3.6 to 3.9), and `launch` does after it.
_LAUNCH = (
    "kernel.run(grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values())"
)


@cache
def launches_as_known() -> bool:
    """Whether this Triton launches kernels as `launch` does, by its own source. Where it does not, or does not show it,
    Triton has to launch them, which takes 20 us each."""
    try:
        from triton.runtime.jit import JITFunction

        return _LAUNCH in " ".join(getsource(JITFunction.run).split())
    except (ImportError, AttributeError, OSError, TypeError):
        return False


def launch(compiled: Any, grid: tuple[int, ...], stream: int, *arguments: Any) -> None:
    """Launches a compiled kernel on a stream of the current device, without launch hooks. arguments: all of them, in
    order; tensors as addresses."""
    compiled.run(*grid, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
