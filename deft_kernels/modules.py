"""`nn.Module` faces of the public calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .functional import RowLoss, deft_loss
from .objectives import Objective, resolve
from .reductions import Reduction
from .statistics import RowStatistics


class DEFTLoss(nn.Module):
    """`deft_loss` as a module; a drop-in for `nn.CrossEntropyLoss` on [..., V] logits and [...] labels.

    Args: the keywords of `deft_loss`; `weight` [V] becomes a buffer, so that it moves with the module.
    Shape: logits [..., V], labels [...]; a scalar, or [...] with reduction="none".
    Raises: as `deft_loss`; an unknown objective raises here already.
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
        super().__init__()
        if not callable(objective):
            objective = resolve(objective)
        known = {"shift", "softcap", "temperature", "z_loss", "inplace", "grad_in_forward", "return_stats"}
        known.add("backend")
        for name in keywords:
            if name not in known:
                raise TypeError(f"{name}: not a keyword of DEFTLoss; known: {', '.join(sorted(known))}")
        self.register_buffer("weight", weight)
        self.keywords = {
            "objective": objective,
            "reduction": reduction,
            "ignore_index": ignore_index,
            "label_smoothing": label_smoothing,
            **keywords,
        }

    def forward(
        self,
        logits: Tensor,
        labels: Tensor,
        *,
        token_weight: Tensor | None = None,
        num_items: Tensor | float | None = None,
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        own: dict[str, Any] = {"weight": self.weight, "token_weight": token_weight, "num_items": num_items}
        return deft_loss(logits, labels, **own, **self.keywords)

    def extra_repr(self) -> str:
        objective = self.keywords["objective"]
        shown = objective.name if isinstance(objective, Objective) else repr(objective)
        return f"objective={shown}, reduction={self.keywords['reduction']}"
