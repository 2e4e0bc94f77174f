"""What `Recorder.add` is given: checked, flat, on the statistics' device."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.arguments import integer, kind_of, positions
from ..core.checks import INTEGERS, check_dense
from ..core.inputs import aligned
from ..core.statistics import RowStatistics, check_statistics
from ..dtensors import is_dtensor


def flat_rows(
    stats: RowStatistics, labels: Tensor, shift: bool, ignore_index: int
) -> tuple[RowStatistics, Tensor, Tensor]:
    """Flat statistics in the tables' dtype, the rows that count, and the labels or -1."""
    check_statistics(stats)
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {kind_of(labels)}")
    check_dense(labels, "labels")
    if labels.dtype not in (torch.bool, *INTEGERS):
        raise TypeError(f"labels: expected integers, or a mask of bool, got {labels.dtype}")
    shift = positions("shift", shift)
    if is_dtensor(stats.logp) or is_dtensor(labels):
        raise TypeError("stats: a recorder takes this rank's own rows; pass to_local() of each field")
    if labels.shape != stats.logp.shape:
        raise ValueError(
            f"labels: expected the statistics' shape {tuple(stats.logp.shape)}, got {tuple(labels.shape)}"
        )
    if labels.dtype == torch.bool:
        if shift:
            raise ValueError("shift: labels is a mask, which says itself which rows count")
        counted, words = labels.reshape(-1), torch.full_like(labels, -1, dtype=torch.int64).reshape(-1)
    else:
        words = aligned(labels, shift, ignore_index)
        counted = words != ignore_index
    device = stats.logp.device
    # Doubles, because a run has more tokens than fp32 can count; Apple's devices have none.
    dtype = torch.float32 if device.type == "mps" else torch.float64
    flat = (None if s is None else s.detach().reshape(-1).to(dtype) for s in stats)
    return RowStatistics(*flat), counted.to(device), words.to(device)  # type: ignore[arg-type]


def channels_of(channel: Tensor | int, like: Tensor, known: int) -> Tensor:
    """[N], the number of each row's channel, of `known`."""
    if not isinstance(channel, Tensor):
        number: int = integer("channel", channel)
        if not 0 <= number < known:
            raise ValueError(f"channel: {number} is outside [0, {known})")
        return torch.full_like(like, number, dtype=torch.int64)
    check_dense(channel, "channel")
    if channel.dtype not in INTEGERS or channel.numel() != like.numel():
        raise ValueError(
            f"channel: expected {like.numel()} integers, got {channel.dtype} {tuple(channel.shape)}"
        )
    channel = channel.reshape(-1).long().to(like.device)
    if channel.device.type == "cpu" and channel.numel():
        least, most = (int(bound) for bound in channel.aminmax())
        if least < 0 or most >= known:
            wrong = least if least < 0 else most
            raise ValueError(f"channel: {wrong} is outside [0, {known})")
    return channel


def ids_of(ids: Tensor, like: Tensor) -> Tensor:
    if not isinstance(ids, Tensor):
        raise TypeError(f"ids: expected a Tensor of int64, got {kind_of(ids)}")
    check_dense(ids, "ids")
    if ids.dtype != torch.int64 or ids.numel() != like.numel():
        raise ValueError(f"ids: expected {like.numel()} int64, got {ids.dtype} {tuple(ids.shape)}")
    return ids.reshape(-1).to(like.device)
