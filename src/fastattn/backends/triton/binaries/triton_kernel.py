"""Binaries of plain Triton kernels: what names one, from the arguments of a launch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from .flag_set import Binary

_INT32 = 1 << 31
#: Triton's names of element types, by torch's.
TYPES = {
    "float64": "fp64", "float32": "fp32", "float16": "fp16", "bfloat16": "bf16",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "uint8": "u8", "bool": "i1",
}  # fmt: skip
ALIGNMENT = 16  #: bytes; of a pointer that is a multiple of it the compiler knows that


class NamedKernel:
    """A Triton kernel by its name. Whoever launches a binary of it need not import its module, and with it triton."""

    def __init__(self, module: str, name: str) -> None:
        self.__module__, self.__name__ = module, name

    def load(self) -> Any:
        """The kernel itself. Imports triton."""
        return getattr(import_module(self.__module__), self.__name__)


@dataclass(frozen=True, slots=True)
class TritonFlags:
    """One binary of a Triton kernel whose integers are all `do_not_specialize`."""

    kernel: str  #: its module and its name, "package.module:name"
    capability: tuple[int, int]
    types: tuple[str, ...]  #: of each argument in Triton's words, "*bf16", "i32", "fp32"; "": a constant
    aligned: tuple[int, ...]  #: the pointers that are multiples of `ALIGNMENT`, by their places
    constants: tuple[tuple[int, Any], ...]  #: places and values
    options: tuple[tuple[str, int], ...]  #: num_warps and the like, sorted

    @property
    def sources(self) -> tuple[str, ...]:
        return (self.kernel.partition(":")[0],)

    def compile(self) -> Binary:
        from ...._compat.triton_compiler import compiled

        module, _, name = self.kernel.partition(":")
        kernel = NamedKernel(module, name).load()
        names = kernel.arg_names
        assert len(names) == len(self.types), f"{self.kernel} has {len(names)} arguments, got {len(self.types)}"
        signature = {name: kind or "constexpr" for name, kind in zip(names, self.types, strict=True)}
        constants: dict[tuple[int, ...], Any] = {(i,): value for i, value in self.constants}
        attributes: dict[tuple[int, ...], Any] = {(i,): [["tt.divisibility", ALIGNMENT]] for i in self.aligned}
        found = compiled(kernel, signature, constants, attributes, self.capability, dict(self.options))
        meta = found.metadata
        for scratch in ("global_scratch_size", "profile_scratch_size"):
            assert not getattr(meta, scratch, 0), f"{self.kernel} needs scratch memory of Triton's"
        return Binary(found.asm["cubin"], meta.name, meta.shared, 32 * meta.num_warps)


def flags_of(
    kernel: Any,
    capability: tuple[int, int],
    pointers: Sequence[tuple[str, bool] | None],
    integers: Sequence[int],
    floats: Sequence[float | None],
    constants: Sequence[Any],
    options: dict[str, int],
) -> TritonFlags:
    """The binary that Triton itself would compile for a launch.

    kernel: Triton's own, or a `NamedKernel`. pointers: for each tensor its dtype ("bfloat16") and whether its address
    is a multiple of `ALIGNMENT`; None where there is none. The kernel takes pointers, integers, floats, constants, in
    this order.
    """
    types = ["" if found is None else f"*{TYPES[found[0]]}" for found in pointers]
    types += ["i32" if x < _INT32 else "i64" for x in integers]
    types += ["" if x is None else "fp32" for x in floats]
    values: list[tuple[int, Any]] = [(i, None) for i, kind in enumerate(types) if not kind]
    values += [(len(types) + i, x) for i, x in enumerate(constants)]
    return TritonFlags(
        f"{kernel.__module__}:{kernel.__name__}",
        capability,
        (*types, *[""] * len(constants)),
        tuple([i for i, found in enumerate(pointers) if found is not None and found[1]]),
        tuple(values),
        tuple(sorted(options.items())),
    )
