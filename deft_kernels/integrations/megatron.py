"""Megatron-Core: the gated loss in place of its vocabulary-parallel cross-entropy."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..functional import deft_loss
from ..objectives import Objective, resolve
from ..parallel import VocabShard
from .settings import checked

KEYWORDS = ("temperature", "z_loss", "inplace", "backend")

_originals: dict[str, Any] = {}


def install(objective: str | Objective = "deft", **keywords: Any) -> None:
    """Replace `tensor_parallel.vocab_parallel_cross_entropy` and its native fused twin, until `uninstall()`.

    `LanguageModule.compute_language_model_loss`, of which GPTModel and the other models are, looks both up at
    each call; each rank gives its shard of the vocabulary, and every rank gets each token's loss, for
    Megatron's own loss mask. One all-gather of 5 numbers a token.

    Args: objective: as in `deft_loss`; temperature, z_loss, inplace, backend: as in `deft_loss`.
    Raises: RuntimeError when it is installed already; ValueError for an objective that takes a mean over the
        batch, as the loss does not see the mask. TransformerEngine's cross-entropy (cross_entropy_fusion_impl
        "te") raises when it is called.
    """
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module

    if _originals:
        raise RuntimeError("megatron: a gated loss is installed already; call uninstall() first")
    described = resolve(objective)
    if described.needs_batch:
        raise ValueError(
            f"objective: {described.name} takes a mean over the valid tokens, and Megatron masks after the "
            "loss; give cayley its mean_prob"
        )
    settings = {"objective": described, **checked("megatron.install", KEYWORDS, keywords)}

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
    tensor_parallel.vocab_parallel_cross_entropy = vocab_parallel_cross_entropy
    language_module.fused_vocab_parallel_cross_entropy = fused_vocab_parallel_cross_entropy
    language_module.te_parallel_cross_entropy = te_parallel_cross_entropy


def uninstall() -> None:
    """Put Megatron's own functions back. Raises: RuntimeError when nothing is installed."""
    from megatron.core import tensor_parallel
    from megatron.core.models.common.language_module import language_module

    if not _originals:
        raise RuntimeError("megatron: no gated loss is installed")
    tensor_parallel.vocab_parallel_cross_entropy = _originals.pop("plain")
    language_module.fused_vocab_parallel_cross_entropy = _originals.pop("fused")
    language_module.te_parallel_cross_entropy = _originals.pop("te")


def _rows(logits: Tensor, target: Tensor, group: Any, smoothing: float, settings: dict[str, Any]) -> Tensor:
    """Each token's loss, in the shape of target. Megatron's shards are all of one size."""
    ranks, width = group.size(), logits.shape[-1]
    size = ranks * width
    shard = VocabShard(group, group.rank() * width, size) if ranks > 1 else None
    # Megatron spreads the smoothing over the classes that are not the target, deft_loss over all.
    smoothing = smoothing * size / (size - 1) if smoothing else 0.0
    return deft_loss(logits, target, reduction="none", label_smoothing=smoothing, group=shard, **settings)
