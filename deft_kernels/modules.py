"""`nn.Module` faces of the public calls."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .calls import RowLoss
from .functional import deft_loss
from .linear import fused_linear_deft_loss
from .objectives import Objective, resolve
from .reductions import Reduction
from .statistics import RowStatistics


def _keywords(
    module: str, known: set[str], objective: str | Objective | RowLoss, given: dict[str, Any]
) -> dict[str, Any]:
    """The keywords of a module's calls; TypeError for an unknown one, where it was written."""
    for name in given:
        if name not in known:
            raise TypeError(f"{name}: not a keyword of {module}; known: {', '.join(sorted(known))}")
    return {"objective": objective if callable(objective) else resolve(objective), **given}


def _shown(keywords: dict[str, Any]) -> str:
    objective = keywords["objective"]
    name = objective.name if isinstance(objective, Objective) else repr(objective)
    return f"objective={name}, reduction={keywords['reduction']}"


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
        known = {"shift", "softcap", "temperature", "z_loss", "inplace", "grad_in_forward", "return_stats"}
        known |= {"backend", "group"}
        self.register_buffer("weight", weight)
        keywords |= {"reduction": reduction, "ignore_index": ignore_index, "label_smoothing": label_smoothing}
        known |= {"reduction", "ignore_index", "label_smoothing"}
        self.keywords = _keywords("DEFTLoss", known, objective, keywords)

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
        return _shown(self.keywords)


class FusedLinearDEFTLoss(nn.Module):
    """`fused_linear_deft_loss` as a module; the lm_head's weight and bias stay the caller's.

    Args: the keywords of `fused_linear_deft_loss`; `class_weight` [V] becomes a buffer.
    Shape: hidden [..., D], weight [V, D], labels [...], bias [V]; a scalar, or [...] with reduction="none".
    Raises: as `fused_linear_deft_loss`; an unknown objective raises here already.
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
        super().__init__()
        known = {
            "ignore_index",
            "label_smoothing",
            "shift",
            "softcap",
            "temperature",
            "logit_scale",
            "z_loss",
        }
        known |= {"chunk_bytes", "return_stats", "backend", "reduction", "group"}
        self.register_buffer("class_weight", class_weight)
        keywords["reduction"] = reduction
        self.keywords = _keywords("FusedLinearDEFTLoss", known, objective, keywords)

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
        return fused_linear_deft_loss(hidden, weight, labels, bias, **own, **self.keywords)

    def extra_repr(self) -> str:
        return _shown(self.keywords)
