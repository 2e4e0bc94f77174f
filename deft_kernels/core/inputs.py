"""What the public calls make of their arguments: objectives, labels, logits, the place of the columns."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from ..objectives import BUILDERS, Objective, resolve
from ..row_objectives import RowObjective
from . import arguments, checks
from .agreement import validating
from .groups import Shard, VocabShard, group_name, remember, resolved, vocabulary_of
from .statistics import RowLoss


def described(objective: Any) -> Objective | RowObjective | RowLoss:
    """What a call's `objective` stands for: a description, a formula of rows, or a function of RowStatistics.

    Raises: as `objectives.resolve`; TypeError for what can be called, but not with RowStatistics.
    """
    if isinstance(objective, (str, Objective)):
        return resolve(objective)
    if isinstance(objective, RowObjective):
        return objective
    if not callable(objective):
        kind = arguments.kind_of(objective)
        raise TypeError(
            f"objective: expected a name, an Objective or a function of RowStatistics, got {kind}"
        )
    made = objective.func if isinstance(objective, functools.partial) else objective
    if any(made is build for build in BUILDERS):
        name = made.__name__
        raise TypeError(f"objective: got the function objectives.{name}; call it: objectives.{name}(...)")
    if isinstance(objective, type):
        raise TypeError(
            f"objective: got the class {objective.__name__}; expected an instance that takes RowStatistics"
        )
    if isinstance(objective, nn.Module):
        package = type(objective).__module__.partition(".")[0]
        if isinstance(objective, nn.CrossEntropyLoss) or package in ("torch", "deft_kernels"):
            raise TypeError(
                f"objective: expected a function of RowStatistics, and {type(objective).__name__} is none; "
                'cross-entropy is objective="nll"'
            )
    return objective


def ahead(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """labels[..., t + shift] at t, ignore_index where there is none."""
    positions = labels.shape[-1]
    if positions == 0:
        return labels
    # Not padded, whose value passes through a double.
    last = labels.new_full((*labels.shape[:-1], min(shift, positions)), ignore_index)
    return torch.cat([labels[..., shift:], last], -1)


def aligned(labels: Tensor, shift: int, ignore_index: int) -> Tensor:
    """Flat int64 labels; position t gets the label of t + shift, and the last ones ignore_index."""
    checks.check_ignorable(labels, ignore_index)
    labels = labels.long()
    if not shift and labels.dim() == 1 and labels.is_contiguous():
        return labels
    if shift:
        if labels.dim() == 0:
            raise ValueError("shift: needs labels with a time dimension, got a scalar")
        labels = ahead(labels, shift, ignore_index)
    # The kernels read labels as a contiguous vector: with another stride they would read wrong ones.
    return labels.reshape(-1).contiguous()


def shard_of(
    group: Any,
    width: int,
    device: torch.device,
    backend: str,
    labels: Tensor,
    ignore_index: int,
    weight: Tensor | None = None,
) -> Shard | None:
    """Which columns of a vocabulary these are, split between the ranks of a group; None for all of it."""
    if group is None:
        return None
    if backend == "reference":
        raise ValueError('group: not available with backend="reference", which is one process')
    # With validation the ranks have just asked, for this call.
    asked = torch.compiler.is_compiling() or validating()
    if not asked and not _fits(group, labels, ignore_index, weight):
        remember(group, None)
    return resolved(group, width, device)


def _fits(group: Any, labels: Tensor, ignore_index: int, weight: Any) -> bool:
    """Whether the vocabulary that a group's ranks remember fits this call, by what all ranks can see."""
    if isinstance(group, VocabShard):
        return True
    group_name(group)
    size = vocabulary_of(group)
    if size is None:
        return True
    if isinstance(weight, Tensor) and weight.numel() != size:
        return False
    if labels.device.type != "cpu":
        return True
    return not bool(((labels >= size) & (labels != ignore_index)).any())


def addressable(logits: Tensor) -> Tensor:
    """The logits with a unit stride along the vocabulary and at most two row strides; a copy only if not."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return logits.contiguous()
    return logits if logits.dim() <= 3 or checks.row_strides(logits) <= 2 else logits.contiguous()
