"""TRL's SFTTrainer: the gated loss from the statistics of its fused head; before 1.15 by compute_loss_func.

TRL >= 1.15 makes log-probabilities, entropy and ln sum p^2 of each token without logits, and its loss is
their sum over the number of tokens: there only the row formula is missing, `gated_loss`. Earlier versions
take a compute_loss_func.
"""

from __future__ import annotations

import inspect
import types
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..backends.pytorch.objectives import evaluate, outside_band
from ..core.arguments import flag
from ..core.groups import batch_mean
from ..core.keywords import showing
from ..core.statistics import Field, RowStatistics
from ..gated import gated_loss
from ..objectives import Objective, resolve
from ._shared.caller import Argument
from ._shared.checks import check_trainer, refuse_label_smoothing
from ._shared.columns import Columns, named_by
from ._shared.logits import ComputeLoss
from ._shared.patching import BEFORE, RECORD, Before
from ._shared.running import RunningStatistics
from ._shared.settings import LogitsKeywords

FUSED_OUTPUTS = ("log_probs", "entropy", "log_sum_sq_probs", "is_top1")


@showing(LogitsKeywords)
def apply(
    trainer: Any,
    objective: str | Objective = "deft",
    *,
    log_statistics: bool = True,
    columns: Columns | None = None,
    shift: bool = True,
    **keywords: Unpack[LogitsKeywords],
) -> RunningStatistics:
    """Give an `SFTTrainer` the gated loss, between its construction and train(); its own metrics stay.

    TRL >= 1.15: rewrites the per-token log-probabilities that the fused head returns while training, so no
    logits are made; evaluation keeps TRL's loss, plain cross-entropy. Earlier: compute_loss_func, on logits.

    Args:
        trainer: an `SFTTrainer`, its loss_type "nll".
        objective: a name or an `Objective`. With the fused head: none that needs max p, that is a function of
            `RowStatistics`, or that differentiates through sum p^2.
        log_statistics: add a `StatisticsCallback`, else a `ProofCallback`.
        columns: `Columns` of its data sets, whose channels are logged too. Not with packing, which drops all
            columns but TRL's own.
        shift, keywords: as in `transformers.ComputeLoss`, before TRL 1.15; the fused head has none.
    Returns: the `RunningStatistics` that are logged.
    Raises: TypeError for another trainer; ValueError for loss_type "dft" or "chunked_nll",
        label_smoothing_factor, a compute_loss_func, Liger's fused flag, DeepSpeed sequence parallelism, and
        objectives that the fused head has no statistics for; each with what to do.
    """
    from trl.trainer.sft_trainer import SFTTrainer

    from .callback import ProofCallback, StatisticsCallback

    if not isinstance(trainer, SFTTrainer):
        raise TypeError(f"trainer: expected an SFTTrainer, got {type(trainer).__name__}")
    loss_type = getattr(trainer.args, "loss_type", "nll")
    if loss_type != "nll":
        why = {
            "chunked_nll": "which makes its own plain cross-entropy and no logits",
            "dft": 'which is a gated loss of its own (the same is objective="dft" here)',
        }.get(loss_type, "unknown here")
        raise ValueError(f'loss_type: is {loss_type!r}, {why}; set SFTConfig(loss_type="nll")')
    refuse_label_smoothing(trainer.args)
    flag("log_statistics", log_statistics)
    statistics = RunningStatistics(named_by(columns))
    if columns is not None and getattr(trainer.args, "packing", False):
        raise ValueError("columns: not available with packing, which drops all columns but TRL's own")
    if _has_fused_head():
        rewritten = _GatedLogProbs(objective, statistics, columns)
        _rewrite(trainer, rewritten, [*keywords, *([] if shift else ["shift"])])
    else:
        loss = ComputeLoss(objective, statistics=statistics, columns=columns, shift=shift, **keywords)
        check_trainer(trainer)
        trainer.compute_loss_func = loss
    if columns is not None:
        columns.attach(trainer)
    callback = StatisticsCallback(statistics) if log_statistics else ProofCallback(statistics.calls)
    callback.add_to(trainer)
    return statistics


def _has_fused_head() -> bool:
    import trl
    from packaging.version import Version

    return Version(trl.__version__) >= Version("1.15")


