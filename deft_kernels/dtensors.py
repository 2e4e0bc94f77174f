"""Logits that are DTensors: on local tensors, by the call's own `group=` where the vocabulary is sharded."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .objectives import Objective, resolve
from .parallel import VocabShard, total
from .reductions import class_weights
from .statistics import RowStatistics


def is_dtensor(tensor: Any) -> bool:
    """Without importing the class, which takes a good part of a second: who has one has imported it."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


class _Layout:
    """How the logits lie on their mesh: one mesh dimension at most splits the vocabulary, others the rows."""

    def __init__(self, logits: Any):
        from torch.distributed.tensor import Replicate, Shard

        self.mesh, last = logits.device_mesh, logits.dim() - 1
        for placement in logits.placements:
            if type(placement) not in (Replicate, Shard):
                raise ValueError(f"logits: expected Shard or Replicate placements, got {placement}")
        dims = [p.dim % logits.dim() if p.is_shard() else None for p in logits.placements]
        split = [i for i, dim in enumerate(dims) if dim == last]
        if len(split) > 1:
            raise ValueError(f"logits: the vocabulary is sharded over the mesh dimensions {split}, not one")
        self.batch = [i for i, dim in enumerate(dims) if dim is not None and dim != last]
        self.time_is_split = last - 1 in dims
        # Of the labels, and of whatever else has one number a row.
        self.rows = [p if i in self.batch else Replicate() for i, p in enumerate(logits.placements)]
        self.shape = logits.shape[:-1]
        self.group: VocabShard | None = None
        if split:
            size, ranks = logits.shape[last], self.mesh.size(split[0])
            start = min(size, self.mesh.get_local_rank(split[0]) * -(-size // ranks))
            self.group = VocabShard(self.mesh.get_group(split[0]), start, size)

    def local(self, tensor: Any, name: str) -> Any:
        """This rank's rows of `tensor`; a plain tensor holds all rows."""
        if tensor is None:
            return None
        if is_dtensor(tensor):
            return tensor.redistribute(self.mesh, self.rows).to_local()
        if self.batch:
            raise TypeError(f"{name}: the logits are a DTensor with sharded rows; expected a DTensor too")
        return tensor

    def row_tensor(self, local: Tensor) -> Any:
        """One number a row, as a DTensor."""
        from torch.distributed.tensor import DTensor

        stride = local.new_empty(()).expand(self.shape).contiguous().stride() if self.shape else ()
        return DTensor.from_local(
            local, self.mesh, self.rows, run_check=False, shape=self.shape, stride=stride
        )

    def sum(self, local: Tensor) -> Any:
        """The sum over the ranks with rows of their own, as a replicated DTensor; differentiable."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        placements = [Partial() if i in self.batch else Replicate() for i in range(self.mesh.ndim)]
        partial = DTensor.from_local(local, self.mesh, placements, run_check=False)
        return partial.redistribute(self.mesh, [Replicate()] * self.mesh.ndim)

    def total(self, tensor: Tensor) -> Tensor:
        for i in self.batch:
            total(tensor, self.mesh.get_group(i).group_name)
        return tensor


def _whole(tensor: Any) -> Any:
    return tensor.full_tensor() if is_dtensor(tensor) else tensor


def loss_of_dtensor(call: Callable[..., Any], logits: Any, labels: Any, keywords: dict[str, Any]) -> Any:
    """`call`, which is `deft_loss`, on the local tensors; what comes back is a DTensor again.

    The rows of all ranks are one batch: a mean divides by the number of all of them, as `F.cross_entropy` of
    DTensors does, and `cayley` takes the mean p over all of them.
    """
    if keywords["group"] is not None:
        raise ValueError("group: the logits are a DTensor, whose mesh says who holds which columns")
    layout = _Layout(logits)
    if layout.time_is_split and keywords["shift"]:
        raise ValueError("shift: the time dimension is sharded; shift the labels beforehand")
    labels = layout.local(labels, "labels")
    keywords |= {name: _whole(keywords[name]) for name in ("weight", "num_items")}
    keywords["token_weight"] = layout.local(keywords["token_weight"], "token_weight")
    if layout.batch:
        _over_all_rows(layout, labels, keywords)
    # Every rank that holds the same columns computes the same gradient: placements as the logits'.
    result = call(logits.to_local(), labels, **keywords | {"group": layout.group})
    loss, stats = result if keywords["return_stats"] else (result, None)
    loss = layout.row_tensor(loss) if keywords["reduction"] == "none" else layout.sum(loss)
    return (loss, _record(layout, stats)) if stats is not None else loss


def statistics_of_dtensor(
    call: Callable[..., RowStatistics], logits: Any, labels: Any, keywords: dict[str, Any]
) -> RowStatistics:
    """`call`, which is `row_statistics`, on the local tensors; statistics lie as the logits' rows do."""
    if keywords["group"] is not None:
        raise ValueError("group: the logits are a DTensor, whose mesh says who holds which columns")
    layout = _Layout(logits)
    if layout.time_is_split and keywords["shift"]:
        raise ValueError("shift: the time dimension is sharded; shift the labels beforehand")
    labels = layout.local(labels, "labels")
    return _record(layout, call(logits.to_local(), labels, **keywords | {"group": layout.group}))


def _record(layout: _Layout, stats: RowStatistics) -> RowStatistics:
    return RowStatistics(*(None if s is None else layout.row_tensor(s) for s in stats))  # type: ignore[arg-type]


def _over_all_rows(layout: _Layout, labels: Tensor, keywords: dict[str, Any]) -> None:
    """Make the mean's denominator and cayley's mean p those of the rows of all ranks."""
    objective = keywords["objective"]
    described = objective if callable(objective) else resolve(objective)
    banded = isinstance(described, Objective) and described.has_band
    if isinstance(described, Objective) and described.needs_batch and not described.batch_group:
        if len(layout.batch) > 1:
            raise ValueError(
                "objective: cayley's mean p over rows that two mesh dimensions shard; pass mean_prob or "
                "batch_group"
            )
        name = layout.mesh.get_group(layout.batch[0]).group_name
        described = replace(described, batch_group=name)
    keywords["objective"] = described
    if keywords["reduction"] != "mean" or keywords["num_items"] is not None:
        return
    if banded:
        raise ValueError("objective: a band on p with a mean over rows that are sharded: pass num_items")
    if keywords["shift"]:
        counted = torch.nn.functional.pad(labels[..., 1:], (0, 1), value=keywords["ignore_index"])
    else:
        counted = labels
    valid = counted != keywords["ignore_index"]
    if keywords["weight"] is None:
        count = valid.sum().float()
    else:
        weights = class_weights(keywords["weight"], counted.long(), torch.float32)
        count = torch.where(valid, weights, 0.0).sum()
    count = layout.total(count)
    keywords["num_items"] = torch.where(count == 0, 1.0, count)
