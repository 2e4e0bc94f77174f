"""`Recorder`: what the gate does to the tokens of a run, summed on the device in tables of fixed size."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..core.arguments import device as device_of
from ..core.arguments import integer, label, names
from ..core.arguments import path as path_of
from ..core.groups import group_name
from ..core.statistics import RowStatistics
from .added import channels_of, flat_rows, ids_of
from .bins import ALPHA, ENTROPY, P
from .gates import DEFAULT, Objectives, gate_of, gradient_norm, named
from .recording import MOMENTS, Recording
from .sample import LAST, Sample

# Ids of a rank's tokens, where none are given, begin at rank * 2^40.
IDS_A_RANK = 2**40
# Tokens of which everything is worked out at once: bounds what `add` needs besides the tables.
AT_ONCE = 2**16


class Recorder:
    """Histograms over p, H and alpha, every objective's gradient mass, sampled tokens, means over time.

        recorder = Recorder()
        loss, stats = deft_loss(logits, labels, return_stats=True)
        recorder.add(stats, labels)

    It works on the statistics that the loss has made and reads no logits. Nothing in `add` waits for the
    device, and memory stays as it is after the first call. alpha is the focus index S = sum p^2 whatever the
    run's objective is, so that recordings of different objectives can be compared.

    Args:
        objectives: names or descriptions, or a mapping from a name of one's own to either: those whose gate
            and gradient mass are worked out for every token. `cayley` takes the mean p of the rows of one
            `add`.
        channels: names of the channels; `add(channel=)` says by number to which a token belongs.
        tokens: size of the sample.
        slots: over how many intervals of steps the means over time are kept, an even number. When a run has
            more steps, two neighbours become one.
        seed: of the sample. Recordings of the same seed hold the same tokens of the same data.
        ignore_index: the label of rows that do not count.
        device: where the tables are; None takes that of the first statistics.
    Raises: TypeError, ValueError for arguments that cannot be honoured, naming them.
    """

    def __init__(
        self,
        objectives: Objectives = DEFAULT,
        *,
        channels: Sequence[str] = ("all",),
        tokens: int = 4096,
        slots: int = 256,
        seed: int = 0,
        ignore_index: int = -100,
        device: torch.device | str | None = None,
    ):
        self.objectives = named(objectives)
        self.channels = names("channels", channels)
        if not self.channels:
            raise ValueError("channels: expected at least one name")
        self.size, self.slots = integer("tokens", tokens), integer("slots", slots)
        self.seed, self.ignore_index = label("seed", seed), label("ignore_index", ignore_index)
        if self.size < 1:
            raise ValueError(f"tokens: expected at least 1, got {tokens}")
        if self.slots < 2 or self.slots % 2:
            raise ValueError(f"slots: expected an even number from 2 on, got {slots}")
        self.stride = 1  # steps in a slot
        self.calls = self.positions = 0
        self._device = None if device is None else device_of("device", device)
        self._tables: dict[str, Tensor] = {}
        self._sample: Sample | None = None
        self._gate = ""

    @torch.no_grad()
    def add(
        self,
        stats: RowStatistics,
        labels: Tensor,
        *,
        channel: Tensor | int = 0,
        ids: Tensor | None = None,
        shift: bool = False,
        step: int | None = None,
    ) -> None:
        """Add the rows of one call.

        Args:
            stats: [...], as a loss with return_stats=True or `row_statistics` gives them.
            labels: [...], those that the loss had; or a bool mask of the rows that count, and then the sample
                has no labels.
            channel: [...], integer, or one for all rows.
            ids: [...], int64, what tells a token from every other; None counts the rows in the order in which
                they come, so two recordings of the same rows in the same order sample the same tokens.
            shift: as in the loss.
            step: an int that does not fall, for the means over time; None counts the calls.
        Raises: ValueError, TypeError for shapes and dtypes that disagree; on the CPU also ValueError for a
            channel out of range. On a GPU such rows, and rows that hold a NaN anywhere, are left out and
            counted: `Recording.left_out`.
        """
        rows, counted, words = flat_rows(stats, labels, shift, self.ignore_index)
        gate, channels = self._whose(stats), channels_of(channel, rows.logp, len(self.channels))
        step = self.calls if step is None else label("step", step)
        if step < 0:
            raise ValueError(f"step: expected 0 or more, got {step}")
        given = None if ids is None else ids_of(ids, rows.logp)
        # Up to here nothing has changed: after a call that raises, the recorder is as it was.
        tokens = self._new_ids(rows.logp) if given is None else given
        if not self._tables:
            self._begin(self._device or rows.logp.device)
        self._gate = gate
        self.calls += 1
        while step // self.stride >= self.slots:
            self._halve()
        finite = ~(rows.logp.isnan() | rows.collision.isnan() | rows.entropy.isnan() | rows.max_prob.isnan())
        counts = counted & finite & (channels >= 0) & (channels < len(self.channels))
        self._tables["left_out"] += (counted & ~counts).sum()
        kept = RowStatistics(*(None if s is None else s.where(counts, 0) for s in rows))  # type: ignore[arg-type]
        p = kept.logp.exp().where(counts, 0)
        mean_prob = p.sum() / counts.sum().clamp(min=1)
        channels = channels.clamp(0, len(self.channels) - 1)
        for begin in range(0, len(p), AT_ONCE):
            part = slice(begin, begin + AT_ONCE)
            some = RowStatistics(*(None if s is None else s[part] for s in kept))  # type: ignore[arg-type]
            whole = torch.stack([tokens, torch.full_like(tokens, step), channels, words], -1)[part]
            self._add(some, counts[part], whole, mean_prob)

    def recording(self, group: Any = None) -> Recording:
        """What was recorded, on the host. With a torch.distributed group: that of all its ranks, which have
        to call it together; the ranks' recorders have to be made alike. Raises: TypeError for no group."""
        if group is not None:
            group_name(group)
        if not self._tables:
            self._begin(self._device or torch.device("cpu"))
        tables, sample, gate = self._tables, self._sample, self._gate
        assert sample is not None
        if group is not None:
            gate = self._align(group)
            tables = self._summed(group)
            sample = sample.gathered(group)
        taken = sample.keys < LAST
        host = {name: table.cpu().double().numpy() for name, table in tables.items()}
        integers, numbers = sample.integers[taken].cpu().numpy(), sample.numbers[taken].cpu().double().numpy()
        order = np.argsort(integers[:, 0], kind="stable")
        return Recording(
            objectives=tuple(self.objectives),
            channels=self.channels,
            gate_of=gate,
            seed=self.seed,
            stride=self.stride,
            left_out=int(host.pop("left_out")),
            tokens=integers[order],
            values=numbers[order],
            **host,
        )

    def save(self, path: str | Path, group: Any = None) -> None:
        """Write `recording(group)`; with a group only its first rank writes, and all have to call it."""
        path = path_of("path", path)
        found = self.recording(group)
        if group is None or torch.distributed.get_rank(group) == 0:
            found.save(path)

    def _whose(self, stats: RowStatistics) -> str:
        """Whose gate the statistics bring, or the recorder works out."""
        own = self._gate or ("the loss" if stats.gate is not None else next(iter(self.objectives)))
        if (own == "the loss") != (stats.gate is not None):
            raise ValueError(
                f"stats: gate: is of {own} so far, and these statistics have another; use two recorders"
            )
        return own

    def _new_ids(self, like: Tensor) -> Tensor:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        first = self.positions + (torch.distributed.get_rank() * IDS_A_RANK if distributed else 0)
        self.positions += like.numel()
        return torch.arange(first, first + like.numel(), device=like.device)

    def _begin(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        c, m = len(self.channels), len(self.objectives)
        shapes = {
            "p_entropy": (c, P.number, ENTROPY.number),
            "p_alpha": (c, P.number, ALPHA.number),
            "alpha_entropy": (c, ALPHA.number, ENTROPY.number),
            "mass": (m, c, P.number, ENTROPY.number),
            "totals": (m, c, 4),
            "series": (self.slots, c, len(MOMENTS)),
            "left_out": (),
        }
        self._tables = {
            name: torch.zeros(shape, dtype=dtype, device=device) for name, shape in shapes.items()
        }
        self._sample = Sample(self.size, self.seed, dtype, device)

    def _add(self, rows: RowStatistics, counts: Tensor, tokens: Tensor, mean_prob: Tensor) -> None:
        p, alpha, entropy, weight = rows.logp.exp(), rows.collision, rows.entropy, counts.to(rows.logp.dtype)
        step, channel = tokens[:, 1], tokens[:, 2]
        i, j, k = P.index(p), ENTROPY.index(entropy), ALPHA.index(alpha)
        by_p_entropy = (channel * P.number + i) * ENTROPY.number + j
        self._count("p_entropy", by_p_entropy, weight)
        self._count("p_alpha", (channel * P.number + i) * ALPHA.number + k, weight)
        self._count("alpha_entropy", (channel * ALPHA.number + k) * ENTROPY.number + j, weight)
        gate = rows.gate
        for number, objective in enumerate(self.objectives.values()):
            focus, its_gate = gate_of(objective, rows, mean_prob)
            gate = its_gate if gate is None else gate
            norm = gradient_norm(rows, its_gate).where(counts, 0)
            self._tables["mass"][number].view(-1).index_add_(0, by_p_entropy, norm)
            columns = torch.stack([its_gate, its_gate.square(), focus, focus.square()], -1)
            self._tables["totals"][number].index_add_(0, channel, columns * weight.unsqueeze(-1))
        assert gate is not None and self._sample is not None
        means = [p, alpha, gate, entropy, -rows.logp]
        columns = torch.stack([weight, *(x for v in means for x in (v, v * v))], -1).where(
            counts.unsqueeze(-1), 0
        )
        slots = self._tables["series"].view(-1, len(MOMENTS))
        slots.index_add_(0, step // self.stride * len(self.channels) + channel, columns)
        numbers = torch.stack([rows.logp, entropy, alpha, rows.max_prob, gate], -1)
        self._sample.add(tokens, numbers, counts)

    def _count(self, table: str, places: Tensor, weight: Tensor) -> None:
        # Not bincount, which asks the device for its largest value first.
        self._tables[table].view(-1).index_add_(0, places, weight)

    def _halve(self) -> None:
        series = self._tables["series"]
        pairs = series[0::2] + series[1::2]
        self._tables["series"] = torch.cat([pairs, torch.zeros_like(pairs)])
        self.stride *= 2

    def _align(self, group: Any) -> str:
        """The longest intervals of all ranks, as some took more steps; returns whose gate they have, which a
        rank without rows does not know."""
        gates = ("", "the loss", next(iter(self.objectives)))
        own = [self.stride, gates.index(self._gate)]
        most = torch.tensor(own, device=self._tables["series"].device)
        torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX, group=group)
        stride, gate = most.tolist()
        while self.stride < stride:
            self._halve()
        return gates[gate]

    def _summed(self, group: Any) -> dict[str, Tensor]:
        flat = torch.cat([table.reshape(-1) for table in self._tables.values()])
        torch.distributed.all_reduce(flat, group=group)
        parts = flat.split([table.numel() for table in self._tables.values()])
        return {name: part.view_as(t) for (name, t), part in zip(self._tables.items(), parts, strict=True)}
