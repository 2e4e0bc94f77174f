"""Megatron-Core: the gated loss in place of its vocabulary-parallel cross-entropy."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..core.groups import VocabShard
from ..core.keywords import showing
from ..core.settings import OfBuffer, OfUser, OfZLoss
from ..functional import deft_loss
from ..objectives import Objective, resolve
from ._shared.settings import checked

_originals: dict[str, Any] = {}
_made = threading.Event()  # set when a gated loss was made, cleared when a schedule has asked


class Keywords(OfUser, OfZLoss, OfBuffer, total=False):
    """Fewer than other trainers pass on.

    label_smoothing comes from Megatron's caller. Its mask makes the mean of the rows' losses: no gradient can
    be made in the forward, and the mean would not divide by the sum of a `weight`.
    """


@showing(Keywords)
def install(objective: str | Objective = "deft", **keywords: Unpack[Keywords]) -> None:
    """Replace `tensor_parallel.vocab_parallel_cross_entropy` and its native fused form, until `uninstall()`.

    `LanguageModule.compute_language_model_loss`, of which GPTModel and the other models are, looks both up at
    each call; each rank gives its shard of the vocabulary, and every rank gets each token's loss, for
    Megatron's own loss mask. One all-gather of 5 numbers a token. Negative labels, with which its datasets
    pad where their mask is 0, count 0.

    Args: objective: as in `deft_loss`; temperature, z_loss, inplace, backend: as in `deft_loss`.
    Raises: RuntimeError when it is installed already; ValueError for an objective that takes a mean over the
        batch, as the loss does not see the mask. TransformerEngine's cross-entropy (cross_entropy_fusion_impl
        "te") raises when it is called. RuntimeError, before the backward, in a training step of Megatron's
        schedules whose model did not make the gated loss.
    """
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module
    from megatron.core.pipeline_parallel import schedules

    if _originals:
        raise RuntimeError("megatron: a gated loss is installed already; call uninstall() first")
    described = resolve(objective)
    if described.needs_batch:
        raise ValueError(
            f"objective: {described.name} takes a mean over the valid tokens, and Megatron masks after the "
            "loss; give cayley its mean_prob"
        )
    settings = {"objective": described, **checked("megatron.install", Keywords, keywords)}

    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, label_smoothing: float = 0.0
    ) -> Tensor:
        from megatron.core.parallel_state import get_tensor_model_parallel_group

        group = get_tensor_model_parallel_group()
        return _rows(vocab_parallel_logits, target, group, label_smoothing, settings)

    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: Tensor, target: Tensor, tp_group: Any
    ) -> Tensor:
        return _rows(vocab_parallel_logits, target, tp_group, 0.0, settings)

    def te_parallel_cross_entropy(*_args: Any, **_keywords: Any) -> Tensor:
        raise ValueError(
            "cross_entropy_fusion_impl: 'te' is TransformerEngine's plain cross-entropy; set it to 'native', "
            "or cross_entropy_loss_fusion=False"
        )

    _originals["plain"] = tensor_parallel.vocab_parallel_cross_entropy
    _originals["fused"] = language_module.fused_vocab_parallel_cross_entropy
    _originals["te"] = language_module.te_parallel_cross_entropy
    _originals["step"] = schedules.forward_step_calc_loss
    tensor_parallel.vocab_parallel_cross_entropy = vocab_parallel_cross_entropy
    language_module.fused_vocab_parallel_cross_entropy = fused_vocab_parallel_cross_entropy
    language_module.te_parallel_cross_entropy = te_parallel_cross_entropy
    schedules.forward_step_calc_loss = _watched(schedules.forward_step_calc_loss)


def uninstall() -> None:
    """Put Megatron's own functions back. Raises: RuntimeError when nothing is installed."""
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module
    from megatron.core.pipeline_parallel import schedules

    if not _originals:
        raise RuntimeError("megatron: no gated loss is installed")
    tensor_parallel.vocab_parallel_cross_entropy = _originals.pop("plain")
    language_module.fused_vocab_parallel_cross_entropy = _originals.pop("fused")
    language_module.te_parallel_cross_entropy = _originals.pop("te")
    schedules.forward_step_calc_loss = _originals.pop("step")
    _made.clear()


def _watched(forward_step_calc_loss: Callable[..., Any]) -> Callable[..., Any]:
    """What every schedule calls between a micro-batch's forward and its backward, with a check of the loss.

    A model with its own loss, a fusion of head and loss, a function bound before `install()`: all of them
    would train plain cross-entropy, and one sees it only by the gated loss that was not made.
    """

    @functools.wraps(forward_step_calc_loss)
    def step(model: Any, output_tensor: Any, loss_func: Any, *args: Any, **keywords: Any) -> Any:
        def checked_loss_func(*outputs: Any, **others: Any) -> Any:
            # Called on the pipeline's last stage only, where the model makes its loss.
            if torch.is_grad_enabled() and not others.get("non_loss_data") and not _made.is_set():
                raise RuntimeError(
                    "megatron: a training step went past the gated loss, so it would train another one. The "
                    "model must be given labels and make its loss by LanguageModule's "
                    "compute_language_model_loss, and call install() before anything imports Megatron's "
                    "cross-entropy by name; leave out a cross_entropy_fusion_impl other than 'native'. For a "
                    "loss that is meant to be another one, call uninstall() first"
                )
            _made.clear()
            return loss_func(*outputs, **others)

        watched = None if loss_func is None else checked_loss_func
        return forward_step_calc_loss(model, output_tensor, watched, *args, **keywords)

    return step


def _rows(logits: Tensor, target: Tensor, group: Any, smoothing: float, settings: dict[str, Any]) -> Tensor:
    """Each token's loss, in the shape of target. Megatron's shards are all of one size."""
    ranks, width = group.size(), logits.shape[-1]
    size = ranks * width
    shard = VocabShard(group, group.rank() * width, size) if ranks > 1 else None
    # Megatron distributes the smoothing over the classes that are not the target, deft_loss over all.
    smoothing = smoothing * size / (size - 1) if smoothing else 0.0
    _made.set()
    # T5's and BERT's datasets pad with -1, where their masks are 0.
    target = target.masked_fill(target < 0, -100)
    return deft_loss(logits, target, reduction="none", label_smoothing=smoothing, group=shard, **settings)
