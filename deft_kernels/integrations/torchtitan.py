"""torchtitan: the gated loss as a `BaseLoss`, alone or inside its `ChunkedLossWrapper`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor
from torchtitan.components.loss import IGNORE_INDEX, BaseLoss

from ..dtensors import is_dtensor
from ..functional import deft_loss
from ..objectives import Objective
from ..parallel import VocabShard
from .settings import described


def summed(pred: Any, labels: Any, *, objective: Any) -> Any:
    """The sum of the rows' losses, in the signature of torchtitan's cross_entropy_loss.

    pred: [B, T, V], or under tensor parallelism a DTensor sharded on the last dimension; labels: [B, T],
    shifted by torchtitan already.
    """
    keywords: dict[str, Any] = {"objective": objective, "reduction": "sum", "ignore_index": IGNORE_INDEX}
    if not is_dtensor(pred) or is_dtensor(labels):
        return deft_loss(pred, labels, **keywords)
    # torchtitan keeps labels, and the loss, as plain tensors beside logits that tensor parallelism has split.
    if len(pred.placements) != 1 or not pred.placements[0].is_shard(pred.dim() - 1):
        raise ValueError(f"pred: expected a DTensor sharded on the vocabulary only, got {pred.placements}")
    size, ranks, mesh = pred.shape[-1], pred.device_mesh.size(), pred.device_mesh
    start = min(size, mesh.get_local_rank() * -(-size // ranks))
    return deft_loss(pred.to_local(), labels, group=VocabShard(mesh.get_group(), start, size), **keywords)


class DEFTLoss(BaseLoss):  # type: ignore[misc]  # torchtitan is untyped for mypy
    """The gated loss, summed, and divided by the global number of tokens as torchtitan divides.

        config.loss = DEFTLoss.Config(objective="deft")
        config.loss = ChunkedLossWrapper.Config(loss_fn=DEFTLoss.Config())      # logits in chunks only

    Raises: ValueError for an objective that takes a mean over the batch, which no call sees as a whole; for
        the spmd_types backend with tensor parallelism.
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
        self.fn = partial(summed, objective=objective)
        self._maybe_compile(compile_config)

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | None = None, **others: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        _refuse_spmd_types()
        return super().__call__(pred, labels, global_valid_tokens, **others)


def _refuse_spmd_types() -> None:
    from torchtitan.distributed.spmd_types import spmd_mesh_size
    from torchtitan.distributed.utils import get_spmd_backend

    if get_spmd_backend() == "spmd_types" and spmd_mesh_size("tp") > 1:
        raise ValueError(
            "spmd_backend: spmd_types with tensor parallelism gives plain shards of the logits, which this "
            "loss would take for whole ones; use another spmd_backend"
        )
