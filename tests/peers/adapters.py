"""Other packages' cross-entropies in their own signatures, as calls of this one."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from deft_kernels import deft_loss, fused_linear_deft_loss

BACKEND = os.environ.get("PEERS_BACKEND", "auto")


class NoCounterpart(NotImplementedError):
    """What the peer's call can and this package's cannot, or does otherwise; `known` lists the tests."""


def nothing_else(**others: Any) -> None:
    for name, value in others.items():
        if value is not None and value is not False:
            raise NoCounterpart(f"{name}={value!r}")


# PyTorch


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """`torch.nn.functional.cross_entropy`: classes on dimension 1, the loss in the input's dtype."""
    nothing_else(size_average=size_average, reduce=reduce)
    if target.is_floating_point():
        raise NoCounterpart("class probabilities as target")
    classes_last = input.movedim(1, -1) if input.dim() > 1 else input
    loss = deft_loss(
        classes_last,
        target,
        objective="nll",
        weight=weight,
        ignore_index=ignore_index,
        reduction=reduction,  # type: ignore[call-overload]
        label_smoothing=label_smoothing,
        backend=BACKEND,
    )
    return loss.to(input.dtype)


class CrossEntropyLoss(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


# Liger


def _of_liger(
    loss: Tensor,
    stats: Any,
    target: Tensor,
    options: dict[str, Any],
    dtype: torch.dtype,
    extras: tuple[bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    """(loss, z-loss, token accuracy, predicted tokens)"""
    return_z_loss, return_token_accuracy = extras
    valid = target != options["ignore_index"]
    z_loss = accuracy = None
    if return_z_loss:
        rows = options["z_loss"] * stats.lse**2
        sums = {"none": rows, "sum": rows.sum(), "mean": rows.sum() / valid.sum()}
        z_loss = sums[options["reduction"]].to(dtype)
    if return_token_accuracy:
        right = stats.correct.float()
        accuracy = right if options["reduction"] == "none" else right.sum() / valid.sum()
    return loss.to(dtype), z_loss, accuracy, None


class LigerCrossEntropyFunction:
    """`liger_kernel.ops.LigerCrossEntropyFunction`, on which its modules and functions rest."""

    @staticmethod
    def apply(
        _input: Tensor,
        target: Tensor,
        weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> Any:
        nothing_else(return_predicted_tokens=return_predicted_tokens)
        options = {"ignore_index": ignore_index, "z_loss": lse_square_scale, "reduction": reduction}
        options |= {"softcap": softcap or None, "label_smoothing": label_smoothing}
        result = deft_loss(
            _input, target, objective="nll", weight=weight, backend=BACKEND, return_stats=True, **options
        )
        return _of_liger(*result, target, options, _input.dtype, (return_z_loss, return_token_accuracy))


class LigerFusedLinearCrossEntropyFunction:
    """`liger_kernel.ops.LigerFusedLinearCrossEntropyFunction`; its token scaling is `dft`."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        ce_weight: Tensor | None = None,
        ignore_index: int = -100,
        lse_square_scale: float = 0.0,
        label_smoothing: float = 0.0,
        reduction: str = "mean",
        softcap: float | None = None,
        return_z_loss: bool = False,
        accum_dtype: torch.dtype | None = None,
        use_token_scaling: bool = False,
        return_token_accuracy: bool = False,
        return_predicted_tokens: bool = False,
    ) -> Any:
        nothing_else(return_predicted_tokens=return_predicted_tokens)
        options = {"ignore_index": ignore_index, "z_loss": lse_square_scale, "reduction": reduction}
        options |= {"softcap": softcap or None, "label_smoothing": label_smoothing}
        result = fused_linear_deft_loss(
            _input,
            weight,
            target,
            bias,
            objective="dft" if use_token_scaling else "nll",
            class_weight=ce_weight,
            backend=BACKEND,
            return_stats=True,
            **options,
        )
        return _of_liger(*result, target, options, result[0].dtype, (return_z_loss, return_token_accuracy))


# Apple's cut-cross-entropy


def linear_cross_entropy(
    e: Tensor,
    c: Tensor,
    targets: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    softcap: float | None = None,
    reduction: str = "mean",
    shift: bool | int = 0,
    return_lse: bool = False,
    impl: str = "",
    **others: Any,
) -> Any:
    """`cut_cross_entropy.linear_cross_entropy`: with a shift its rows are those that have a next label."""
    nothing_else(**others, return_lse=return_lse)
    steps = int(shift)
    if steps:
        e, targets = e[:, :-steps], targets[:, steps:]
    options: dict[str, Any] = {"reduction": reduction, "softcap": softcap, "ignore_index": ignore_index}
    return fused_linear_deft_loss(e, c, targets, bias, objective="nll", backend=BACKEND, **options)


# flash-attention


def softcapping(logits: Tensor, softcap: float) -> Tensor:
    """Apple's, which compiles it."""
    return torch.tanh(logits / softcap) * softcap


class FlashCrossEntropyLoss(nn.Module):
    """`flash_attn.losses.cross_entropy.CrossEntropyLoss`."""

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group: Any = None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        self.options: dict[str, Any] = {"ignore_index": ignore_index, "reduction": reduction}
        self.options |= {"label_smoothing": label_smoothing, "z_loss": lse_square_scale}
        self.options |= {
            "inplace": inplace_backward,
            "temperature": 1.0 / logit_scale,
            "group": process_group,
        }
        self.return_z_loss = return_z_loss

    def forward(self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None) -> Any:
        """A log-sum-exp that the caller has is not made use of."""
        loss, stats = deft_loss(
            input, target, objective="nll", backend=BACKEND, return_stats=True, **self.options
        )
        if not self.return_z_loss:
            return loss
        rows = self.options["z_loss"] * stats.lse**2
        return loss, rows.sum() / (target != self.options["ignore_index"]).sum()
