"""`RunningStatistics`: what to log beside a gated loss, summed on the device until it is asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from ..statistics import RowStatistics
from .proof import Calls

NAMES = ("nll", "mean_alpha", "mean_gate", "mean_entropy", "top1")


class RunningStatistics:
    """Means over tokens since they were last asked for, of training and of evaluation apart.

        nll          mean -logp: plain cross-entropy, comparable with other runs   nats
        mean_alpha   mean focus index                                              objectives that have one
        mean_gate    mean trust gate: the share of a plain gradient that is used   objectives that have one
        mean_entropy mean Shannon entropy                                          nats
        top1         share of tokens whose label is the most likely one

    A loss that was given this object updates it from the statistics of its own pass; nothing is read twice
    and the host does not wait. Evaluation is told from training by whether gradients are enabled.
    """

    def __init__(self) -> None:
        self._sums: dict[bool, Tensor] = {}
        self._gated = True
        self.calls = Calls()

    def update(self, stats: RowStatistics, valid: Tensor) -> None:
        """Add the rows of one call. stats: [...]; valid: [...], bool, the rows whose label counts."""
        self.add(stats, valid)
        if torch.is_grad_enabled():
            self.calls.note_used()

    def add(self, stats: RowStatistics, valid: Tensor) -> None:
        """As `update`, for a loss that itself notes whether it is trained."""
        # Ignored rows hold zeros. Doubles, because a long interval between logs counts more tokens than
        # fp32 can; Apple's devices have none.
        dtype = torch.float32 if stats.logp.device.type == "mps" else torch.float64
        absent = torch.zeros_like(stats.logp)
        self._gated = stats.alpha is not None and stats.gate is not None
        rows = (
            valid,
            -stats.logp,
            absent if stats.alpha is None else stats.alpha,
            absent if stats.gate is None else stats.gate,
            stats.entropy,
            stats.correct,
        )
        sums = torch.stack([row.detach().to(dtype).sum() for row in rows])
        training = torch.is_grad_enabled()
        before = self._sums.get(training)
        self._sums[training] = sums if before is None else before + sums

    def forget(self, training: bool) -> None:
        """Drop what was added since the last `means`."""
        self._sums.pop(training, None)

    def means(self, training: bool = True, device: torch.device | str = "cpu") -> dict[str, float]:
        """Means over the tokens of all ranks since the last call, which they forget; {} when there were none.

        A collective where `torch.distributed` is initialised: call it on every rank. `device` is where a rank
        without tokens of its own takes part.
        """
        device = torch.device(device)
        dtype = torch.float32 if device.type == "mps" else torch.float64
        sums = self._sums.pop(training, None)
        if sums is None:
            sums = torch.zeros(len(NAMES) + 1, dtype=dtype, device=device)
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        if distributed and torch.distributed.get_world_size() > 1:
            torch.distributed.all_reduce(sums)
        count, *totals = sums.tolist()
        if count == 0:
            return {}
        means = {name: total / count for name, total in zip(NAMES, totals, strict=True)}
        if not self._gated:
            del means["mean_alpha"], means["mean_gate"]
        return means
