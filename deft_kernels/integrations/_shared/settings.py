"""What every trainer's call takes: an objective, keywords of the loss, and where the statistics go."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...core import inputs
from ...core.keywords import meant
from ...core.settings import LossOfHidden, LossOfLogits
from ...core.statistics import RowLoss
from ...objectives import Objective
from .running import RunningStatistics

# Decided by the trainer's own call, or by the model, whose head scales and caps its logits.
DECIDED = {"objective", "reduction", "ignore_index", "token_weight", "num_items", "shift", "group"} | {
    "logit_scale",
    "softcap",
}
# Keywords that a caller may pass on.
OF_LOGITS = tuple(name for name in LossOfLogits.__annotations__ if name not in DECIDED)
OF_HIDDEN = tuple(name for name in LossOfHidden.__annotations__ if name not in DECIDED)


def described(objective: str | Objective | RowLoss) -> Objective | RowLoss:
    """The objective, its name resolved, so that a wrong one raises where it was written."""
    return inputs.described(objective)


def checked(call: str, known: tuple[str, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The keywords, if all are known; TypeError otherwise, as none may be dropped without a word."""
    for name in keywords:
        if name not in known:
            hint = meant((*known, "objective"), name)
            raise TypeError(
                f"{name}: not a keyword of {call}; {'' if hint is None else hint + '; '}known: "
                f"{', '.join(known)} (reduction, shift, num_items and ignore_index follow from what the "
                "trainer passes)"
            )
    for name in ("weight", "class_weight"):
        if not isinstance(keywords.get(name), (Tensor, type(None))):
            raise TypeError(f"{name}: expected a tensor of [V], got {type(keywords[name]).__name__}")
    return dict(keywords)


def recorder(statistics: Any) -> RunningStatistics | None:
    if statistics is not None and not isinstance(statistics, RunningStatistics):
        raise TypeError(f"statistics: expected a RunningStatistics, got {type(statistics).__name__}")
    return statistics


def denominator(num_items: Any, like: Tensor) -> Any:
    """The trainer's number of items, on the loss's device; 1 for 0, so that an empty batch gives no NaN."""
    if num_items is None:
        return None
    if isinstance(num_items, Tensor):
        num_items = num_items.to(like.device)
        return num_items + (num_items == 0).to(num_items.dtype)
    return num_items if num_items != 0 else 1


def counted(labels: Tensor, shift: bool, ignore_index: int) -> Tensor:
    """The rows that a call counts, in any shape."""
    return (labels[..., 1:] if shift else labels) != ignore_index
