"""What `warmup` has to say."""

from __future__ import annotations

from dataclasses import dataclass

from ..common.table import table


@dataclass(frozen=True)
class Family:
    """Calls of one phase, mask, window and batch size, at any length."""

    name: str
    served_by: tuple[str, ...]  #: backends, more than one where few queries go another way than many
    built: int  #: cuDNN plans
    loaded: int  #: cuDNN plans that were on disk
    milliseconds: float  #: that its calls took in all
    notes: tuple[str, ...] = ()  #: what is slow or not ready, and why
    avoidable: bool = False  #: something can be done about that

    @property
    def slow(self) -> bool:
        """True when some of its calls run on the reference, or on nothing."""
        return "reference" in self.served_by or not self.served_by


@dataclass(frozen=True)
class Warmth:
    """What is ready now. Printing it gives a table."""

    device: str
    families: tuple[Family, ...]
    notes: tuple[str, ...]  #: what was left out, and why
    milliseconds: float

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
        """True when every family is ready and as fast as the op can serve it on this kind of device."""
        return not any(family.avoidable for family in self.families)

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
        if not self.device.startswith("cuda"):
            lines.append("Plans are for NVIDIA GPUs: on this device there was nothing to build.")
        said: dict[str, list[str]] = {}
        for family in self.families:
            for note in family.notes:
                said.setdefault(note, []).append(family.name)
        lines += [f"{'; '.join(names)}: {note}." for note, names in said.items()]
        lines += [f"Note: {note}." for note in self.notes]
        return "\n".join(lines)
