"""Objectives that are made of a row's statistics, held constant, and of numbers that are given with each row.

No backend knows of them: it makes the statistics of another objective, and what is trained follows from those
in Python, on vectors of [N] (`operators/weighted.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .core import checks
from .core.bands import bounds
from .core.statistics import RowStatistics, with_stand_ins

Own = TypeVar("Own", bound="RowObjective")
Rows = slice | Tensor | None


class Values(NamedTuple):
    """Of each row, [N]. slope: -d loss / d logp.  alpha, gate: as statistics show them."""

    loss: Tensor
    slope: Tensor
    alpha: Tensor
    gate: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class RowObjective:
    """loss and slope of a row by a formula of its statistics and `inputs`.

    name: for display.  inputs: tensors of the labels' shape, of which the formula gets the rows that it sees.
    low, high: rows with p outside [low, high] are dropped, as in `Objective`.
    """

    name: str
    inputs: Mapping[str, Tensor]
    low: float = 0.0
    high: float = 1.0

    @property
    def needs_statistics(self) -> bool:
        """Whether the formula reads more than logp, lse and the collision probability."""
        return True

    @property
    def has_band(self) -> bool:
        return self.low > 0.0 or self.high < 1.0

    def within(self: Own, keep: str | tuple[float, float]) -> Own:
        """As `Objective.within`."""
        low, high = bounds(keep)
        return replace(self, low=low, high=high)

    def check_inputs(self, labels: Tensor) -> None:
        for name, value in self.inputs.items():
            check_of_rows(name, value, labels)

    def mapped(self: Own, change: Callable[[Tensor, str], Any]) -> Own:
        """The same with other tensors as inputs."""
        return replace(self, inputs={name: change(value, name) for name, value in self.inputs.items()})

    def values(self, stats: RowStatistics, inputs: Mapping[str, Tensor]) -> Values:
        """stats: of rows that count, or stand-ins for others; inputs: [N], of these rows."""
        raise NotImplementedError

    def of(self, stats: RowStatistics, valid: Tensor, rows: Rows = None) -> Values:
        """Of rows whose statistics are flat, [N]; rows: which of all rows these are, None for all.

        What stands at a row that is not `valid` is padding, which the formula is not to meet: it sees a
        stand-in there, with inputs of 1.
        """
        safe = {}
        for name, value in self.inputs.items():
            own = of_these(value, valid, rows)
            safe[name] = own.where(valid, torch.ones((), dtype=own.dtype, device=own.device))
        return self.values(with_stand_ins(stats, valid), safe)


def check_of_rows(name: str, value: Tensor, labels: Tensor) -> None:
    if value.shape != labels.shape:
        raise ValueError(
            f"{name}: expected the labels' shape {tuple(labels.shape)}, got {tuple(value.shape)}"
        )
    if value.device != labels.device:
        raise ValueError(f"{name}: is on {value.device}, the labels are on {labels.device}")


def of_these(value: Tensor, like: Tensor, rows: Rows) -> Tensor:
    """A row input, [N] for the rows that a formula sees; one number stands for every row."""
    value = value.detach()
    if value.dim() == 0:
        # One on the host may go with rows on a device, which it need not wait for.
        return value.to(like.device, non_blocking=True).expand(like.shape)
    value = value.reshape(-1)
    return value if rows is None else value[rows]


def of_all_ranks(number: Any) -> Tensor:
    """A number that the host may read: that of a DTensor is this rank's alone, and only one might raise."""
    whole: Tensor = number.full_tensor() if hasattr(number, "full_tensor") else number
    return whole


@dataclass(frozen=True, eq=False, kw_only=True)
class TsallisOfRows(RowObjective):
    """loss = (1 - p^alpha) / alpha with an alpha for each row; made by `objectives.tsallis`."""

    @property
    def needs_statistics(self) -> bool:
        return False

    def check_inputs(self, labels: Tensor) -> None:
        alpha = self.inputs["alpha"]
        if alpha.dim() > 0 or alpha.device.type != "cpu":
            check_of_rows("alpha", alpha if alpha.dim() else alpha.expand(labels.shape), labels)
        if torch.compiler.is_compiling() or (alpha.device.type != "cpu" and not checks.validating()):
            return
        wrong = (alpha < 0) | (alpha == math.inf)
        if bool(of_all_ranks(wrong.any())):
            shown = of_all_ranks(alpha.masked_fill(~wrong, -math.inf).max())
            raise ValueError(f"alpha: expected finite numbers >= 0, got {float(shown)}")

    def values(self, stats: RowStatistics, inputs: Mapping[str, Tensor]) -> Values:
        logp = stats.logp
        # One that is negative or infinite, and that nobody saw, shows as NaN.
        alpha = inputs["alpha"].to(logp)
        alpha = alpha.where((alpha >= 0) & (alpha < math.inf), math.nan)
        # Below, p^alpha is 1 - or 0 for a target of probability 0, whose loss is 1 / alpha.
        small = alpha.abs() < torch.finfo(logp.dtype).tiny
        x = (alpha * logp).masked_fill(small, 0.0)
        divisor = alpha.masked_fill(small, 1.0)
        loss = torch.where(small, -logp, -torch.expm1(x) / divisor)
        gate = torch.exp(x)
        return Values(loss, gate, alpha, gate)


def tsallis_of_rows(alpha: Tensor) -> TsallisOfRows:
    if not alpha.is_floating_point():
        raise TypeError(f"alpha: expected a number or a floating tensor, got {alpha.dtype}")
    checks.check_dense(alpha, "alpha")
    if alpha.requires_grad:
        raise ValueError("alpha: requires a gradient, but is held constant; detach it")
    return TsallisOfRows(name="tsallis", inputs={"alpha": alpha})


@dataclass(frozen=True, eq=False)
class Anchor:
    """scale (e^D - D - 1), D = reference - logp: the k3 estimate of the divergence from a reference model."""

    scale: float
    reference: Tensor

    def check(self, labels: Tensor) -> None:
        check_of_rows("reference_logp", self.reference, labels)

    def of(self, logp: Tensor, valid: Tensor, rows: Rows = None) -> tuple[Tensor, Tensor]:
        """(loss, -d loss / d logp), [N]; 0 where a row is not `valid`."""
        distance = (of_these(self.reference, valid, rows).to(logp) - logp).where(valid, 0.0)
        grown = torch.expm1(distance)
        # The limit, where the target's probability is 0.
        loss = (grown - distance).masked_fill(distance == math.inf, math.inf)
        return self.scale * loss, self.scale * grown


class Terms(NamedTuple):
    """What of a call is trained by formulas of its rows: instead of the kernels' objective, or beside it."""

    objective: RowObjective | None
    anchor: Anchor | None

    @property
    def needs_statistics(self) -> bool:
        return self.objective is not None and self.objective.needs_statistics

    def check(self, labels: Tensor) -> None:
        if self.objective is not None:
            self.objective.check_inputs(labels)
        if self.anchor is not None:
            self.anchor.check(labels)

    def tensors(self) -> dict[str, Tensor]:
        own = {} if self.objective is None else dict(self.objective.inputs)
        return own if self.anchor is None else {**own, "reference_logp": self.anchor.reference}

    def of(self, stats: RowStatistics, valid: Tensor, rows: Rows = None) -> Tensor:
        """[4, N] of an objective (`Values`), [2, N] of an anchor (loss, slope), or [6, N] of both."""
        made: list[Tensor] = []
        if self.objective is not None:
            made.extend(self.objective.of(stats, valid, rows))
        if self.anchor is not None:
            made.extend(self.anchor.of(stats.logp, valid, rows))
        return torch.stack(made)
