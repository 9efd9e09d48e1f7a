"""What verification found: every fault, where it is, and which files to fetch again."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it must be.

    ``kind`` is one of manifest, missing, unexpected, size, hash, index, class-table, unsafe, container, array, value,
    content-id. ``where`` is a half-open byte range of the file ``path``; ``sample`` a key.
    """

    kind: str
    path: str
    where: tuple[int, int] | None = None
    sample: str | None = None
    found: str | None = None
    expected: str | None = None

    def __str__(self) -> str:
        parts = [f"{self.kind}: {self.path}"]
        if self.where:
            parts.append(f"bytes {self.where[0]}-{self.where[1]}")
        if self.sample is not None:
            parts.append(f"sample {self.sample}")
        if self.found is not None:
            parts.append(f"found {self.found}")
        if self.expected is not None:
            parts.append(f"expected {self.expected}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Report:
    """The outcome of `formats.verify`; ``checked`` counts files, bytes, samples and arrays looked at."""

    path: str
    level: str
    content_id: str | None = None
    faults: list[Fault] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    checked: dict[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return not self.faults

    @property
    def refetch(self) -> list[str]:
        """Files to fetch again: those with a fault that are part of the artifact, sorted."""
        return sorted({fault.path for fault in self.faults if fault.kind != "unexpected"})

    def to_dict(self) -> dict[str, Any]:
        """The report as JSON can hold it; ``where`` becomes a list of two numbers."""
        faults = [{**asdict(fault), "where": list(fault.where) if fault.where else None} for fault in self.faults]
        return {**asdict(self), "ok": self.ok, "refetch": self.refetch, "faults": faults}
