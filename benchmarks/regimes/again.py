"""Two runs from nothing, side by side: do they lead to the same reading?"""

from __future__ import annotations

import math
from typing import NamedTuple

from claims import of_paper, seen_here
from results import Results, Spread


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

    @property
    def turned(self) -> bool:
        """What one run has above nll in every seed, the other has below in every seed."""
        first, second = self.first.values, self.second.values
        up = min(first) > 0 > max(second)
        return up or min(second) > 0 > max(first)


def differences(first: Results, second: Results) -> list[Both]:
    return [
        Both(part, o, first.difference(part, o, "top1"), second.difference(part, o, "top1"))
        for part in first.parts()
        for o in first.objectives(first.task_of(part))
        if o != "nll"
    ]


def other_verdicts(first: Results, second: Results) -> list[tuple[str, str, str]]:
    """(claim, verdict of the first run, of the second) where the two are not the same."""
    verdicts = [{c.text: c.verdict for c in (*of_paper(r), *seen_here(r))} for r in (first, second)]
    return [
        (text, verdict, verdicts[1][text])
        for text, verdict in verdicts[0].items()
        if verdicts[1][text] != verdict
    ]
