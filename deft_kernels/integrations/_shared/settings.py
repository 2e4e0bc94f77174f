"""What every trainer's call takes: an objective, keywords of the loss, and where the statistics go."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ...core import inputs
from ...core.keywords import meant
from ...core.settings import (
    OfChunks,
    OfClassWeight,
    OfGradient,
    OfSmoothing,
    OfUser,
    OfWeight,
    OfZLoss,
    check_values,
)
from ...core.statistics import RowLoss
from ...objectives import Objective
from ...row_objectives import RowObjective
from .running import RunningStatistics

COLUMN = "it is a column of the data set here: columns=Columns(token_weight=its name)"


class TrainerKeywords(OfUser, OfZLoss, OfSmoothing, total=False):
    """What a trainer leaves to the user: all but the objective, the batch and what `OfCaller` holds."""


class LogitsKeywords(TrainerKeywords, OfGradient, OfWeight, total=False):
    """The keywords of a trainer's call over its model's logits."""


class HiddenKeywords(TrainerKeywords, OfChunks, OfClassWeight, total=False):
    """The keywords of a trainer's call over its model's hidden states."""


def described(objective: str | Objective | RowObjective | RowLoss) -> Objective | RowObjective | RowLoss:
    """The objective, its name resolved, so that a wrong one raises where it was written."""
    return inputs.described(objective)


def checked(call: str, table: Any, keywords: Mapping[str, object]) -> dict[str, Any]:
    """The keywords, if all are in the table; otherwise TypeError, as none may be dropped silently.

    Raises: TypeError, ValueError for a value, too: before the data is read, not in the first step.
    """
    known = tuple(table.__annotations__)
    for name in keywords:
        if name not in known:
            hint = COLUMN if name == "token_weight" else meant((*known, "objective"), name)
            raise TypeError(
                f"{name}: not a keyword of {call}; {'' if hint is None else hint + '; '}known: "
                f"{', '.join(known)} (reduction, shift, num_items and ignore_index follow from what the "
                "trainer passes)"
            )
    check_values(keywords)
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
