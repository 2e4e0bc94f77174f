"""What ranks that share a sequence need before they call a loss."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from .core import arguments, checks
from .core.groups import all_gather, group_name
from .core.inputs import ahead

__all__ = ["shifted_labels"]

LAYOUTS = ("contiguous", "zigzag")


def shifted_labels(
    labels: Tensor,
    group: Any,
    *,
    shift: int = 1,
    layout: Literal["contiguous", "zigzag"] = "contiguous",
    ignore_index: int = -100,
) -> Tensor:
    """The labels of a rank's piece of a sequence, shifted across the pieces of all ranks.

    Under context parallelism every rank of a group holds a piece of each sequence, and the label of its last
    position is the first one of another rank. Give the result to a loss with shift=False:

        labels = shifted_labels(labels, group)
        loss = deft_loss(logits, labels, num_items=count_of_all_ranks)

    Args:
        labels: [..., T_r], integer, this rank's piece; as long on every rank.
        group: the torch.distributed ranks, in the order of the pieces.
        shift: positions between a logit and its label, at most the length of a contiguous stretch.
        layout: "contiguous": rank r of R holds the r-th of R stretches; "zigzag": the r-th and the
            (2 R - 1 - r)-th of 2 R, one after the other, which shares causal attention out evenly.
        ignore_index: what the last positions of the whole sequence get.
    Returns: [..., T_r], int64.
    Raises: TypeError, ValueError for arguments that cannot be honoured.
    Communication: one all-gather of `shift` labels a stretch.
    """
    if not isinstance(labels, Tensor) or labels.dtype not in checks.INTEGERS:
        raise TypeError("labels: expected a Tensor of integers")
    if labels.dim() == 0:
        raise ValueError("labels: expected a time dimension, got a scalar")
    arguments.one_of("layout", layout, LAYOUTS)
    group_name(group)
    shift = arguments.positions("shift", shift)
    ignore_index = arguments.label("ignore_index", ignore_index)
    checks.check_ignorable(labels, ignore_index)
    labels = labels.long()
    ranks, rank, stretches = group.size(), group.rank(), 1 if layout == "contiguous" else 2
    if labels.shape[-1] % stretches:
        raise ValueError(
            f"labels: a zigzag piece has two stretches of one length, got {labels.shape[-1]} positions"
        )
    length = labels.shape[-1] // stretches
    if shift > length:
        raise ValueError(f"shift: {shift} reaches past the next stretch, which has {length} positions")
    if shift == 0:
        return labels
    pieces = labels.unflatten(-1, (stretches, length))
    heads = all_gather(pieces[..., :shift].contiguous().unsqueeze(0), group)[:, 0]
    shifted = ahead(pieces, shift, ignore_index)
    for own in range(stretches):
        place = rank if own == 0 else 2 * ranks - 1 - rank
        if place + 1 < stretches * ranks:
            owner, which = _owner(place + 1, ranks, stretches)
            shifted[..., own, length - shift :] = heads[owner][..., which, :]
    return shifted.flatten(-2)


def _owner(place: int, ranks: int, stretches: int) -> tuple[int, int]:
    """(rank, which of its stretches) of a stretch of the whole sequence."""
    return (place, 0) if stretches == 1 or place < ranks else (2 * ranks - 1 - place, 1)
