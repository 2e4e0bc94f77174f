"""What the emulator found, and what of it is known to be harmless."""

from __future__ import annotations

from dataclasses import dataclass, field


class Fault(Exception):
    """An access that a GPU would answer with an error, or with another allocation's bytes."""


@dataclass
class Report:
    """A finding. place: the source line, or the two lines of a race."""

    kind: str
    kernel: str
    place: str
    count: int = 0
    example: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        details = ", ".join(f"{k} {v}" for k, v in self.example.items())
        return f"{self.kind} in {self.kernel} at {self.place} ({self.count} times; first: {details})"


@dataclass(frozen=True)
class Benign:
    """A finding that is known and does no harm. Strings that the report's own have to contain, and the
    reason."""

    kind: str
    kernel: str
    place: str
    reason: str

    def covers(self, report: Report) -> bool:
        return self.kind in report.kind and self.kernel in report.kernel and self.place in report.place


class Reports:
    def __init__(self, benign: tuple[Benign, ...] = ()):
        self.benign = benign
        self.found: dict[tuple[str, str, str], Report] = {}

    def add(self, kind: str, kernel: str, place: str, **example: object) -> Report:
        report = self.found.setdefault((kind, kernel, place), Report(kind, kernel, place, 0, example))
        report.count += 1
        return report

    def harmful(self) -> list[Report]:
        return [r for r in self.found.values() if not any(b.covers(r) for b in self.benign)]

    def take(self) -> list[Report]:
        """The harmful ones so far, and forget them all."""
        found = self.harmful()
        self.found.clear()
        return found
