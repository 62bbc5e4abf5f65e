"""Everything that can make a binary on disk invalid: the kernels' source, the compiler, the driver, the flags."""

from __future__ import annotations

from functools import cache
from hashlib import sha256
from pathlib import Path

from .... import __version__
from ...._compat import torch as torch_internals
from ...._compat.triton_compiler import compiler
from ....common.disk import Files
from .flag_set import FlagSet

FORMAT = 1  #: of these files; raise it when what is in one means something else
FILES = Files("kernel", 64 << 20)  #: a binary is about 400 KB
_ROOT = Path(__file__).parents[3]
_PLACES = ("backends/triton/**/*.py", "_compat/gluon.py", "_compat/triton_compiler.py", "masks.py")


def label(flags: FlagSet) -> bytes:
    """As text: it names the file and stands in it."""
    kind = type(flags)
    source = _source(flags.sources)
    return f"{_environment()}\n{source}\n{kind.__module__}.{kind.__qualname__}\n{flags!r}".encode()


@cache
def _environment() -> str:
    found = compiler()
    facts = {
        "format": FORMAT,
        "fastattn": __version__,
        "triton": found.identity if found else None,
        "driver": torch_internals.driver_version(),  # it has loaded what is on disk
    }
    return repr(facts)


@cache
def _source(modules: tuple[str, ...]) -> str:
    """A digest of the source that kernels are compiled from, and more: a file too many costs a compilation, one too few
    gives wrong results."""
    paths = {path for pattern in _PLACES for path in _ROOT.glob(pattern)}
    paths |= {_ROOT.joinpath(*name.split(".")[1:]).with_suffix(".py") for name in modules}
    digest = sha256()
    for path in sorted(paths):
        try:
            text = path.read_bytes()
        except OSError:  # compiled modules alone: the version stands for them
            text = b""
        digest.update(f"{path.relative_to(_ROOT)} {len(text)}\n".encode() + text)
    return digest.hexdigest()
