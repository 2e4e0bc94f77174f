"""transformers: three places where a `Trainer`, or any loop, takes the loss from.

    apply(trainer)                  the trainer's compute_loss_func, with its settings checked and logs added
    set_loss_function(model)        model.loss_function: inside the forward, on the model's own logits
    patch_model(model)              inside the forward, from hidden states, without logits

`compute_loss_func` and `for_causal_lm` are the bare functions behind the first two.
"""

from __future__ import annotations

from typing import Any

from ..calls import RowLoss
from ..objectives import Objective
from .logits import ComputeLoss, ForCausalLM, compute_loss_func, for_causal_lm
from .patching import patch_model, set_loss_function, unpatch_model
from .running import RunningStatistics

__all__ = [
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


def apply(
    trainer: Any,
    objective: str | Objective | RowLoss = "deft",
    *,
    log_statistics: bool = True,
    **keywords: Any,
) -> RunningStatistics:
    """Give a `Trainer` the gated loss as its compute_loss_func, check its settings, and log the statistics.

    Args: trainer: a transformers `Trainer` (for TRL's use `integrations.trl.apply`); objective and keywords
        as in `ComputeLoss`; log_statistics: add a `StatisticsCallback`.
    Returns: the `RunningStatistics` that are logged.
    Raises: ValueError for settings that would be ignored: a compute_loss_func of its own,
        label_smoothing_factor, Liger's fused flag, context parallelism; each with what to do.
    """
    from .callback import StatisticsCallback

    statistics = RunningStatistics()
    loss = ComputeLoss(objective, statistics=statistics, **keywords)
    if type(trainer).__module__.startswith("trl."):
        raise ValueError("trainer: is TRL's; use deft_kernels.integrations.trl.apply(trainer)")
    check_trainer(trainer)
    trainer.compute_loss_func = loss
    if log_statistics:
        StatisticsCallback(statistics).add_to(trainer)
    return statistics


def check_trainer(trainer: Any) -> None:
    """Raises ValueError for settings of a trainer that its compute_loss_func would make void."""
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func: the trainer has one already; leave it out, or do not call apply")
    refuse_label_smoothing(trainer.args)
    if fused_by_liger(trainer.args):
        raise ValueError(
            "use_liger_kernel: its fused cross-entropy makes no logits for compute_loss_func. Call "
            "deft_kernels.integrations.liger.install(model=trainer.model) instead of apply, or set "
            'liger_kernel_config={"fused_linear_cross_entropy": False}'
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "parallelism_config: under context or sequence parallelism compute_loss_func sees a part of each "
            "sequence and cannot shift its labels; use set_loss_function(model) or patch_model(model)"
        )


def fused_by_liger(args: Any) -> bool:
    config = getattr(args, "liger_kernel_config", None) or {}
    return bool(getattr(args, "use_liger_kernel", False)) and config.get("fused_linear_cross_entropy", True)


def refuse_label_smoothing(args: Any) -> None:
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            "label_smoothing_factor: the trainer's own smoothing replaces the gated loss or is ignored; set "
            "it to 0 and pass label_smoothing= to the gated loss"
        )
