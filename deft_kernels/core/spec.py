"""Everything about a call that is not a tensor, in one frozen record that fits an operator's schema."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import numpy as np
import torch

from ..objectives import Objective
from .groups import Shard
from .statistics import Field


@dataclass(frozen=True)
class Spec:
    """Settings of one loss, shared by the forward and the backward operators.

    softcap: 0 for none.
    anchor, formula (what formulas of the rows train in the objective's place): no backend reads them; they
    are here for the ranks of a group to compare.
    statistics: also reduce what the loss itself does not need (entropy, max p).
    backend: "triton" or "torch", already resolved.  inplace: the backward overwrites the logits.
    skip_ignored: whether rows that do not count are left out before the first product of hidden states.
    shard: which columns the logits are, where a vocabulary is split between ranks; None for all.
    """

    objective: Objective
    softcap: float = 0.0
    temperature: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    anchor: float = 0.0
    statistics: bool = False
    inplace: bool = False
    backend: str = "torch"
    shard: Shard | None = None
    skip_ignored: bool = True
    formula: str = ""

    def encode(self) -> tuple[str, list[float]]:
        """(code, numbers) for an operator call; torch.compile folds both to constants.

        The code begins with the number of fields of a row. torch.compile stores generated code on disk and
        finds it by the graph alone, even if an operator had outputs of another shape when it was generated.
        """
        o = self.objective
        flags = f"{int(o.detach)}{int(self.statistics)}{int(self.inplace)}{int(self.skip_ignored)}"
        start, size, ranks, group, known = self.shard or (0, 0, 0, "", 0)
        place = f"{start}:{size}:{ranks}:{known}:{_quoted(group)}"
        names = f"{_quoted(o.batch_group)}:{_quoted(self.formula)}"
        code = f"{len(Field)}:{o.family}:{o.focus}:{flags}:{self.backend}:{place}:{names}"
        mean_prob = -1.0 if o.mean_prob is None else o.mean_prob
        numbers = [o.alpha, o.eps, o.power, o.top_k, o.low, o.high, mean_prob]
        return code, [*numbers, *self.settings()]

    def settings(self) -> tuple[float, ...]:
        """The numbers that are not the objective's, in the order of their declaration."""
        return tuple(getattr(self, name) for name in SETTINGS)

    def vocabulary(self, width: int) -> int:
        """V, of logits with `width` columns."""
        return width if self.shard is None else self.shard.size

    @property
    def needs_entropy(self) -> bool:
        return self.statistics or self.objective.needs_entropy

    @property
    def needs_max(self) -> bool:
        """Whether the loss or the caller wants the largest logit, not just some offset near it."""
        return self.needs_entropy or self.objective.focus == "max_prob"

    @property
    def squares(self) -> bool:
        """Whether the gradient has a term p_j^2 (through the collision probability)."""
        return self._through("collision", "statistics", "statistics+max")

    @property
    def logs(self) -> bool:
        """Whether the gradient has a term p_j log p_j (through the entropy)."""
        return self._through("shannon", "entropy", "statistics", "statistics+max")

    @property
    def peaks(self) -> bool:
        """Whether the gradient has a term at the largest logit (through max p)."""
        return self._through("max_prob", "statistics+max")

    def _through(self, *foci: str) -> bool:
        return not self.objective.detach and self.objective.focus in foci


SETTINGS = tuple(field.name for field in fields(Spec) if field.type == "float")


def log2_scale(temperature: float, dtype: torch.dtype = torch.float32) -> float:
    """k = log2(e) / temperature rounded to the dtype of the passes, without a tensor."""
    k = 1.0 / math.log(2.0) / temperature
    return k if dtype == torch.float64 else float(np.float32(k))


def decode(code: str, numbers: list[float]) -> Spec:
    """The record that `Spec.encode` wrote (the objective's display name is not part of it)."""
    # Compiled autograd traces this, and dynamo warns of caches.
    kept: Any = _decode.__wrapped__ if torch.compiler.is_compiling() else _decode
    spec: Spec = kept(code, tuple(numbers))
    return spec


def _quoted(name: str) -> str:
    """A group's name without the colons that part the code's fields."""
    return name.replace("%", "%25").replace(":", "%3A")


def _unquoted(name: str) -> str:
    return name.replace("%3A", ":").replace("%25", "%")


@lru_cache(maxsize=256)
def _decode(code: str, numbers: tuple[float, ...]) -> Spec:
    _, family, focus, flags, backend, *place, group, batch_group, formula = code.split(":")
    detach, statistics, inplace, skip = (flag == "1" for flag in flags)
    alpha, eps, power, top_k, low, high, mean_prob, *settings = numbers
    given = None if mean_prob < 0 else mean_prob
    kind: tuple[Any, Any] = (family, focus)
    over = _unquoted(batch_group)
    objective = Objective(family, *kind, alpha, eps, power, top_k, detach, low, high, given, over)
    start, size, ranks, known = (int(number) for number in place)
    shard = Shard(start, size, ranks, _unquoted(group), known) if ranks else None
    named: dict[str, Any] = dict(zip(SETTINGS, settings, strict=True))
    named |= {"statistics": statistics, "inplace": inplace, "skip_ignored": skip}
    return Spec(objective, **named, backend=backend, shard=shard, formula=_unquoted(formula))
