"""The report of `warmup`."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.table import table


@dataclass(frozen=True)
class Family:
    """Calls of one phase, mask, window and batch size, at any length."""

    name: str
    served_by: tuple[str, ...]  #: backends; several if few queries have another one than many
    built: int  #: cuDNN plans
    loaded: int  #: cuDNN plans that were on disk
    milliseconds: float  #: of all its calls
    notes: tuple[str, ...] = ()  #: what is slow or not ready, and why
    avoidable: bool = False  #: whether the user can change that

    @property
    def slow(self) -> bool:
        """Whether some of its calls run on the reference, or on no backend."""
        return "reference" in self.served_by or not self.served_by


@dataclass(frozen=True)
class Warmth:
    """What was warmed up. It prints as a table."""

    device: str
    families: tuple[Family, ...]
    notes: tuple[str, ...]  #: what was left out, and why
    milliseconds: float
    compiled: int = 0  #: kernels of our own
    kernels_loaded: int = 0  #: kernels of our own that were on disk
    failed: tuple[str, ...] = ()  #: kernels that could not be compiled, and why

    @property
    def built(self) -> int:
        """cuDNN plans that were built."""
        return sum(family.built for family in self.families)

    @property
    def loaded(self) -> int:
        """cuDNN plans that were read from disk."""
        return sum(family.loaded for family in self.families)

    @property
    def complete(self) -> bool:
        """Whether every family is ready and as fast as possible on this kind of device."""
        return not self.failed and not any(family.avoidable for family in self.families)

    def __str__(self) -> str:
        rows = [
            (f.name, ", ".join(f.served_by) or "-", str(f.built), str(f.loaded), f"{f.milliseconds:.0f}")
            for f in self.families
        ]
        lines = [table(("family", "served by", "built", "from disk", "ms"), rows)] if rows else []
        lines.append(
            f"{len(rows)} families on {self.device} in {self.milliseconds / 1e3:.1f} s: "
            f"{self.built} plans built, {self.loaded} read from disk."
        )
        if self.compiled or self.kernels_loaded:
            lines.append(f"{self.compiled} kernels compiled, {self.kernels_loaded} read from disk.")
        lines += [f"Not compiled: {text}." for text in self.failed]
        if not self.device.startswith("cuda"):
            lines.append("Plans are for NVIDIA GPUs: on this device there was nothing to build.")
        families: dict[str, list[str]] = {}
        for family in self.families:
            for note in family.notes:
                families.setdefault(note, []).append(family.name)
        lines += [f"{'; '.join(names)}: {note}." for note, names in families.items()]
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join(lines)
