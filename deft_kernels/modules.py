"""`nn.Module` faces of the public calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .core.inputs import RowLoss, described
from .core.keywords import named, unknown
from .core.reduction import Reduction
from .core.statistics import RowStatistics
from .functional import deft_loss
from .linear import fused_linear_deft_loss
from .objectives import Objective


class _Loss(nn.Module):
    """What the modules share: an objective, and keywords that are checked where they are written."""

    # Of the functions behind the modules: keywords of a module's call, not of its making.
    PER_CALL = ("token_weight", "num_items")

    def __init__(
        self, own: set[str], objective: str | Objective | RowLoss, keywords: dict[str, Any], **others: Any
    ):
        super().__init__()
        known = own | set(others) | {"shift", "logit_scale", "softcap", "temperature", "z_loss"}
        known |= {"return_stats", "group", "backend"}
        title = type(self).__name__
        for name in keywords:
            if name in self.PER_CALL:
                raise TypeError(f"{name}: belongs to the call of a {title}, {title}(...)(..., {name}=...)")
            if name not in known:
                raise unknown(title, known | {"objective"}, name)
        # An objective that is a module has its parameters trained, moved and saved with this one.
        self.objective = described(objective)
        self.keywords = keywords | others

    def extra_repr(self) -> str:
        objective = self.objective
        name = objective.name if isinstance(objective, Objective) else repr(objective)
        return f"objective={name}, reduction={self.keywords['reduction']}"


class DEFTLoss(_Loss):
    """`deft_loss` as a module; a drop-in for `nn.CrossEntropyLoss` on [..., V] logits and [...] labels.

    Args: the keywords of `deft_loss`; `weight` [V] becomes a buffer, so that it moves with the module, and
        an `objective` that is a module becomes a submodule.
    Shape: logits [..., V], labels [...]; a scalar, or [...] with reduction="none".
    Raises: as `deft_loss`; an unknown keyword or objective raises here already.
    """

    weight: Tensor | None

    def __init__(
        self,
        weight: Tensor | None = None,
        *,
        objective: str | Objective | RowLoss = "deft",
        reduction: Reduction = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        **keywords: Any,
    ):
        super().__init__(
            {"weight", "inplace", "grad_in_forward"},
            objective,
            keywords,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
        )
        self.register_buffer("weight", weight)

    @named
    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        own: dict[str, Any] = {"weight": self.weight, "token_weight": token_weight, "num_items": num_items}
        return deft_loss(logits, labels, objective=self.objective, **own, **self.keywords)


class FusedLinearDEFTLoss(_Loss):
    """`fused_linear_deft_loss` as a module; the lm_head's weight and bias stay the caller's.

    Args: the keywords of `fused_linear_deft_loss`; `class_weight` [V] becomes a buffer, and an `objective`
        that is a module a submodule.
    Shape: hidden [..., D], weight [V, D], labels [...], bias [V]; a scalar, or [...] with reduction="none".
    Raises: as `fused_linear_deft_loss`; an unknown keyword or objective raises here already.
    """

    class_weight: Tensor | None

    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        objective: str | Objective | RowLoss = "deft",
        reduction: Reduction = "mean",
        **keywords: Any,
    ):
        own = {"class_weight", "ignore_index", "label_smoothing", "chunk_bytes"}
        super().__init__(own, objective, keywords, reduction=reduction)
        self.register_buffer("class_weight", class_weight)

    @named
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        *,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        own: dict[str, Any] = {"token_weight": token_weight, "num_items": num_items}
        own["class_weight"] = self.class_weight
        own["objective"] = self.objective
        return fused_linear_deft_loss(hidden, weight, labels, bias, **own, **self.keywords)
