"""The fixed bins of a recording, the same for every model and run, so that recordings can be compared."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import Tensor


@dataclass(frozen=True)
class Bins:
    """`number` bins of equal width over [0, top]: bin i holds i <= value * number / top < i + 1.

    What lies outside goes to the first or the last bin.
    """

    number: int
    top: float

    def index(self, values: Tensor) -> Tensor:
        return (values * (self.number / self.top)).long().clamp(0, self.number - 1)

    def edges(self) -> np.ndarray:
        return np.arange(self.number + 1) * self.top / self.number

    def at(self, edge: float) -> int:
        """The bin that begins there; an edge of a bin is asked for, not a value within one."""
        place = edge * self.number / self.top
        if abs(place - round(place)) > 1e-9 or not 0 <= round(place) <= self.number:
            raise ValueError(f"edge: {edge} is no edge of {self.number} bins over [0, {self.top}]")
        return round(place)


# The label's probability, in hundredths.
P = Bins(100, 1.0)
# The focus index S = sum p^2, in fiftieths.
ALPHA = Bins(50, 1.0)
# Shannon entropy, in quarters of a nat. A uniform row of 262,144 classes has 12.48.
ENTROPY = Bins(50, 12.5)
