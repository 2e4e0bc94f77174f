"""`RunningStatistics`: what to log beside a gated loss, summed on the device until it is asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ...core.statistics import RowStatistics
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
    """

    def __init__(self) -> None:
        self._sums: dict[bool, Tensor] = {}
        self.calls = Calls()
        # Called with each call's rows, those that count, and whether it is training.
        self.watchers: list[Callable[[RowStatistics, Tensor, bool], None]] = []

    def update(self, stats: RowStatistics, valid: Tensor) -> None:
        """Add the rows of one call. stats: [...]; valid: [...], bool, the rows whose label counts."""
        self.add(stats, valid)
        if torch.is_grad_enabled():
            self.calls.note_used()

    def add(self, stats: RowStatistics, valid: Tensor) -> None:
        """As `update`, for a loss that itself notes whether it is trained."""
        training = torch.is_grad_enabled()
        stats, valid = _local(stats, valid)
        if not training and (repeated := _repeated(len(stats.logp) if stats.logp.dim() else 0)):
            stats = RowStatistics(*(None if s is None else s[:-repeated] for s in stats))  # type: ignore[arg-type]
            valid = valid[:-repeated]
        for watcher in self.watchers:
            watcher(stats, valid, training)
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
        sums = torch.stack([row.detach().to(dtype).sum() for row in rows])
        before = self._sums.get(training)
        self._sums[training] = sums if before is None else before + sums

    def forget(self, training: bool) -> None:
        """Drop what was added since the last `means`."""
        self._sums.pop(training, None)

    def means(self, training: bool = True, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means over the tokens of all ranks since the last call, then starts again; {} if there were no
        tokens.

        A collective where `torch.distributed` is initialised: call it on every rank. A rank without tokens
        takes part on `device`.
        """
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = self._sums.pop(training, None)
        if sums is None:
            sums = torch.zeros(len(NAMES) + 2, dtype=dtype, device=device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        # The ranks agree on the names, also with a rank that made no call.
        count, gated, *totals = sums.tolist()
        counts = {name: gated if name in GATED else count for name in NAMES}
        return {
            name: total / counts[name] for name, total in zip(NAMES, totals, strict=True) if counts[name] > 0
        }


def _local(stats: RowStatistics, valid: Tensor) -> tuple[RowStatistics, Tensor]:
    """This rank's rows, where the logits were DTensors; replicated ones count on every rank alike."""
    if not is_dtensor(stats.logp):
        return stats, _whole(valid)
    lying: Any = stats.logp
    mask: Any = valid
    if is_dtensor(mask):
        mask = mask.redistribute(lying.device_mesh, lying.placements).to_local()
    elif any(placement.is_shard() for placement in lying.placements):
        raise TypeError("valid: the statistics are DTensors with sharded rows; expected a DTensor too")
    return RowStatistics(*(None if s is None else s.to_local() for s in stats)), mask  # type: ignore


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
