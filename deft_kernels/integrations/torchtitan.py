"""torchtitan: the gated loss as a `BaseLoss`, alone or inside its `ChunkedLossWrapper`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss

from ..core.groups import VocabShard
from ..dtensors import is_dtensor
from ..functional import deft_loss
from ..objectives import Objective
from ._shared.settings import described


def summed(pred: Any, labels: Any, *, objective: Any) -> Any:
    """The sum of the rows' losses, in the signature and placements of torchtitan's cross_entropy_loss.

    pred: [B, T, V], plain or a DTensor; labels: [B, T], shifted by torchtitan already. With plain labels and
    a DTensor as pred, as in tensor parallelism alone, the loss is plain. If the labels are a DTensor, too, so
    is the loss: partial over the mesh dimensions that split the rows, as the trainer adds local parts.
    """
    keywords: dict[str, Any] = {"objective": objective, "reduction": "sum", "ignore_index": IGNORE_INDEX}
    if not is_dtensor(pred):
        return deft_loss(pred, labels, **keywords)
    mesh, last, size = pred.device_mesh, pred.dim() - 1, pred.shape[-1]
    split = [i for i, placement in enumerate(pred.placements) if placement.is_shard(last)]
    if len(split) > 1 or not (is_dtensor(labels) or (split and mesh.ndim == 1)):
        raise ValueError(f"pred: expected a DTensor sharded on the vocabulary only, got {pred.placements}")
    if split:
        start = min(size, mesh.get_local_rank(split[0]) * -(-size // mesh.size(split[0])))
        keywords["group"] = VocabShard(mesh.get_group(split[0]), start, size)
    if not is_dtensor(labels):
        return deft_loss(pred.to_local(), labels, **keywords)
    from torch.distributed.tensor import DTensor, Partial, Replicate

    rows = [Replicate() if i in split else placement for i, placement in enumerate(pred.placements)]
    loss = deft_loss(pred.to_local(), labels.redistribute(mesh, rows).to_local(), **keywords)
    return DTensor.from_local(loss, mesh, [Partial() if p.is_shard() else p for p in rows], run_check=False)


class DEFTLoss(BaseLoss):  # type: ignore[misc]  # torchtitan is untyped for mypy
    """The gated loss, summed, and divided by the global number of tokens as torchtitan divides.

        config.loss = DEFTLoss.Config(objective="deft")
        config.loss = ChunkedLossWrapper.Config(loss_fn=DEFTLoss.Config())      # logits in chunks only

    Raises: ValueError for an objective that takes a mean over the batch, which no call sees as a whole; for
        a step compiled ahead of time; for the spmd_types backend with tensor parallelism.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(BaseLoss.Config):  # type: ignore[misc]
        objective: Any = "deft"
        """A name of deft_kernels.objectives, or an Objective."""

    def __init__(self, config: Any, *, compile_config: Any = None):
        objective = described(config.objective)
        if isinstance(objective, Objective) and objective.needs_batch:
            raise ValueError(
                f"objective: {objective.name} takes a mean over the batch, and torchtitan's loss sees a "
                "micro-batch or a chunk of it; give cayley its mean_prob"
            )
        if getattr(compile_config, "precompile_artifact_dir", ""):
            raise ValueError(
                "precompile_artifact_dir: a step compiled ahead of time keeps the loss it was compiled with, "
                "and torchtitan's fingerprint of it does not tell one loss from another; leave it empty"
            )
        self.fn = partial(summed, objective=objective)
        self._maybe_compile(compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _refuse_spmd_types()
        if isinstance(pred, (list, tuple)):
            raise TypeError(
                "pred: is a list, so the model predicts several tokens ahead; the gated loss takes one "
                "prediction a token, and torchtitan's MTPLoss, which is plain cross-entropy, takes a list"
            )
        return super().__call__(pred, labels, global_valid_tokens, **others)


def _refuse_spmd_types() -> None:
    from torchtitan.distributed.spmd_types import spmd_mesh_size
    from torchtitan.distributed.utils import get_spmd_backend

    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        raise ValueError(
            "spmd_backend: spmd_types with tensor parallelism gives plain shards of the logits, which this "
            "loss would take for whole ones; use another spmd_backend"
        )
