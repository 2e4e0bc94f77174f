"""The public calls as `nn.Module`s."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from .core.checks import check_weights
from .core.inputs import described
from .core.keywords import named, showing, unknown
from .core.settings import DEFAULTS, OfBatch, OfHidden, OfLogits, check_values
from .core.statistics import RowStatistics
from .functional import deft_loss
from .linear import fused_linear_deft_loss
from .objectives import Objective


class _Loss(nn.Module):
    """What the modules share: an objective, and keywords that are checked where they are written."""

    def __init__(self, own: str, table: Any, keywords: dict[str, Any]):
        super().__init__()
        known = {own, "return_stats", *table.__annotations__}
        title = type(self).__name__
        for name in keywords:
            if name in OfBatch.__annotations__:
                raise TypeError(f"{name}: belongs to the call of a {title}, {title}(...)(..., {name}=...)")
            if name not in known:
                raise unknown(title, known, name)
        check_values(keywords)
        # An objective that is a module has its parameters trained, moved and saved with this one.
        self.objective = described(keywords.get("objective", DEFAULTS["objective"]))
        self.keywords = {name: value for name, value in keywords.items() if name != "objective"}

    def _hold(self, name: str, weight: Any) -> None:
        check_weights(weight, name)
        self.register_buffer(name, weight)

    def extra_repr(self) -> str:
        objective = self.objective
        name = objective.name if isinstance(objective, Objective) else repr(objective)
        return f"objective={name}, reduction={self.keywords.get('reduction', DEFAULTS['reduction'])}"


class DEFTLoss(_Loss):
    """`deft_loss` as a module; a drop-in for `nn.CrossEntropyLoss` on [..., V] logits and [...] labels.

    Args: the keywords of `deft_loss`; `weight` [V] becomes a buffer, so that it moves with the module, and
        an `objective` that is a module becomes a submodule. token_weight and num_items go with each call.
    Shape: logits [..., V], labels [...]; a scalar, or [...] with reduction="none".
    Raises: as `deft_loss`; for a wrong keyword, or value of one, when the module is made.
    """

    weight: Tensor | None

    @showing(OfLogits)
    def __init__(
        self, weight: Tensor | None = None, *, return_stats: bool = False, **keywords: Unpack[OfLogits]
    ):
        super().__init__("weight", OfLogits, {"return_stats": return_stats, **keywords})
        self._hold("weight", weight)

    @named
    @showing(OfBatch)
    def forward(
        self, logits: Tensor, labels: Tensor, **keywords: Unpack[OfBatch]
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        own: dict[str, Any] = {"objective": self.objective, "weight": self.weight}
        return deft_loss(logits, labels, **own, **self.keywords, **keywords)


class FusedLinearDEFTLoss(_Loss):
    """`fused_linear_deft_loss` as a module; the lm_head's weight and bias stay the caller's.

    Args: the keywords of `fused_linear_deft_loss`; `class_weight` [V] becomes a buffer, and an `objective`
        that is a module a submodule. token_weight and num_items go with each call.
    Shape: hidden [..., D], weight [V, D], labels [...], bias [V]; a scalar, or [...] with reduction="none".
    Raises: as `fused_linear_deft_loss`; for a wrong keyword, or value of one, when the module is made.
    """

    class_weight: Tensor | None

    @showing(OfHidden)
    def __init__(
        self,
        class_weight: Tensor | None = None,
        *,
        return_stats: bool = False,
        **keywords: Unpack[OfHidden],
    ):
        super().__init__("class_weight", OfHidden, {"return_stats": return_stats, **keywords})
        self._hold("class_weight", class_weight)

    @named
    @showing(OfBatch)
    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        bias: Tensor | None = None,
        **keywords: Unpack[OfBatch],
    ) -> Tensor | tuple[Tensor, RowStatistics]:
        own: dict[str, Any] = {"objective": self.objective, "class_weight": self.class_weight}
        return fused_linear_deft_loss(hidden, weight, labels, bias, **own, **self.keywords, **keywords)
