"""What a recording says in numbers: where the gradient comes from, which regime it is like, what changed."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from .bins import ENTROPY, P
from .recording import Recording

# The paper's mean alpha at the start of its strong and weak tasks, arXiv:2602.11424.
STRONG_START, WEAK_START = 0.65, 0.05
# Where this page draws the lines between the two is a choice: the paper gives the two points only.
STRONG_FROM, WEAK_TO = 0.5, 0.2
# Kinds of tokens by (p, H); the bounds are edges of the bins, and a choice.
UNLIKELY, LIKELY, SURE_BELOW = 0.1, 0.5, 1.0
# Above this share of one label, alpha may be high because that label is common.
DOMINANT = 0.2
GROUPS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


class Kind(NamedTuple):
    name: str
    tokens: float  # share of all tokens
    mass: dict[str, float]  # share of the gradient mass under each objective


def kinds(recording: Recording, channel: str | None = None) -> list[Kind]:
    """Shares of tokens, and of each objective's gradient mass, by what the model makes of the label."""
    low, high, sure = P.at(UNLIKELY), P.at(LIKELY), ENTROPY.at(SURE_BELOW)
    cuts = {
        f"conflict: p < {UNLIKELY:g}, H < {SURE_BELOW:g} nat": np.s_[:low, :sure],
        f"unsure: p < {UNLIKELY:g}, H ≥ {SURE_BELOW:g} nat": np.s_[:low, sure:],
        f"in between: p from {UNLIKELY:g} to {LIKELY:g}": np.s_[low:high],
        f"known: p ≥ {LIKELY:g}": np.s_[high:],
    }
    of = recording.of(channel)
    tokens, mass = recording.p_entropy[of].sum(0), recording.mass[:, of].sum(1)

    def share(table: np.ndarray, cut: Any) -> float:
        whole = table.sum()
        return float(table[cut].sum() / whole) if whole > 0 else float("nan")

    return [
        Kind(
            name,
            share(tokens, cut),
            {o: share(table, cut) for o, table in zip(recording.objectives, mass, strict=True)},
        )
        for name, cut in cuts.items()
    ]


def gates(recording: Recording, channel: str | None = None) -> dict[str, tuple[float, float, float]]:
    """Of each objective: (mean gate, its standard deviation over tokens, mean focus index)."""
    of = recording.of(channel)
    count = recording.p_entropy[of].sum()
    found = {}
    for objective, sums in zip(recording.objectives, recording.totals[:, of].sum(1), strict=True):
        gate, square, focus, _ = sums / count if count else np.full(4, np.nan)
        found[objective] = (float(gate), float(np.sqrt(max(square - gate * gate, 0.0))), float(focus))
    return found


def regime(alpha: float) -> str:
    """ "strong", "intermediate" or "weak"; "unknown" of no tokens."""
    if not alpha >= 0:
        return "unknown"
    return "strong" if alpha >= STRONG_FROM else "weak" if alpha <= WEAK_TO else "intermediate"


def commonest_label(recording: Recording, channel: str | None = None) -> tuple[int, float] | None:
    """(label, its share of the sampled tokens); None where the sample has no labels."""
    labels = recording.token("label")[np.isin(recording.token("channel"), recording.of(channel))]
    if not len(labels) or (labels < 0).any():
        return None
    names, counts = np.unique(labels, return_counts=True)
    most = int(counts.argmax())
    return int(names[most]), float(counts[most] / len(labels))


class Group(NamedTuple):
    """Tokens whose alpha before was in [low, high); better and worse add up to the mean change."""

    low: float
    high: float
    size: int
    better: float
    worse: float


def paired(before: Recording, after: Recording, of: str = "p", channel: str | None = None) -> list[Group]:
    """Mean change of "p" or "nll" of the tokens in both samples, by alpha before.

    Raises: ValueError where there is none, or where one id has two labels.
    """
    if of not in ("p", "nll"):
        raise ValueError(f"of: expected 'p' or 'nll', got {of!r}")
    _, first, second = np.intersect1d(before.token("id"), after.token("id"), return_indices=True)
    if not len(first):
        raise ValueError(
            "after: has no token of `before`; the recorders need one seed and the same rows or ids"
        )
    if (before.token("label")[first] != after.token("label")[second]).any():
        raise ValueError("after: tokens of the same id have other labels than in `before`: not the same rows")
    wanted = np.isin(before.token("channel")[first], before.of(channel))
    first, second = first[wanted], second[wanted]
    old, new = before.token("logp")[first], after.token("logp")[second]
    with np.errstate(invalid="ignore"):
        change = np.exp(new) - np.exp(old) if of == "p" else old - new
    change = np.where(old == new, 0.0, change)  # also of a label that stays impossible
    better = change > 0 if of == "p" else change < 0
    group = np.clip(np.digitize(before.token("alpha")[first], GROUPS) - 1, 0, len(GROUPS) - 2)
    found = []
    for number, (low, high) in enumerate(pairwise(GROUPS)):
        own = group == number
        count = int(own.sum())
        sums = (float(change[own & which].sum()) / max(count, 1) for which in (better, ~better))
        found.append(Group(low, high, count, *sums))
    return found
