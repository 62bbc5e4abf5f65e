"""What names a binary, and what one is. Imports neither triton nor torch: the compiler's process needs this module."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Binary:
    """A compiled kernel: machine code for one kind of GPU, and all that launching it needs."""

    cubin: bytes
    name: str
    shared: int  #: bytes of shared memory
    threads: int

    def packed(self) -> bytes:
        """As bytes, for pipes and files."""
        head = {name: value for name, value in asdict(self).items() if name != "cubin"}
        return json.dumps(head).encode() + b"\n" + self.cubin

    @staticmethod
    def unpacked(data: bytes) -> Binary:
        """Raises ValueError for what is none."""
        head, _, cubin = data.partition(b"\n")
        try:
            found = Binary(cubin, **json.loads(head))
        except TypeError as error:
            raise ValueError(f"no binary: {error}") from error
        right = isinstance(found.name, str) and isinstance(found.shared, int) and isinstance(found.threads, int)
        if not right or not cubin.startswith(b"\x7fELF"):
            raise ValueError("no binary")
        return found


class FlagSet(Protocol):
    """Names one binary: everything that picks another one, and nothing that a launch takes as an argument.

    Frozen, hashable and picklable, of a class at the top of a module; its `repr` shows every field.
    """

    @property
    def capability(self) -> tuple[int, int]:
        """Of the GPUs that it is for."""
        ...

    @property
    def sources(self) -> tuple[str, ...]:
        """Modules that its code comes from, besides all of `backends/triton`: their names."""
        ...

    def compile(self) -> Binary:
        """Compiles it, in seconds; no GPU is needed. Imports triton."""
        ...
