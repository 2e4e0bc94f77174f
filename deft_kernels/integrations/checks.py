"""Settings of a transformers-style trainer that would leave the gated loss out, refused with the remedy."""

from __future__ import annotations

from typing import Any


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
