"""The objectives by name, and three ways to keep deft from taking imbalance for knowledge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deft_kernels import objectives, row_statistics

# dft has neg_prob's gradient (docs/mathematics.md), so its cells would be the same.
OBJECTIVES: dict[str, Any] = {
    "nll": "nll",
    "neg_prob": "neg_prob",
    "tsallis-0.5": objectives.tsallis(0.5),
    "eaft": "eaft",
    "cayley": "cayley",
    "deft": "deft",
    "deft-order-1": objectives.deft(1),
}
# (logits, labels, share of the steps that are done) -> what the step trains with
Treatment = Callable[[Tensor, Tensor, float], Any]


def nll_first(logits: Tensor, labels: Tensor, done: float) -> Any:
    """The first fifth of the steps with nll."""
    return "nll" if done < 0.2 else "deft"


def ramp(logits: Tensor, labels: Tensor, done: float) -> Any:
    """alpha times a factor that goes from 0 to 1 in the first half of the steps."""
    return objectives.tsallis(min(1.0, 2 * done) * row_statistics(logits.detach(), labels).collision)


def cap(logits: Tensor, labels: Tensor, done: float) -> Any:
    """alpha, and 0.5 where it is larger."""
    return objectives.tsallis(row_statistics(logits.detach(), labels).collision.clamp(max=0.5))


REMEDIES: dict[str, Treatment] = {"deft-nll-first": nll_first, "deft-ramp": ramp, "deft-cap": cap}


def treatment(name: str) -> Treatment:
    if name in REMEDIES:
        return REMEDIES[name]
    objective = OBJECTIVES[name]
    return lambda logits, labels, done: objective
