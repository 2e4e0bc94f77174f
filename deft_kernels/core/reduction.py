"""From row losses to the loss: token weights, the mean's denominator, and when the gradient can be made."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from ..row_objectives import Terms
from .spec import Spec
from .statistics import RowLoss, RowStatistics, with_stand_ins

Reduction = Literal["mean", "sum", "none"]


def class_weights(weight: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
    """w_y of each row. For a label out of range any weight will do: its row is ignored or NaN."""
    return weight.to(dtype)[labels.clamp(0, weight.numel() - 1)]


class Weighting:
    """How row losses become the loss: token weights, and the denominator of the mean."""

    def __init__(
        self,
        reduction: str,
        token_weight: Tensor | None,
        class_weight: Tensor | None,
        num_items: Tensor | float | None,
    ):
        self.reduction = reduction
        self.token_weight = None if token_weight is None else token_weight.reshape(-1)
        self.class_weight = None if class_weight is None else class_weight.contiguous()
        self.num_items = num_items.reshape(()) if isinstance(num_items, Tensor) else num_items

    def denominator(self, kept: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor | float:
        """The denominator of a mean. Not 0 if no row counts: that mean is 0.

        If the class weights of the rows that count sum to 0, the mean is NaN, as in F.cross_entropy.
        """
        if self.reduction == "sum":
            return 1.0
        if isinstance(self.num_items, Tensor):
            # A sum, as num_items may be on the host and `kept` on a device.
            return self.num_items.to(dtype) + (~kept.any()).to(dtype)
        if self.num_items is not None:
            return self.num_items
        if self.class_weight is None:
            return kept.sum().clamp(min=1).to(dtype)
        total = torch.where(kept, class_weights(self.class_weight, labels, dtype), 0.0).sum()
        return total.where(total != 0, torch.where(kept.any(), math.nan, 1.0).to(dtype))

    def reduce(self, rows: Tensor, kept: Tensor, labels: Tensor) -> Tensor:
        if self.token_weight is not None:
            rows = rows * self._token_weight(kept, rows.dtype)
        if self.reduction == "none":
            return rows
        total = rows.sum()
        return total if self.reduction == "sum" else total / self.denominator(kept, labels, rows.dtype)

    def _token_weight(self, kept: Tensor, dtype: torch.dtype) -> Tensor:
        """Padding may have any weight, even NaN: rows that are not kept do not count."""
        assert self.token_weight is not None
        return torch.where(kept, self.token_weight.to(dtype), 0.0)

    def row_scale(self, kept: Tensor, labels: Tensor, dtype: torch.dtype) -> Tensor:
        """d loss / d row for a mean or a sum, [N], of stride 0 where it is one number."""
        denominator = self.denominator(kept, labels, dtype)
        if self.token_weight is not None:
            return self._token_weight(kept, dtype) / denominator
        one = torch.ones((), dtype=dtype, device=labels.device)
        return (one / denominator).expand(labels.shape)

    @property
    def counts_rows(self) -> bool:
        """Whether it is a mean over the rows that count, and nothing else."""
        weights = (self.token_weight, self.class_weight, self.num_items)
        return self.reduction == "mean" and all(weight is None for weight in weights)

    @property
    def differentiable(self) -> bool:
        tensors = (self.token_weight, self.num_items)
        return any(isinstance(t, Tensor) and t.requires_grad for t in tensors)


def in_forward_obstacle(spec: Spec, weighting: Weighting) -> str | None:
    """Why the gradient cannot be made in the forward; None when it can."""
    if weighting.reduction == "none":
        return 'each row\'s upstream is unknown with reduction="none"'
    if spec.objective.needs_batch:
        return "cayley needs the batch's mean p first; pass objectives.cayley(mean_prob=...)"
    if spec.objective.has_band and weighting.reduction == "mean" and weighting.num_items is None:
        return "a band on p leaves the mean's denominator unknown until every row is read; pass num_items"
    if weighting.differentiable:
        return "token_weight and num_items that require a gradient need the rows' losses"
    return None


def in_forward(wanted: bool | None, spec: Spec, weighting: Weighting, logits: Tensor) -> bool:
    """Whether the gradient is made in the forward; raises when that was asked for and cannot be."""
    reason = in_forward_obstacle(spec, weighting)
    if wanted and reason is not None:
        raise ValueError(f"grad_in_forward: {reason}")
    if wanted is not None:
        return wanted
    pays = logits.device.type == "cpu" and spec.backend == "torch" and not torch.compiler.is_compiling()
    return reason is None and pays and not spec.inplace


def own_rows(
    objective: RowLoss,
    stats: RowStatistics,
    weight: Tensor | None,
    labels: Tensor,
    valid: Tensor,
    z_loss: float,
    terms: Terms | None = None,
) -> Tensor:
    """Losses [N] of a function of the statistics, 0 where a row is not valid; labels and valid are flat.

    terms: an anchor that is added, if there is one."""
    stats = with_stand_ins(stats, valid.reshape(stats.logp.shape))
    rows = objective(stats)
    if not isinstance(rows, Tensor) or rows.shape != stats.logp.shape:
        got = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
        raise ValueError(f"objective: must return one loss a row, shape {tuple(stats.logp.shape)}, got {got}")
    if not rows.is_floating_point():
        raise TypeError(f"objective: must return losses of a floating dtype, got {rows.dtype}")
    # In half precision a sum over many rows overflows, and so may their number.
    rows = rows.to(stats.logp.dtype)
    if weight is not None:
        rows = rows * class_weights(weight, labels, rows.dtype).reshape(rows.shape)
    rows = rows + z_loss * stats.lse**2 if z_loss > 0 else rows
    rows = rows.reshape(-1)
    if terms is not None and terms.anchor is not None:
        rows = rows + terms.anchor.of(stats.logp.reshape(-1), valid)[0]
    return torch.where(valid, rows, 0.0)
