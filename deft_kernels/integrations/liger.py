"""Liger: the gated loss instead of its fused linear cross-entropy, in every model family that it patches."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.keywords import showing
from ..core.reduction import class_weights
from ..core.settings import OfChunks, OfUser
from ..core.statistics import RowLoss
from ..linear import fused_linear_deft_loss
from ..objectives import Objective, RowObjective
from ._shared import head as heads
from ._shared.running import RunningStatistics
from ._shared.settings import checked, described, recorder
from ._shared.watch import Watch

NAME = "liger_fused_linear_cross_entropy"

_original: Any = None
_watches: list[Watch] = []


class Keywords(OfUser, OfChunks, total=False):
    """Liger's caller gives the others itself: class weights, z-loss, smoothing and softcap."""


@showing(Keywords)
def install(
    objective: str | Objective | RowObjective | RowLoss = "deft",
    *,
    model: Any = None,
    statistics: RunningStatistics | None = None,
    **keywords: Unpack[Keywords],
) -> None:
    """Replace `liger_kernel.transformers.functional.liger_fused_linear_cross_entropy`, until `uninstall()`.

    Liger's patched forwards (`use_liger_kernel=True`, `AutoLigerKernelForCausalLM`,
    `apply_liger_kernel_to_*`) look that name up at each call. Labels, bias, class weights, ignore_index,
    z-loss, label smoothing, softcap and reduction come from Liger's caller.

    Args:
        objective, statistics: as in `transformers.ComputeLoss`.
        model: the model that will be trained: raises in its first training step without the gated loss, and
            at once for an adapter on its head, which Liger would leave out.
        temperature, chunk_bytes, backend: as in `fused_linear_deft_loss`.
    As Liger's, a mean divides by the sum of the class weights, and its z-loss by the number of rows; with
    both the host waits for that sum once a call.
    Raises: RuntimeError when it is installed already; ImportError without liger-kernel. The replacement
        raises for what it cannot do: return_z_loss, use_token_scaling, an accum_dtype that is not fp32,
        chunk_mem_const.
    """
    global _original
    import liger_kernel.transformers.functional as functional

    if _original is not None:
        raise RuntimeError("liger: a gated loss is installed already; call uninstall() first")
    objective, statistics = described(objective), recorder(statistics)
    if statistics is not None and statistics.channels:
        raise ValueError("statistics: has channels, which Liger's call brings no column for; use patch_model")
    settings = checked("liger.install", Keywords, keywords)
    original = getattr(functional, NAME)
    unknown = set(inspect.signature(original).parameters) - set(
        inspect.signature(_Replacement.__call__).parameters
    )
    if unknown:
        raise RuntimeError(f"liger: this version's {NAME} takes {', '.join(sorted(unknown))}, unknown here")
    watch = None
    if model is not None:
        bare = heads.bare(model, "liger.install")
        heads.plain_head(bare, "liger.install")
        model = bare
        watch = Watch(heads.innermost(bare, "liger.install"), "liger.install")
        _watches.append(watch)
    replacement = _Replacement(objective, statistics, model, watch, settings)
    setattr(functional, NAME, replacement)
    _original = original


def uninstall() -> None:
    """Put Liger's own function back. Raises: RuntimeError when nothing is installed."""
    global _original
    import liger_kernel.transformers.functional as functional

    if _original is None:
        raise RuntimeError("liger: no gated loss is installed")
    setattr(functional, NAME, _original)
    _original = None
    while _watches:
        _watches.pop().remove()


class _Replacement:
    """The signature of Liger's function; inspect.signature of an instance shows it, as Liger looks at it."""

    def __init__(
        self,
        objective: Any,
        statistics: RunningStatistics | None,
        model: Any,
        watch: Watch | None,
        keywords: dict[str, Any],
    ):
        self.objective, self.statistics, self.keywords = objective, statistics, keywords
        self.model, self.watch = model, watch

    def __call__(
        self,
        input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: Any = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
        chunk_mem_const: int = 1,
    ) -> Any:
        refused = {
            "return_z_loss": (return_z_loss, "the z-loss is in the loss, not apart"),
            "use_token_scaling": (
                use_token_scaling,
                'scaling by p is an objective, install("dft"), which leaves z-loss and smoothing unscaled',
            ),
            "accum_dtype": (accum_dtype not in (None, torch.float32), "gradients are summed in fp32"),
            "chunk_mem_const": (chunk_mem_const != 1, "pass chunk_bytes= to install"),
        }
        for name, (asked, remedy) in refused.items():
            if asked:
                raise ValueError(f"{name}: not available with the gated loss: {remedy}")
        if self.model is not None:
            # An adapter may come after install.
            heads.refuse_adapter(self.model.get_output_embeddings(), "liger.install")
        keywords: dict[str, Any] = {
            **self.keywords,
            "objective": self.objective,
            "class_weight": ce_weight,
            "ignore_index": ignore_index,
            "z_loss": self._z_loss(lse_square_scale, target, ce_weight, ignore_index, reduction),
            "label_smoothing": label_smoothing,
            "reduction": reduction,
            "softcap": softcap,
        }
        apart = return_token_accuracy or return_predicted_tokens
        keywords["return_stats"] = self.statistics is not None or apart

        def make(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return fused_linear_deft_loss(hidden, weight, target, bias, **keywords)

        head = None if self.model is None else heads.plain_head(self.model, "liger.install")
        if head is not None and head.weight is weight:
            made = heads.with_weights(head, input, make)
        else:
            made = make(input, weight, bias)
        if keywords["return_stats"]:
            loss, stats = made
            valid = target != ignore_index
        else:
            loss = made
        if self.statistics is not None:
            self.statistics.add(stats, valid)
            self.statistics.calls.note(loss, own_mean=reduction == "mean")
        if self.watch is not None and torch.is_grad_enabled():
            self.watch.seen(loss)
        if not apart:
            return loss
        from liger_kernel.transformers.functional import CrossEntropyOutput

        accuracy = None
        if return_token_accuracy:
            accuracy = stats.correct.float()
            if reduction != "none":
                accuracy = accuracy.sum() / valid.sum().clamp(min=1)
        tokens = stats.predicted if return_predicted_tokens else None
        return CrossEntropyOutput(loss=loss, token_accuracy=accuracy, predicted_tokens=tokens)

    def _z_loss(
        self, scale: float, target: Tensor, ce_weight: Tensor | None, ignore_index: int, reduction: Any
    ) -> float:
        """The factor with which deft_loss's z-loss is Liger's.

        A mean with class weights divides all of deft_loss's rows by the sum of their weights; Liger divides
        the z-loss by their number.
        """
        if ce_weight is None or scale == 0 or reduction != "mean":
            return scale
        if isinstance(self.objective, Objective) and self.objective.has_band:
            raise ValueError(
                "lse_square_scale: not available with class weights and a band on p in a mean, whose rows "
                "are not known beforehand; leave one of them out"
            )
        valid = target != ignore_index
        if not bool(valid.any()):
            return scale
        weights = class_weights(ce_weight, target, torch.float64)
        return scale * float(weights[valid].mean())
