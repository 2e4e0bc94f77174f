"""Every objective's gate and gradient from the same statistics of a row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .. import objectives as table
from ..backends.pytorch.objectives import evaluate, outside_band
from ..core.arguments import kind_of
from ..core.checks import check_dense
from ..core.statistics import Field, RowStatistics, check_statistics
from ..objectives import Objective

Objectives = Sequence[str | Objective] | Mapping[str, str | Objective]

DEFAULT: dict[str, Objective] = {
    "nll": table.nll(),
    "neg_prob": table.neg_prob(),
    "tsallis(0.5)": table.tsallis(0.5),
    "deft": table.deft(),
    "cayley": table.cayley(),
    "eaft": table.eaft(),
}


def named(objectives: Objectives) -> dict[str, Objective]:
    """Names and descriptions. Raises: ValueError, TypeError for what has no gate that is held constant."""
    if isinstance(objectives, str):
        raise TypeError(f"objectives: expected a sequence or a mapping, got the text {objectives!r}")
    if not isinstance(objectives, Sequence | Mapping):
        raise TypeError(f"objectives: expected a sequence or a mapping, got {kind_of(objectives)}")
    if isinstance(objectives, Mapping):
        pairs = [(name, _resolved(value)) for name, value in objectives.items()]
    else:
        pairs = [(v if isinstance(v, str) else _resolved(v).name, _resolved(v)) for v in objectives]
    if not pairs:
        raise ValueError("objectives: none given")
    names = [name for name, _ in pairs]
    for name, objective in pairs:
        if names.count(name) > 1:
            raise ValueError(f"objectives: two are called {name!r}; give a mapping from names to objectives")
        if not objective.detach and objective.focus != "fixed":
            raise ValueError(
                f"objectives: {name!r} has detach=False; its gradient is not gate * (p - onehot), which is "
                "what is recorded"
            )
        if objective.batch_group:
            raise ValueError(
                f"objectives: {name!r} has a batch_group; a recorder looks at this process's rows"
            )
    return dict(pairs)


def _resolved(value: str | Objective) -> Objective:
    try:
        return table.resolve(value)
    except (TypeError, ValueError) as error:
        raise type(error)(f"objectives: {str(error).removeprefix('objective: ')}") from error


def gate_of(objective: Objective, stats: RowStatistics, mean_prob: Tensor) -> tuple[Tensor, Tensor]:
    """(focus index, gate) of each row. mean_prob: of the rows that count; `cayley` reads it."""
    fields = {
        Field.LOGP: stats.logp,
        Field.COLLISION: stats.collision,
        Field.ENTROPY: stats.entropy,
        Field.MAX_PROB: stats.max_prob,
    }
    found = evaluate(objective, fields, mean_prob if objective.mean_prob is None else objective.mean_prob)
    gate = found.gate
    if objective.has_band:
        gate = torch.where(outside_band(objective, stats.logp.exp()), 0.0, gate)
    return found.alpha, gate


def gradient_norm(stats: RowStatistics, gate: Tensor | None = None) -> Tensor:
    """Euclidean norm of a row's gradient by its logits: gate * sqrt(S - 2 p + 1).

    The gradient is gate * (p_j - [j = y]), so its square is gate^2 * (sum_j p_j^2 - 2 p_y + 1). It is that of
    a row's own loss, before a mean divides it, with the gate held constant and no softcap or temperature.

    Args: stats: of the rows; gate: [...], None takes stats.gate.
    Returns: [...], in the dtype of the statistics. Of an ignored row it means nothing.
    Raises: ValueError where neither has a gate, or for one of another shape; TypeError for other statistics.
    """
    check_statistics(stats)
    gate = stats.gate if gate is None else gate
    if gate is None:
        raise ValueError("gate: neither given nor in the statistics, as `row_statistics` has none")
    if not isinstance(gate, Tensor):
        raise TypeError(f"gate: expected a Tensor, got {kind_of(gate)}")
    check_dense(gate, "gate")
    if gate.shape != stats.logp.shape:
        raise ValueError(
            f"gate: expected the statistics' shape {tuple(stats.logp.shape)}, got {tuple(gate.shape)}"
        )
    # S - 2 p + 1 = (1 - p)^2 + the other classes' squares: of a confident row each part keeps its digits.
    p = stats.logp.exp()
    others = (stats.collision - p * p).clamp(min=0)
    return gate * (torch.expm1(stats.logp).square() + others).sqrt()
