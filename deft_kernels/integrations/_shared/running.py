"""`RunningStatistics`: what to log beside a gated loss, summed on the device until it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.arguments import device as device_of
from ...core.arguments import flag, integer, kind_of, names
from ...core.checks import check_dense
from ...core.statistics import RowStatistics, check_statistics
from ...dtensors import is_dtensor
from .proof import Calls

NAMES = ("nll", "mean_alpha", "mean_gate", "mean_entropy", "top1")
GATED = ("mean_alpha", "mean_gate")


class RunningStatistics:
    """Means over tokens since the last `means`, separate for training and evaluation.

        nll          mean -logp: plain cross-entropy, comparable with other runs   nats
        mean_alpha   mean focus index                                              objectives that have one
        mean_gate    mean trust gate: the share of a plain gradient that is used   objectives that have one
        mean_entropy mean Shannon entropy                                          nats
        top1         share of tokens whose label is the most likely one

    A loss that was given this object updates it from the statistics of its own pass; nothing is read twice
    and the host does not wait. It is evaluation if gradients are disabled. There the rows with which
    accelerate pads the last batch are left out, except under torch.compile.

    Args: channels: names of the kinds of data that are mixed. `update(channel=)` says by number to which a
        row belongs, and each mean is there for each kind too: nll/code, mean_alpha/code and so on. The same
        on every rank.
    Raises: ValueError for channels that are no names that differ.
    """

    def __init__(self, channels: Sequence[str] = ()) -> None:
        self.channels = names("channels", channels)
        self._sums: dict[bool, Tensor] = {}
        self.calls = Calls()
        # Called with each call's rows, those that count, whether it is training, and the rows' channels.
        self.watchers: list[Callable[[RowStatistics, Tensor, bool, Tensor | None], None]] = []

    def update(self, stats: RowStatistics, valid: Tensor, channel: Tensor | int | None = None) -> None:
        """Add the rows of one call.

        Args: stats: [...]; valid: [...], bool, the rows whose label counts; channel: [...], integer, of
            valid's shape, or one for all rows, needed where there are channels and refused where there are
            none.
        Raises: TypeError, ValueError for statistics or a mask that are none, or of another shape; ValueError
            for a channel of another shape or dtype, and on the CPU for one out of range. On a GPU a row with
            such a channel is left out of the means by channel.
        """
        self.add(stats, valid, channel)
        if torch.is_grad_enabled():
            self.calls.note_used()

    def add(self, stats: RowStatistics, valid: Tensor, channel: Tensor | int | None = None) -> None:
        """As `update`, for a loss that itself notes whether it is trained."""
        _check_rows(stats, valid)
        training = torch.is_grad_enabled()
        channels = self._channels(channel, valid)
        stats, valid, channels = _local(stats, valid, channels)
        if not training and (repeated := _repeated(len(stats.logp) if stats.logp.dim() else 0)):
            stats = RowStatistics(*(None if s is None else s[:-repeated] for s in stats))  # type: ignore[arg-type]
            valid = valid[:-repeated]
            channels = None if channels is None else channels[:-repeated]
        self._check_range(channels, valid)
        for watcher in self.watchers:
            watcher(stats, valid, training, channels)
        # Ignored rows hold zeros. Doubles, because a long interval between logs counts more tokens than
        # fp32 can; Apple's devices have none.
        dtype = torch.float32 if stats.logp.device.type == "mps" else torch.float64
        absent = torch.zeros_like(stats.logp)
        gated = stats.alpha is not None and stats.gate is not None
        rows = (
            valid,
            valid if gated else absent,
            -stats.logp,
            absent if stats.alpha is None else stats.alpha,
            absent if stats.gate is None else stats.gate,
            stats.entropy,
            stats.correct,
        )
        sums = torch.stack([row.detach().to(dtype).sum() for row in rows]).unsqueeze(0)
        if channels is not None:
            sums = torch.cat([sums, self._by_channel(rows, channels, dtype)])
        before = self._sums.get(training)
        self._sums[training] = sums if before is None else before + sums

    def _channels(self, channel: Tensor | int | None, valid: Tensor) -> Tensor | None:
        """The rows' channels, [...], int64; None where there are none."""
        if channel is None or not self.channels:
            if channel is not None:
                raise ValueError("channel: this RunningStatistics has none; give it channels=, their names")
            if self.channels:
                raise ValueError(
                    f"channel: None, and these statistics are kept apart by {', '.join(self.channels)}; say "
                    "to which of them each row belongs"
                )
            return None
        if not isinstance(channel, Tensor):
            number: int = integer("channel", channel)
            if not 0 <= number < len(self.channels):
                raise ValueError(f"channel: {number} is outside [0, {len(self.channels)})")
            return torch.full_like(valid, number, dtype=torch.int64)
        if channel.is_floating_point() or channel.is_complex() or channel.dtype == torch.bool:
            raise ValueError(f"channel: expected integers, got {channel.dtype}")
        if channel.shape != valid.shape:
            raise ValueError(
                f"channel: expected the shape of valid, {tuple(valid.shape)}, got {tuple(channel.shape)}"
            )
        return channel.long().to(valid.device)

    def _check_range(self, channels: Tensor | None, valid: Tensor) -> None:
        """On a GPU the host would have to wait, and a trace cannot ask."""
        if channels is None or channels.device.type != "cpu" or torch.compiler.is_compiling():
            return
        wrong = valid & ((channels < 0) | (channels >= len(self.channels)))
        if wrong.any():
            found = int(channels[wrong][0])
            raise ValueError(f"channel: {found} is outside [0, {len(self.channels)})")

    def _by_channel(self, rows: Sequence[Tensor], channels: Tensor, dtype: torch.dtype) -> Tensor:
        """Sums of the rows of each channel, [channels, rows]."""
        size = len(self.channels)
        # One place more, for rows that belong to none.
        place = channels.where((channels >= 0) & (channels < size), size).reshape(-1)
        table = torch.zeros(size + 1, len(rows), dtype=dtype, device=place.device)
        # The mask of shifted labels lacks the last position, whose statistics are zeros.
        like = channels.shape
        flat = (row if row.shape == like else row[..., : like[-1]] for row in rows)
        values = torch.stack([row.detach().to(dtype).reshape(-1) for row in flat], -1)
        return table.index_add(0, place, values)[:size]

    def forget(self, training: bool) -> None:
        """Drop what was added since the last `means`."""
        self._sums.pop(flag("training", training), None)

    def means(self, training: bool = True, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means over the tokens of all ranks since the last call, then starts again; {} if there were no
        tokens. A channel without tokens has no means.

        A collective where `torch.distributed` is initialised: call it on every rank. A rank without tokens
        takes part on `device`.
        """
        device, training = device_of("device", device), flag("training", training)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = self._sums.pop(training, None)
        if sums is None:
            sums = torch.zeros(1 + len(self.channels), len(NAMES) + 2, dtype=dtype, device=device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        # The ranks agree on the names, also with a rank that made no call.
        means: dict[str, float] = {}
        endings = ["", *(f"/{channel}" for channel in self.channels)]
        for ending, (count, gated, *totals) in zip(endings, sums.tolist(), strict=True):
            counts = {name: gated if name in GATED else count for name in NAMES}
            means |= {
                name + ending: total / counts[name]
                for name, total in zip(NAMES, totals, strict=True)
                if counts[name] > 0
            }
        return means


def _check_rows(stats: RowStatistics, valid: Tensor) -> None:
    check_statistics(stats)
    if not isinstance(valid, Tensor) or valid.dtype != torch.bool:
        found = valid.dtype if isinstance(valid, Tensor) else kind_of(valid)
        raise TypeError(f"valid: expected a Tensor of bool, got {found}")
    check_dense(valid, "valid")
    rows = stats.logp.shape
    # The mask of shifted labels lacks the last position.
    if valid.shape not in (rows, (*rows[:-1], rows[-1] - 1 if rows else 0)):
        raise ValueError(f"valid: expected the statistics' shape {tuple(rows)}, got {tuple(valid.shape)}")


def _local(
    stats: RowStatistics, valid: Tensor, channels: Tensor | None
) -> tuple[RowStatistics, Tensor, Tensor | None]:
    """This rank's rows, where the logits were DTensors; replicated ones count on every rank alike."""
    if not is_dtensor(stats.logp):
        return stats, _whole(valid), None if channels is None else _whole(channels)
    own = RowStatistics(*(None if s is None else s.to_local() for s in stats))  # type: ignore
    own_channels = None if channels is None else _laid_as(stats.logp, "channel", channels)
    return own, _laid_as(stats.logp, "valid", valid), own_channels


def _laid_as(lying: Any, name: str, rows: Any) -> Tensor:
    """This rank's part of `rows`, as it has one of the statistics."""
    if is_dtensor(rows):
        return rows.redistribute(lying.device_mesh, lying.placements).to_local()
    if any(placement.is_shard() for placement in lying.placements):
        raise TypeError(f"{name}: the statistics are DTensors with sharded rows; expected a DTensor too")
    return rows


def _whole(valid: Any) -> Tensor:
    return valid.full_tensor() if is_dtensor(valid) else valid


def _repeated(rows: int) -> int:
    """How many of this rank's rows of an evaluation batch, the last ones, are not of the dataset.

    accelerate fills the last batch of all ranks with rows from the beginning, and leaves them out of what its
    `gather_for_metrics` returns. `rows` are a batch's examples, or their tokens one after another.
    """
    accelerate = sys.modules.get("accelerate.state")
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if accelerate is None or not distributed or torch.compiler.is_compiling():
        return 0
    state, ranks = accelerate.GradientState(), torch.distributed.get_world_size()
    if ranks == 1 or not state.end_of_dataloader or state.remainder <= 0:
        return 0
    loader = state.active_dataloader
    batch = getattr(loader, "total_batch_size", 0)
    filled = getattr(getattr(loader, "batch_sampler", None), "even_batches", True)
    if not filled or batch == 0 or batch % ranks or rows % (batch // ranks):
        return 0
    own = batch // ranks
    kept = min(max(state.remainder - torch.distributed.get_rank() * own, 0), own)
    return rows // own * (own - kept)
