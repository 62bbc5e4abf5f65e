"""triton as a compiler: which one is installed, without importing it, and how it compiles a kernel for another machine.

Importing triton takes a second, and a binary that is on disk needs none.
"""

from __future__ import annotations

import os
import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from .versions import need, untested_compiler

#: What turns Triton's compiler into another one. A binary of ours depends on nothing that is not in its label.
_SETTINGS = re.compile(r"(TRITON|MLIR|LLVM)_|(DISABLE|ENABLE)_(LLVM|PTXAS)|(PTXAS|NVPTX)_OPTIONS|USE_IR_LOC")
#: Which assembler is to be had, where the package has none.
_KEPT = ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH", "TRITON_CUOBJDUMP_PATH", "TRITON_NVDISASM_PATH")


class Compiler(NamedTuple):
    """The triton that is installed."""

    place: str  #: the package's folder
    version: str
    identity: str  #: changes when its files do: version, compiler and assembler

    @property
    def untested(self) -> str:
        """Why it is not to compile, "" where it is one of those tested."""
        return untested_compiler(self.version)


@cache
def compiler() -> Compiler | None:
    """None: there is none. (Not read from the package's metadata: builds of other origin have another name there.)"""
    try:
        spec = find_spec("triton")
    except (ImportError, ValueError):
        return None
    if spec is None or spec.origin is None:
        return None
    place = Path(spec.origin).parent
    try:
        text = Path(spec.origin).read_text(encoding="utf-8")
    except OSError:
        return None
    found = re.search(r"^__version__\s*=\s*['\"]([^'\"]+)", text, re.MULTILINE)
    version = found[1] if found else "of an unknown version"
    files = [*sorted(place.glob("_C/libtriton*.so")), *sorted(place.glob("backends/nvidia/bin/ptxas*"))]
    files += [Path(chosen) for name in _KEPT if (chosen := os.environ.get(name))]
    return Compiler(str(place), version, repr([version, *map(_file, files)]))


def _file(path: Path) -> tuple[str, int, int]:
    try:
        info = path.stat()
    except OSError:
        return path.name, 0, 0
    return path.name, info.st_size, info.st_mtime_ns


def environment(variables: dict[str, str]) -> dict[str, str]:
    """The environment variables of a process that is to compile as Triton does by itself, given this one's."""
    kept = {name: value for name, value in variables.items() if not _SETTINGS.match(name) or name in _KEPT}
    # From 3.10 on the default is another one. Line numbers are a quarter of a binary.
    return kept | {"TRITON_DEFAULT_FP_FUSION": "1", "TRITON_DISABLE_LINE_INFO": "1"}


def compiled(
    kernel: Any,
    signature: dict[str, str],
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    capability: tuple[int, int],
    options: dict[str, Any],
    source_of: str = "triton.compiler.ASTSource",
) -> Any:
    """Compiles a kernel for NVIDIA GPUs of a capability, which need not be here. Triton's own result. source_of: the
    language. Imports triton."""
    import triton

    target = need("triton", "triton.backends.compiler.GPUTarget")("cuda", 10 * capability[0] + capability[1], 32)
    source = need("triton", source_of)(kernel, signature, constants, attributes)
    return triton.compile(source, target=target, options=options)
