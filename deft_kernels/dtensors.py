"""DTensors: logits as local tensors and a group where the vocabulary is sharded, heads gathered whole."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .core import checks
from .core.agreement import validating
from .core.groups import VocabShard, total
from .core.inputs import ahead
from .core.reduction import class_weights
from .core.settings import Request
from .core.statistics import RowStatistics, loss_dtype
from .objectives import Objective
from .row_objectives import RowObjective


def refuse_dtensors(tensors: dict[str, Any], of: str) -> None:
    """TypeError for a DTensor among arguments of a call whose `of` is a plain tensor."""
    for name, tensor in tensors.items():
        if is_dtensor(tensor):
            raise TypeError(
                f"{name}: is a DTensor, {of} is a plain tensor; pass {name}.to_local() or .full_tensor(), or "
                f"{of} as a DTensor where it may be one"
            )


def is_dtensor(tensor: Any) -> bool:
    """Without importing the class, which takes most of a second: a DTensor exists only after that import."""
    # Not by sys.modules: Dynamo would read all of it, and fails where another thread imports meanwhile.
    module = getattr(torch.distributed, "tensor", None)
    return module is not None and isinstance(tensor, module.DTensor)


class _Layout:
    """How the logits lie on their mesh: at most one mesh dimension splits the vocabulary, others the rows."""

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
        # Placements and shape of the labels, and of everything else with one number a row.
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
            if tensor.device_mesh != self.mesh:
                raise ValueError(f"{name}: lies on {tensor.device_mesh}, the logits on {self.mesh}")
            return tensor.redistribute(self.mesh, self.rows).to_local()
        if self.batch:
            raise TypeError(
                f"{name}: the logits are a DTensor with sharded rows; expected a DTensor too: nothing says "
                "which rows a plain tensor holds"
            )
        return tensor

    def number(self, tensor: Any, name: str) -> Any:
        """A number of the whole batch, as a plain tensor; each rank computes a part of its gradient."""
        from torch.distributed.tensor import DTensor, Partial, Replicate

        if not isinstance(tensor, Tensor):
            return tensor
        replicated = [Replicate()] * self.mesh.ndim
        if not is_dtensor(tensor):
            if not tensor.requires_grad:
                return tensor
            tensor = DTensor.from_local(tensor, self.mesh, replicated, run_check=False)
        elif tensor.device_mesh != self.mesh:  # type: ignore[attr-defined]
            raise ValueError(f"{name}: lies on {tensor.device_mesh}, the logits on {self.mesh}")  # type: ignore
        parts = [Partial() if i in self.batch else Replicate() for i in range(self.mesh.ndim)]
        whole: Any = tensor
        return whole.redistribute(self.mesh, replicated).to_local(grad_placements=parts)

    def position(self, local: int) -> int:
        """The flat index among all rows of a flat index among this rank's."""
        from torch.distributed.tensor import Shard

        coordinate = self.mesh.get_coordinate() or ()
        begin, length = [0] * len(self.shape), list(self.shape)
        for i, placement in enumerate(self.rows):
            if isinstance(placement, Shard):
                dim = placement.dim % (len(self.shape) + 1)
                step = -(-length[dim] // self.mesh.size(i))
                first = min(length[dim], coordinate[i] * step)
                begin[dim], length[dim] = begin[dim] + first, min(step, length[dim] - first)
        flat, stride = 0, 1
        for offset, size, whole in zip(reversed(begin), reversed(length), reversed(self.shape), strict=True):
            local, index = divmod(local, size)
            flat, stride = flat + (offset + index) * stride, stride * whole
        return flat

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


def loss_of_dtensor(call: Callable[..., Any], logits: Any, labels: Any, request: Request) -> Any:
    """`call`, which is `functional.loss_of_logits`, on the local tensors; what comes back is a DTensor again.

    The rows of all ranks are one batch: a mean divides by the number of all of them, as `F.cross_entropy` of
    DTensors does, and `cayley` takes the mean p over all of them.
    """
    layout = _checked(logits, labels, request)
    checks.check_token_weight(request.token_weight, labels, logits)
    checks.check_class_weight(request.class_weight, logits, logits.shape[-1])
    weight: Any = request.class_weight
    terms, objective = request.terms(), request.objective
    if terms is not None:
        terms.check(labels)
    if isinstance(objective, RowObjective):
        objective = objective.mapped(lambda x, name: x if x.dim() == 0 else layout.local(x, name))
    labels = layout.local(labels, "labels")
    request = request._replace(
        token_weight=layout.local(request.token_weight, "token_weight"),
        class_weight=weight.full_tensor() if is_dtensor(weight) else weight,
        num_items=layout.number(request.num_items, "num_items"),
        reference_logp=layout.local(request.reference_logp, "reference_logp"),
        objective=objective,
        group=layout.group,
    )
    if layout.batch:
        request = request._replace(objective=_over_all_rows(layout, request))
        request = request._replace(num_items=_count_all_rows(layout, logits, labels, request))
    # Every rank that holds the same columns computes the same gradient: placements as the logits'.
    local = logits.to_local()
    # Inference mode counts no versions, and knows no later use that could raise.
    counted = request.inplace and not local.is_inference()
    before = local._version if counted else 0
    if counted and local.requires_grad:
        _move_version(local, logits)
    result = call(local, labels, request)
    if counted and local._version != before:
        torch.autograd.graph.increment_version(logits)
    loss, stats = result if request.return_stats else (result, None)
    loss = layout.row_tensor(loss) if request.reduction == "none" else layout.sum(loss)
    return (loss, _record(layout, stats)) if stats is not None else loss


def _move_version(local: Tensor, logits: Any) -> None:
    """Once the backward has overwritten `local`, a later use of the DTensor in autograd raises too.

    A DTensor has a version counter of its own, which an operation on its local tensor leaves alone.
    """
    held = [logits]

    def overwritten(_gradient: Tensor) -> None:
        if held:  # dropped, as the hook lives as long as the loss
            torch.autograd.graph.increment_version(held.pop())

    local.register_hook(overwritten)


def statistics_of_dtensor(
    call: Callable[..., RowStatistics], logits: Any, labels: Any, request: Request
) -> RowStatistics:
    """`call`, `functional.statistics_of_logits`, on the local tensors; statistics lie as the logits' rows."""
    layout = _checked(logits, labels, request)
    labels = layout.local(labels, "labels")
    if layout.batch:
        _count_all_rows(layout, logits, labels, request._replace(reduction="none"))
    return _record(layout, call(logits.to_local(), labels, request._replace(group=layout.group)))


def _record(layout: _Layout, stats: RowStatistics) -> RowStatistics:
    return RowStatistics(*(None if s is None else layout.row_tensor(s) for s in stats))  # type: ignore[arg-type]


def _checked(logits: Any, labels: Any, request: Request) -> _Layout:
    """The logits' layout. Raises, before anything is sent, for errors that all ranks see: shapes are
    global."""
    if request.group is not None:
        raise ValueError("group: the logits are a DTensor, whose mesh says who holds which columns")
    checks.check_logits(logits)
    layout = _Layout(logits)
    checks.check_labels(labels, logits)
    if request.shift and layout.time_is_split:
        raise ValueError("shift: the time dimension is sharded; shift the labels beforehand")
    return layout


def _over_all_rows(layout: _Layout, request: Request) -> Any:
    """The objective, with the mean p of `cayley` that of the rows of all ranks."""
    objective = request.objective
    if not isinstance(objective, Objective | RowObjective):
        return objective
    own_mean = request.reduction == "mean" and request.num_items is None
    if objective.has_band and own_mean:
        raise ValueError("objective: a band on p with a mean over rows that are sharded: pass num_items")
    if isinstance(objective, RowObjective) or not objective.needs_batch or objective.batch_group:
        return objective
    if len(layout.batch) > 1:
        raise ValueError(
            "objective: cayley's mean p over rows that two mesh dimensions shard; pass mean_prob or "
            "batch_group"
        )
    return replace(objective, batch_group=layout.mesh.get_group(layout.batch[0]).group_name)


def _count_all_rows(layout: _Layout, logits: Any, labels: Tensor, request: Request) -> Any:
    """num_items: the mean's denominator, over the rows of all ranks. Also checks the labels' range.

    If the ranks exchange the denominator, the number of wrong labels is sent with it, and all ranks raise.
    Otherwise that would need a message of its own, which is sent with validation only; without it only the
    rank with the wrong label raises.
    """
    ignore_index, size, weight = request.ignore_index, logits.shape[-1], request.class_weight
    counted = labels.long()
    if request.shift:
        counted = ahead(counted, request.shift, ignore_index)
    valid = counted != ignore_index
    wrong = ((counted < 0) | (counted >= size)) & valid
    visible = labels.device.type == "cpu" or validating()
    own_mean = request.reduction == "mean" and request.num_items is None
    dtype = loss_dtype(logits.dtype)
    kept = valid if weight is None else torch.where(valid, class_weights(weight, counted, dtype), 0.0)
    sums = torch.stack([kept.sum().to(dtype), wrong.sum().to(dtype)])
    if own_mean or validating():
        layout.total(sums)
    if visible and bool(wrong.any()):
        local = int(wrong.flatten().nonzero()[0])
        raise IndexError(
            f"labels: {int(counted.flatten()[local])} at flat position {layout.position(local)} of all rows "
            f"is outside [0, {size}) and is not ignore_index ({ignore_index})"
        )
    if visible and sums[1] > 0:
        raise IndexError(
            f"labels: another rank's rows hold a label outside [0, {size}) that is not ignore_index "
            f"({ignore_index}); the error of that rank says where"
        )
    return sums[0] if own_mean else request.num_items


def whole(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """(hidden, weight, bias) with the DTensors among weight and bias gathered.

    Their gradient is averaged over the ranks, as DDP and FSDP do by default for ranks with different rows;
    their settings are not known here. If all ranks have the same rows, as under tensor parallelism, the
    average is each rank's own gradient.
    Raises: TypeError for a hidden that is a DTensor, as the rows are each rank's own.
    """
    if is_dtensor(hidden):
        raise TypeError("hidden: is a DTensor; pass this rank's rows: hidden.to_local() or .full_tensor()")
    return hidden, _gathered(weight), _gathered(bias)


def _gathered(tensor: Any) -> Any:
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    # A sum and a division: gloo has no reduction that averages.
    local: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / mesh.size())
    return local
