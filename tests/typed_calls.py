"""Calls as a type checker sees them; mypy reads this file, and nothing runs it.

An ignored error that is none is an error (`warn_unused_ignores`): a misspelt keyword has to be one.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

from deft_kernels import (
    DEFTLoss,
    FusedLinearDEFTLoss,
    RowStatistics,
    VocabShard,
    deft_loss,
    fused_linear_deft_loss,
    objectives,
    row_statistics,
)
from deft_kernels.integrations import liger, megatron, nemo, transformers, trl

WRONG: Literal["men"] = "men"


def returned(logits: Tensor, hidden: Tensor, head: Tensor, labels: Tensor, asked: bool) -> None:
    assert_type(deft_loss(logits, labels), Tensor)
    assert_type(deft_loss(logits, labels, return_stats=True), tuple[Tensor, RowStatistics])
    assert_type(deft_loss(logits, labels, return_stats=asked), Tensor | tuple[Tensor, RowStatistics])
    assert_type(fused_linear_deft_loss(hidden, head, labels, None), Tensor)
    assert_type(row_statistics(logits, labels, softcap=30.0), RowStatistics)


def accepted(logits: Tensor, labels: Tensor, shard: VocabShard) -> None:
    deft_loss(logits, labels, objective="eaft", reduction="none", token_weight=torch.ones(3), z_loss=1e-4)
    deft_loss(logits, labels, objective=lambda r: -r.logp, num_items=3, group=shard, inplace=True)
    DEFTLoss(objective=objectives.cayley(), label_smoothing=0.1, grad_in_forward=None)(
        logits, labels, num_items=torch.tensor(3)
    )


def refused(logits: Tensor, hidden: Tensor, head: Tensor, labels: Tensor) -> None:
    deft_loss(logits, labels, redaction="mean")  # type: ignore[call-overload]
    deft_loss(logits, labels, reduction=WRONG)  # type: ignore[call-overload]
    deft_loss(logits, labels, chunk_bytes=2**20)  # type: ignore[call-overload]
    deft_loss(logits, labels, softcap="30")  # type: ignore[call-overload]
    fused_linear_deft_loss(hidden, head, labels, inplace=True)  # type: ignore[call-overload]
    row_statistics(logits, labels, z_loss=1e-4)  # type: ignore[call-arg]
    DEFTLoss(z_los=1e-4)  # type: ignore[call-arg]
    FusedLinearDEFTLoss(weight=head)  # type: ignore[call-arg]


def accepted_by_trainers(model: nn.Module, trainer: object, classes: Tensor) -> None:
    transformers.ComputeLoss("eaft", shift=False, weight=classes, temperature=0.9, grad_in_forward=True)
    transformers.set_loss_function(model, lambda r: -r.logp, inplace=True, shift=False)
    transformers.patch_model(model, objectives.tsallis(0.5), class_weight=classes, chunk_bytes=2**20)
    transformers.apply(trainer, log_statistics=False, z_loss=1e-4, shift=False)
    trl.apply(trainer, label_smoothing=0.1)
    liger.install(model=model, chunk_bytes=2**20, backend="torch")
    megatron.install("eaft", z_loss=1e-4, inplace=True)
    nemo.DEFTLoss("eaft", reduction="mean", label_smoothing=0.1)


def refused_by_trainers(model: nn.Module, trainer: object, classes: Tensor) -> None:
    transformers.ComputeLoss(z_los=1e-4)  # type: ignore[call-arg]
    transformers.ForCausalLM(reduction="sum")  # type: ignore[call-arg]
    transformers.set_loss_function(model, class_weight=classes)  # type: ignore[call-arg]
    transformers.patch_model(model, weight=classes)  # type: ignore[call-arg]
    transformers.apply(trainer, temperature="1")  # type: ignore[arg-type]
    trl.apply(trainer, num_items=3)  # type: ignore[call-arg]
    liger.install(z_loss=1e-4)  # type: ignore[call-arg]
    megatron.install(label_smoothing=0.1)  # type: ignore[call-arg]
    nemo.DEFTLoss(weight=classes)  # type: ignore[call-arg]
