"""NeMo AutoModel: the gated loss for its recipes' `loss_fn._target_`."""

from __future__ import annotations

from typing import Any

from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from torch import Tensor
from typing_extensions import Unpack

from ..core.keywords import showing
from ..core.settings import OfGradient
from ..core.statistics import RowLoss
from ..dtensors import is_dtensor
from ..functional import deft_loss
from ..objectives import Objective
from ._shared.settings import TrainerKeywords, checked, described


class Keywords(TrainerKeywords, OfGradient, total=False):
    """Not weight, which YAML cannot hold, and by whose sum the recipes would not divide."""


class DEFTLoss(MaskedCrossEntropy):  # type: ignore[misc]  # NeMo is untyped for mypy
    """`deft_loss` in the signature of `MaskedCrossEntropy`.

    A subclass of it, because for a model whose forward takes no logits_to_keep the recipes replace any other
    loss by plain cross-entropy, with only a warning.

    Args: objective: as in `deft_loss`, its name in YAML; ignore_index, reduction ("sum", "mean", "none"):
        as `MaskedCrossEntropy`; temperature, z_loss, label_smoothing, inplace, grad_in_forward,
        backend: as in `deft_loss`.
    Shape: logits [B, T, V], labels [B, T], shifted already; a scalar, or [B, T] with reduction="none".
    Raises: ValueError for num_label_tokens or loss_weights without reduction="sum"; for an objective that
        takes a mean over the batch, of which a call sees a micro-batch.
    """

    @showing(Keywords)
    def __init__(
        self,
        objective: str | Objective | RowLoss = "deft",
        ignore_index: int = -100,
        reduction: str = "sum",
        **keywords: Unpack[Keywords],
    ):
        super().__init__(fp32_upcast=False, ignore_index=ignore_index, reduction=reduction)
        self.objective = described(objective)
        if isinstance(self.objective, Objective) and self.objective.needs_batch:
            raise ValueError(
                f"objective: {self.objective.name} takes a mean over the batch, and the recipes' loss sees a "
                "micro-batch of it; give cayley its mean_prob"
            )
        self.keywords = checked("DEFTLoss", Keywords, keywords)

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        mask: Tensor | None = None,
        num_label_tokens: int | None = None,
        loss_weights: Tensor | None = None,
    ) -> Tensor:
        for name, given in (("num_label_tokens", num_label_tokens), ("loss_weights", loss_weights)):
            if given is not None and self.reduction != "sum":
                raise ValueError(f'{name}: only with reduction="sum", got {self.reduction!r}')
        labels = labels.to(logits.device)
        if self.ignore_index != -100:  # which the datasets pad with, whatever the loss is told to ignore
            labels = labels.masked_fill(labels == -100, self.ignore_index)
        if mask is not None:
            labels = labels.masked_fill(mask.to(labels.device).reshape(labels.shape) == 0, self.ignore_index)
        if loss_weights is not None and loss_weights.shape != labels.shape:
            raise ValueError(
                f"loss_weights: expected the shape of labels {tuple(labels.shape)}, got "
                f"{tuple(loss_weights.shape)}"
            )
        weights = None if loss_weights is None else loss_weights.to(logits.device).float()
        loss: Any = deft_loss(
            logits,
            labels,
            objective=self.objective,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            token_weight=weights,
            **self.keywords,
        )
        if is_dtensor(loss):
            loss = loss.full_tensor()
        if num_label_tokens is None:
            return loss
        return loss / num_label_tokens if num_label_tokens else loss * 0.0
