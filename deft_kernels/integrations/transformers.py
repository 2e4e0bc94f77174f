"""transformers: three places where a `Trainer`, or any loop, takes the loss from.

    apply(trainer)                  the trainer's compute_loss_func, with its settings checked and logs added
    set_loss_function(model)        model.loss_function: inside the forward, on the model's own logits
    patch_model(model)              inside the forward, from hidden states, without logits

`compute_loss_func` and `for_causal_lm` are the bare functions behind the first two.
"""

from __future__ import annotations

from typing import Any

from typing_extensions import Unpack

from ..core.arguments import flag
from ..core.keywords import showing
from ..core.statistics import RowLoss
from ..objectives import Objective
from ._shared.checks import check_labels, check_trainer, count_all_labels
from ._shared.columns import Columns, named_by
from ._shared.logits import ComputeLoss, ForCausalLM, compute_loss_func, for_causal_lm
from ._shared.patching import patch_model, set_loss_function, unpatch_model
from ._shared.probe import refuse_own_terms
from ._shared.running import RunningStatistics
from ._shared.settings import LogitsKeywords

__all__ = [
    "Columns",
    "ComputeLoss",
    "ForCausalLM",
    "RunningStatistics",
    "apply",
    "compute_loss_func",
    "for_causal_lm",
    "patch_model",
    "set_loss_function",
    "unpatch_model",
]


@showing(LogitsKeywords)
def apply(
    trainer: Any,
    objective: str | Objective | RowLoss = "deft",
    *,
    log_statistics: bool = True,
    columns: Columns | None = None,
    shift: bool = True,
    **keywords: Unpack[LogitsKeywords],
) -> RunningStatistics:
    """Give a `Trainer` the gated loss as its compute_loss_func, check its settings, and log the statistics.

    Args: trainer: a transformers `Trainer` (for TRL's use `integrations.trl.apply`); objective, shift and
        keywords as in `ComputeLoss`; log_statistics: add a `StatisticsCallback`, else a `ProofCallback`, so
        that a trainer whose own compute_loss does not use the loss raises in both cases; columns: `Columns`
        of its data sets, whose channels are logged too.
    Returns: the loss's `RunningStatistics`, those that are logged.
    Raises: ValueError for settings that would be ignored: a compute_loss_func of its own,
        label_smoothing_factor, Liger's fused flag, DeepSpeed sequence parallelism, several ranks without
        average_tokens_across_devices; for a model whose labels are aligned with its logits, without
        shift=False; each with what to do. TypeError for another trainer.
    """
    from .callback import ProofCallback, StatisticsCallback

    flag("log_statistics", log_statistics)
    statistics = RunningStatistics(named_by(columns))
    loss = ComputeLoss(objective, statistics=statistics, columns=columns, shift=shift, **keywords)
    if type(trainer).__module__.startswith("trl."):
        raise ValueError("trainer: is TRL's; use deft_kernels.integrations.trl.apply(trainer)")
    if not hasattr(trainer, "compute_loss_func"):
        raise TypeError(f"trainer: expected a transformers Trainer, got {type(trainer).__name__}")
    check_trainer(trainer)
    refuse_own_terms(trainer.model, "apply")
    if loss.shift:
        check_labels(trainer, True)
    if columns is not None:
        columns.attach(trainer)
    trainer.compute_loss_func = loss
    if not loss.shift:
        count_all_labels(trainer)
    callback = StatisticsCallback(statistics) if log_statistics else ProofCallback(statistics.calls)
    callback.add_to(trainer)
    return statistics
