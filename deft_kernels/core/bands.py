"""Bands of the target's probability, outside of which a row is dropped."""

from __future__ import annotations

import re

NUMBER = r"([0-9.]+(?:[eE][-+]?\d+)?)"


def bounds(keep: str | tuple[float, float]) -> tuple[float, float]:
    """(low, high) of "p>=0.1", "p<=0.5", "0.1<=p<=0.5", or of a pair.

    Raises: ValueError for a text that is no band, or bounds that are not 0 <= low <= high <= 1.
    """
    low, high = 0.0, 1.0
    if isinstance(keep, str):
        text = keep.replace(" ", "")
        above, below = re.fullmatch(rf"p>={NUMBER}", text), re.fullmatch(rf"p<={NUMBER}", text)
        both = re.fullmatch(rf"{NUMBER}<=p<={NUMBER}", text)
        try:
            if above:
                low = float(above[1])
            elif below:
                high = float(below[1])
            elif both:
                low, high = float(both[1]), float(both[2])
            else:
                raise ValueError
        except ValueError:
            raise ValueError(
                f"keep: {keep!r} is not a band; accepted: 'p>=A', 'p<=B', 'A<=p<=B' or (A, B)"
            ) from None
    else:
        try:
            low, high = (float(bound) for bound in keep)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            raise ValueError(f"keep: {keep!r:.80} is not a band; accepted: 'p>=A' or a pair (A, B)") from None
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"keep: bounds must satisfy 0 <= low <= high <= 1, got ({low}, {high})")
    return low, high
