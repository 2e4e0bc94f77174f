"""The best learning rate of every grid, and whether it moves with the mean gate."""

from __future__ import annotations

import math
import statistics
from typing import NamedTuple

from results import Record, Results


class Rate(NamedTuple):
    task: str
    objective: str
    gate: float  # mean over training at the best rate
    by_top1: float
    by_nll: float
    edge: bool  # the best by top-1 is the last that was tried, at either end


def rates(results: Results, optimizer: str = "adamw") -> list[Rate]:
    """The best of each grid, on validation data."""
    tried: dict[tuple[str, str], list[Record]] = {}
    for record in results.records:
        if record["split"] == "validation" and record["optimizer"] == optimizer:
            tried.setdefault((record["task"], record["objective"]), []).append(record)
    found = []
    for (task, objective), records in tried.items():

        def loss(record: Record) -> float:
            values = [m["nll"] for m in record["measured"].values()]
            return math.inf if None in values else sum(values) / len(values)

        best = max(records, key=lambda x: x["top1"])
        every = sorted(x["rate"] for x in records)
        gates = [point[3] for point in best["course"] if point[3] is not None]
        at_edge = best["rate"] in (every[0], every[-1])
        lowest = min(records, key=loss)["rate"]
        found.append(Rate(task, objective, statistics.mean(gates), best["rate"], lowest, at_edge))
    return found


def moves(found: list[Rate]) -> dict[str, float]:
    """Kendall's tau-b between mean gate and best rate, over pairs of objectives in one task: -1 where a
    smaller gate always wants a higher rate, 0 where neither tells of the other."""
    result = {}
    for name in ("by_top1", "by_nll"):
        concordant, left, right = 0.0, 0, 0
        for task in dict.fromkeys(x.task for x in found):
            own = [x for x in found if x.task == task]
            for i, a in enumerate(own):
                for b in own[:i]:
                    gate = (a.gate > b.gate) - (a.gate < b.gate)
                    rate = (getattr(a, name) > getattr(b, name)) - (getattr(a, name) < getattr(b, name))
                    concordant += gate * rate
                    left, right = left + abs(gate), right + abs(rate)
        result[name] = concordant / math.sqrt(left * right) if left and right else float("nan")
    return result