def _rewrite(trainer: Any, rewritten: _GatedLogProbs, asked: list[str]) -> None:
    from trl.trainer.sft_trainer import SFTTrainer
    from trl.trainer.utils import add_fused_lm_head

    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func: runs the backbone twice in TRL >= 1.15; leave it out, apply replaces it"
        )
    for name in asked:
        raise TypeError(
            f"{name}: not a setting of TRL's fused head; use a transformers Trainer with patch_model(model)"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.sp_enabled:
        raise ValueError(
            "parallelism_config: under DeepSpeed sequence parallelism TRL trains the model's own plain loss; "
            "use context parallelism, or a transformers Trainer with patch_model(model)"
        )
    num_items = Argument(SFTTrainer.compute_loss, "num_items_in_batch")
    model = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    earlier = vars(model).get(RECORD)
    # Of an earlier trainer, whose forward the new one has wrapped and does not come to.
    replaces = isinstance(earlier, _GatedLogProbs) and model.forward != types.MethodType(
        earlier.forward, model
    )
    if earlier is not None and not replaces:
        raise ValueError("trainer: its model has a gated loss already; apply once, without patch_model")
    add_fused_lm_head(model, outputs=FUSED_OUTPUTS)
    before, fused = Before(model, "forward"), model.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not (kwargs.get("fused_lm_head") and self.training and torch.is_grad_enabled()):
            return fused(*args, **kwargs)
        # Asked before the model runs: a compiled forward breaks here, and is one graph from here on.
        own_mean = _without_num_items(num_items)
        return getattr(self, RECORD)(fused(*args, **kwargs), own_mean)

    forward.__signature__ = inspect.signature(fused)  # type: ignore[attr-defined]
    rewritten.forward = forward
    setattr(model, RECORD, rewritten)
    setattr(model, BEFORE, before)
    model.forward = types.MethodType(forward, model)


@torch.compiler.disable  # type: ignore[untyped-decorator]  # what calls a compiled forward has a frame
def _without_num_items(num_items: Argument) -> bool:
    """Whether the SFTTrainer that runs this forward was given no number of items to divide by.

    A compute_loss of the user's own may have dropped it. One that does not come to SFTTrainer's divides by
    what it likes, which is its own affair.
    """
    return num_items.value(otherwise=0) is None


class _GatedLogProbs:
    """Outputs of the fused head, with minus the gated loss where the log-probabilities were."""

    forward: Any = None  # the model's, that comes here

    def __init__(self, objective: Any, statistics: RunningStatistics, columns: Columns | None):
        self.objective = resolve(objective)
        self.statistics, self.columns = statistics, columns
        if self.objective.focus == "max_prob":
            raise ValueError("objective: TRL's fused head gives no max p; use deft(order=2) or order=1")
        if not self.objective.detach and self.objective.focus == "collision":
            raise ValueError(
                "objective: TRL's sum p^2 carries no gradient, so detach=False cannot be honoured"
            )

    def __call__(self, outputs: Any, own_mean: bool) -> Any:
        logp, mask = outputs.log_probs, outputs.label_mask
        channel = weight = None
        if self.columns is not None:
            # The mask as the labels are, before TRL shifted them.
            channel, weight = self.columns.of(torch.nn.functional.pad(mask, (1, 0)), shift=True)
        rows = gated_loss(
            logp, outputs.log_sum_sq_probs, entropy=outputs.entropy, objective=self.objective, valid=mask
        )
        if weight is not None:
            rows = rows * weight[..., :-1]
        self._record(logp.detach(), outputs, channel)
        self.statistics.calls.note(rows, own_mean=own_mean)
        # The model's own loss is removed, so that it cannot be trained by mistake.
        return type(outputs)(**{**outputs, "log_probs": -rows, "loss": None})

    def _record(self, logp: Tensor, outputs: Any, channel: Tensor | None) -> None:
        mask = outputs.label_mask
        collision = outputs.log_sum_sq_probs.exp().masked_fill(~mask, 0.0)
        entropy = outputs.entropy.detach()
        mean_prob: Any = self.objective.mean_prob
        if self.objective.needs_batch:
            mean_prob = batch_mean(logp, mask, self.objective.batch_group)
        fields = {Field.LOGP: logp, Field.COLLISION: collision, Field.ENTROPY: entropy}
        value = evaluate(self.objective, fields, mean_prob)
        dropped = outside_band(self.objective, logp.exp()) | ~mask
        gate, alpha = value.gate.masked_fill(dropped, 0.0), value.alpha.masked_fill(~mask, 0.0)
        unknown = torch.zeros_like(logp)
        top1 = outputs.is_top1.bool()
        rows = RowStatistics(logp, unknown, collision, entropy, unknown, top1, alpha, gate)
        self.statistics.add(rows, mask, channel)
