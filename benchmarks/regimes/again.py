"""Two runs from nothing, side by side: do they lead to the same reading?"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import prose
from claims import of_paper, seen_here
from results import Results, Spread

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables import table


class Both(NamedTuple):
    """A difference from nll in top-1, in each run."""

    part: str
    objective: str
    first: Spread
    second: Spread

    @property
    def within(self) -> bool:
        """The means are no further apart than two standard deviations of a seed in one run less a seed in the
        other."""
        apart = math.hypot(self.first.deviation, self.second.deviation)
        return abs(self.first.mean - self.second.mean) <= 2 * apart

    def text(self) -> str:
        means = f"{self.first.mean:+.1f}, {self.second.mean:+.1f}"
        return means if self.within else f"**{means}**"

    @property
    def turned(self) -> bool:
        """What one run has above nll in every seed, the other has below in every seed."""
        first, second = self.first.values, self.second.values
        up = min(first) > 0 > max(second)
        return up or min(second) > 0 > max(first)


def differences(first: Results, second: Results) -> list[Both]:
    """Of what is in both."""
    return [
        Both(part, o, first.difference(part, o, "top1"), second.difference(part, o, "top1"))
        for part in first.parts()
        if part in second.parts()
        for o in first.objectives(first.task_of(part))
        if o != "nll" and o in second.objectives(second.task_of(part))
    ]


def other_verdicts(first: Results, second: Results) -> list[tuple[str, str, str]]:
    """(claim, verdict of the first run, of the second) where the two are not the same."""
    verdicts = [{c.text: c.verdict for c in (*of_paper(r), *seen_here(r))} for r in (first, second)]
    return [
        (text, verdict, verdicts[1][text])
        for text, verdict in verdicts[0].items()
        if verdicts[1].get(text, verdict) != verdict
    ]


def section(first: Results, second: Results) -> str:
    """The section on a second run."""
    both = differences(first, second)
    names = list(dict.fromkeys(x.objective for x in both))
    rows = []
    for part in dict.fromkeys(x.part for x in both):
        own = {x.objective: x for x in both if x.part == part}
        cells = [own[o].text() if o in own else "" for o in names]
        rows.append([part, *cells])
    other = other_verdicts(first, second)
    turned = [f"{x.objective} on {x.part}" for x in both if x.turned]
    head = second.head
    fewer = [task for task in first.tasks if task not in second.tasks]
    # What was found had been run before, so the time is that of the rest.
    wall = "" if head["found"] else f", {head['minutes']:.0f} of the clock with {head['workers']} workers"
    verdicts = "Every verdict on these is the same.\n"
    if other:
        verdicts = "Verdicts that are not the same:\n\n" + table(["said", "first run", "second run"], other)
    return prose.AGAIN.format(
        seed=head["size"]["seed"],
        tasks="".join(f" --task {task}" for task in second.tasks) if fewer else "",
        cells=len(second.records),
        minutes=round(second.core_minutes()),
        wall=wall,
        device=head["device"],
        table=table(["", *(f"{o} - nll" for o in names)], rows),
        within=sum(x.within for x in both),
        number=len(both),
        turned=", ".join(turned) or "none",
        verdicts=verdicts,
    )
