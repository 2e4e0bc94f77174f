"""The records of one run as numbers: means over seeds, differences from nll seed by seed."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import Any, NamedTuple

Record = dict[str, Any]


class Spread(NamedTuple):
    """Over seeds."""

    mean: float
    deviation: float
    values: tuple[float, ...]

    def text(self, digits: int = 1, sign: str = "") -> str:
        if not math.isfinite(self.mean):
            return "none"
        return f"{self.mean:{sign}.{digits}f} ± {self.deviation:.{digits}f}"


def spread(values: list[float]) -> Spread:
    deviation = statistics.stdev(values) if len(values) > 1 else float("nan")
    return Spread(statistics.mean(values), deviation, tuple(values))


class Results:
    """A `part` is a task, a kind of data in the mixed task ("mixed: cells"), or "ascii, other fonts"."""

    def __init__(self, path: Path):
        try:
            self.head: Record = json.loads(path.read_text())
            self.records: list[Record] = self.head.pop("records")
        except (ValueError, KeyError) as error:
            raise SystemExit(f"{path}: not the records of benchmarks/regimes/run.py ({error!r})") from error
        self.cells: dict[tuple[str, str], list[Record]] = {}
        for record in self.records:
            if record["split"] == "test":
                self.cells.setdefault((record["task"], record["objective"]), []).append(record)

    @property
    def tasks(self) -> list[str]:
        return list(dict.fromkeys(task for task, _ in self.cells))

    def core_minutes(self) -> float:
        """Of all cells, by what those of their task whose results are kept took of a core."""
        seconds: dict[str, list[float]] = {}
        for (task, _), records in self.cells.items():
            seconds.setdefault(task, []).extend(record["seconds"] for record in records)
        each = {task: statistics.mean(values) for task, values in seconds.items()}
        return sum(each[record["task"]] for record in self.records) / 60

    @staticmethod
    def task_of(part: str) -> str:
        return part.split(":")[0].split(",")[0]

    def parts(self) -> list[str]:
        found: dict[str, None] = {}
        for task in self.tasks:
            for part in self.of(task, "nll")[0]["measured"]:
                found[part if part.startswith(task) else f"{task}: {part}"] = None
        return list(found)

    def objectives(self, task: str, remedies: bool = False) -> list[str]:
        plan = self.head["plan"]
        wanted = [*plan["objectives"], *(plan["remedies"] if remedies else [])]
        return [name for name in wanted if (task, name) in self.cells]

    def of(self, task: str, objective: str) -> list[Record]:
        return sorted(self.cells[task, objective], key=lambda record: record["seed"])

    def measured(self, part: str, objective: str, name: str) -> list[Any]:
        inner = part.split(": ")[-1]
        found = [record["measured"][inner][name] for record in self.of(self.task_of(part), objective)]
        return [float("nan") if x is None else x for x in found]

    def spread(self, part: str, objective: str, name: str) -> Spread:
        return spread(self.measured(part, objective, name))

    def difference(self, part: str, objective: str, name: str, other: str = "nll") -> Spread:
        """Seed by seed: seeds share the order of the batches and the wrong labels."""
        pairs = zip(self.measured(part, objective, name), self.measured(part, other, name), strict=True)
        return spread([a - b for a, b in pairs])

    def course(self, task: str, objective: str, place: int) -> tuple[list[int], list[float]]:
        """(steps, mean over seeds) of alpha, p or gate in training: place 1, 2 or 3."""
        runs = [record["course"] for record in self.of(task, objective)]
        steps = [point[0] for point in runs[0]]
        return steps, [
            statistics.mean(run[at][place] if run[at][place] is not None else math.nan for run in runs)
            for at in range(len(steps))
        ]

    def best(self, part: str, name: str = "top1") -> list[str]:
        """The objective with the highest value, seed by seed."""
        values = {o: self.measured(part, o, name) for o in self.objectives(self.task_of(part))}
        return [max(values, key=lambda o: values[o][seed]) for seed in range(len(values["nll"]))]
