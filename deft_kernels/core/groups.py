"""Process groups: a vocabulary that is split between ranks, and all messages that ranks send.

    all_gather   the states of all ranks, once a forward (a chunk, in the linear call), by `agreement`
    total        one all-reduce: the hidden states' gradient, and the numbers of a batch's mean p
    _place       the columns before a rank's own, asked for once for each group, unless given

Groups are passed by name: a name fits an operator's schema, and torch.compile takes it as a constant.
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
    number of columns of all ranks. Given as `group=`, it saves the message by which ranks ask for start and
    size.
    """

    group: ProcessGroup
    start: int
    size: int


class Shard(NamedTuple):
    """A `VocabShard` that fits an operator's schema: the group by name, and the number of its ranks.

    width: the number of this rank's columns when the ranks last asked each other; -1 if the place is given.
    """

    start: int
    size: int
    ranks: int
    group: str
    width: int = -1


def group_name(group: Any, name: str = "group") -> str:
    """The name of a process group. Raises: TypeError for anything else, ValueError for a foreign group."""
    from torch import distributed

    if not distributed.is_available() or not isinstance(group, distributed.ProcessGroup):
        hint = "; a DeviceMesh has them: mesh.get_group()" if hasattr(group, "get_group") else ""
        raise TypeError(
            f"{name}: expected a torch.distributed.ProcessGroup, got {type(group).__name__}{hint}"
        )
    return group.group_name


def group_of(name: str) -> Any:
    """The process group of that name."""
    from torch.distributed import distributed_c10d

    return distributed_c10d._resolve_process_group(name)  # type: ignore


def resolved(group: ProcessGroup | VocabShard, width: int, device: torch.device) -> Shard:
    """Which columns of a vocabulary this rank's `width` are.

    Raises: TypeError for what is no group, ValueError for a place that the columns do not fit.
    """
    if not isinstance(group, VocabShard):
        name = group_name(group)
        start, size, known = _place(name, width, str(device), torch.compiler.is_compiling())
        return Shard(start, size, group.size(), name, known)
    name, ranks = group_name(group.group), group.group.size()
    start = arguments.integer("group: VocabShard.start", group.start)
    size = arguments.integer("group: VocabShard.size", group.size)
    short = ranks == 1 and width != size
    if start < 0 or start + width > size or short:
        alone = "; the group has one rank, which has to hold all of them" if short else ""
        raise ValueError(
            f"group: VocabShard(start={start}, size={size}) has no place for {width} columns" + alone
        )
    return Shard(start, size, ranks, name)


# The widths of all ranks, as they were when the ranks of a group last asked each other. The key is the group
# alone, so that all ranks remember the same. With this rank's width in the key, one rank could remember what
# another has to ask for.
_widths: WeakKeyDictionary[Any, tuple[int, ...]] = WeakKeyDictionary()


def vocabulary_of(group: Any) -> int | None:
    """The number of columns that the ranks of a group last told each other; None before."""
    widths = _widths.get(group)
    return None if widths is None else sum(widths)


def remember(group: Any, widths: tuple[int, ...] | None) -> None:
    """Replace what is known of a group's columns; None: ask again. All ranks have to do it together."""
    if widths is None:
        _widths.pop(group, None)
    else:
        _widths[group] = widths


def _place(name: str, width: int, device: str, tracing: bool) -> tuple[int, int, int]:
    """(columns of the ranks before this one, columns of all ranks, columns of this one), when last asked for.

    The width may have changed since: `agreement` notices, whichever ranks it changed on. A trace keeps the
    answer as a constant, so it asks for another width at once.
    """
    group = group_of(name)
    rank, known = group.rank(), _widths.get(group)
    if known is None or (tracing and known[rank] != width):
        known = tuple(all_gather(torch.tensor([width], device=device), group).flatten().tolist())
        _widths[group] = known
    return sum(known[:rank]), sum(known), known[rank]


# What torch.compiler.assume_constant_result does, without importing the compiler, which takes a second: a
# trace asks the ranks once and keeps the answer.
_place._dynamo_marked_constant = True  # type: ignore[attr-defined]


def all_gather(tensor: Tensor, group: Any) -> Tensor:
    """[ranks, *shape] of every rank's tensor."""
    from torch import distributed

    # torch 2.13 renamed it, and warns of the old name.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    output = tensor.new_empty((group.size() * tensor.shape[0], *tensor.shape[1:]))
    gather(output, tensor.contiguous(), group=group)
    return output.view(group.size(), *tensor.shape)


def total(tensor: Tensor, name: str) -> Tensor:
    """The sum over a group's ranks, in place."""
    from torch import distributed

    distributed.all_reduce(tensor, group=group_of(name))
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
