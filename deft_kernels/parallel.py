"""Process groups: a vocabulary split between ranks, and the only messages there are.

    gathered     the states of all ranks, one all-gather a forward (a chunk, in the linear call)
    total        one all-reduce: the hidden states' gradient, and the numbers of a batch's mean p
    _place       the columns before a rank's own, once for each group and width, unless given

Groups travel by name, which fits an operator's schema and which torch.compile takes for a constant.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from . import arguments

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class VocabShard(NamedTuple):
    """A vocabulary split between the ranks of a group, each of which holds consecutive columns of it.

    group: the ranks, in any order.  start: the vocabulary's index of this rank's first column.  size: V, the
    number of columns of all ranks. Given as `group=`, it saves the message that finds out start and size.
    """

    group: ProcessGroup
    start: int
    size: int


class Shard(NamedTuple):
    """A `VocabShard` that fits an operator's schema: the group by name, and the number of its ranks."""

    start: int
    size: int
    ranks: int
    group: str


def group_name(group: Any, name: str = "group") -> str:
    """The name of a process group. Raises: TypeError for anything else, ValueError for a foreign group."""
    from torch import distributed

    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        hint = "; a DeviceMesh has them: mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup, got {type(group).__name__}{hint}"
        )
    return group.group_name


def _group(name: str) -> Any:
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore


def resolved(group: ProcessGroup | VocabShard, width: int, device: torch.device) -> Shard:
    """Which columns of a vocabulary this rank's `width` are.

    Raises: TypeError for what is no group, ValueError for a place that the columns do not fit.
    """
    if not isinstance(group, VocabShard):
        name = group_name(group)
        start, size = _place(name, width, str(device))
        return Shard(start, size, group.size(), name)
    name = group_name(group.group)
    start = arguments.integer("group: VocabShard.start", group.start)
    size = arguments.integer("group: VocabShard.size", group.size)
    if start < 0 or start + width > size:
        raise ValueError(f"group: VocabShard(start={start}, size={size}) has no place for {width} columns")
    return Shard(start, size, group.group.size(), name)


_places: WeakKeyDictionary[Any, dict[int, tuple[int, int]]] = WeakKeyDictionary()


def _place(name: str, width: int, device: str) -> tuple[int, int]:
    """(columns of the ranks before this one, columns of all ranks); asked for once for each group and width.

    All ranks have to ask together: widths that change on some ranks of a group only want a `VocabShard`.
    """
    group = _group(name)
    known = _places.setdefault(group, {})
    if width not in known:
        widths = _all_gather(torch.tensor([width], device=device), group).flatten().tolist()
        rank = group.rank()
        known[width] = sum(widths[:rank]), sum(widths)
    return known[width]


# What torch.compiler.assume_constant_result does, without the second that importing the compiler takes: a
# trace asks for real, once, and keeps the answer.
_place._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _all_gather(tensor: Tensor, group: Any) -> Tensor:
    from torch import distributed

    # torch 2.13 renamed it, and warns of the old name.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    output = tensor.new_empty((group.size() * tensor.shape[0], *tensor.shape[1:]))
    gather(output, tensor.contiguous(), group=group)
    return output.view(group.size(), *tensor.shape)


def gathered(states: Tensor, shard: Shard) -> Tensor:
    """States [N, size] of every rank, [ranks, N, size], by one all-gather; by none for a single rank."""
    if shard.ranks == 1 or states.numel() == 0:
        return states.expand(shard.ranks, *states.shape)
    return _all_gather(states, _group(shard.group))


def total(tensor: Tensor, name: str) -> Tensor:
    """The sum over a group's ranks, in place."""
    from torch import distributed

    distributed.all_reduce(tensor, group=_group(name))
    return tensor


def batch_mean(logp: Tensor, valid: Tensor, group: str) -> Tensor:
    """Mean p over the valid rows, a scalar tensor; 0 when there are none. A NaN row stays out of it.

    group: also over the rows of its ranks, by an all-reduce of two numbers; empty for none.
    """
    valid = valid & ~logp.isnan()
    sums = torch.stack([torch.where(valid, logp.exp(), 0.0).sum(), valid.sum().to(logp.dtype)])
    if group:
        sums = total(sums, group)
    return sums[0] / sums[1].clamp(min=1)
