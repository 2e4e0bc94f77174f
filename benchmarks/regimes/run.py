"""The paper's regimes in small: every objective on strong, intermediate, weak and mixed data, in one command.

    python benchmarks/regimes/run.py OUT              # the default size: an hour and a quarter on two cores
    python benchmarks/regimes/run.py OUT --quick      # four objectives, one rate, two seeds: six minutes
    python benchmarks/regimes/run.py OUT --scale 4    # a wider, deeper model for longer, for a GPU
    python benchmarks/regimes/run.py OUT --seed 1     # another pre-training, other batches and wrong labels
    python benchmarks/regimes/run.py OUT --tiny       # seconds, to see it run; learns nothing

The learning rate of each objective and task is chosen by top-1 on validation data, with a seed of its own,
from one grid, which goes further where the best is at its edge; the result is on test data, over
several seeds. OUT has one JSON file a finished cell: after a kill the same command goes on, and ends with
the same numbers. Then it writes OUT/records.json, from which `python benchmarks/regimes/evidence.py` writes
docs/evidence.md.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from cells import Cell, Size, load, measured, pretrain, read, run, write
from measures import base_recording
from tasks import TASKS
from texts import DEVICE
from tqdm import tqdm
from treatments import OBJECTIVES, REMEDIES

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import machine

# Seeds of the results are 0, 1, ...; of the grid this one. With `--seed` 1 they are so much higher, with 2
# twice: two runs share none. Pre-training has what `--seed` says itself.
GRID_SEED, APART = 100, 1000
# Where one seed is not like another: see the spread of the results.
MORE_SEEDS = ("cells", "mixed")


class Plan(NamedTuple):
    """Which cells there are."""

    tasks: tuple[str, ...] = TASKS
    objectives: tuple[str, ...] = tuple(OBJECTIVES)
    remedies: tuple[str, ...] = tuple(REMEDIES)  # of what deft does on ascii
    rates: tuple[float, ...] = (1e-3, 3e-3, 6e-3)
    beyond: tuple[float, ...] = (3e-4, 1.2e-2, 2.4e-2)  # tried while the best is the last on a side
    seeds: int = 3
    more_seeds: int = 5
    sgd_tasks: tuple[str, ...] = ("strong-0",)  # do best rates move where no optimizer divides by the scale?
    sgd_objectives: tuple[str, ...] = ("nll", "tsallis-0.5", "deft", "cayley", "neg_prob")
    sgd_rates: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0, 3.0)

    def pairs(self) -> list[tuple[str, str]]:
        found = [(task, objective) for task in self.tasks for objective in self.objectives]
        return found + [("ascii", remedy) for remedy in self.remedies if "ascii" in self.tasks]

    def number_of_seeds(self, task: str) -> int:
        return self.more_seeds if task in MORE_SEEDS else self.seeds


DEFAULT = (Size(), Plan())
QUICK = (
    Size(steps=0.5, windows=64),
    Plan(
        tasks=("strong-30", "intermediate", "cipher", "cells", "ascii", "mixed"),
        objectives=("nll", "neg_prob", "cayley", "deft"),
        remedies=(),
        rates=(3e-3,),
        seeds=2,
        more_seeds=2,
        sgd_tasks=(),
    ),
)
TINY = (
    Size(pretrain=4, steps=0.005, windows=4, written=2),
    Plan(rates=(1e-3, 3e-3), beyond=(), seeds=2, more_seeds=2, sgd_rates=(0.1,)),
)


def further(best: float, known: list[float], beyond: list[float]) -> list[float]:
    """The rates that lie beyond the best, the next one first, where it is the last one known on a side."""
    if best == max(known):
        return sorted(rate for rate in beyond if rate > best)
    return sorted((rate for rate in beyond if rate < best), reverse=True) if best == min(known) else []


def began() -> None:
    """In a worker: one thread, and no life after the process that began it."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def record(folder: Path, size: Size, cell: Cell) -> dict[str, Any]:
    path = folder / f"{cell.name}.json"
    if not path.exists():
        write(path, json.dumps(run(cell, folder, size)) + "\n")
    return read(path)


class Runner:
    """The cells of one folder; those that are finished are read, the others run."""

    def __init__(self, folder: Path, size: Size, plan: Plan, workers: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size, self.plan = folder, size, plan
        self.began = time.monotonic()
        self.found = sum(1 for split in ("validation", "test") for _ in folder.glob(f"{split}-*.json"))
        settings = folder / "settings.json"
        if settings.exists() and read(settings) != size._asdict():
            raise SystemExit(f"{settings}: the folder has records of another size; give another folder")
        write(settings, json.dumps(size._asdict()))
        pretrain(folder, size)
        context = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(workers, context, began) if workers > 1 else None
        self.workers, self.grid_seed = workers, GRID_SEED + APART * size.seed

    def all(self, cells: Iterable[Cell], what: str) -> list[dict[str, Any]]:
        # Those of one task follow each other: a worker keeps the data of the last few tasks.
        cells = list(cells)
        one = partial(record, self.folder, self.size)
        found = self.pool.map(one, cells) if self.pool else map(one, cells)
        return list(tqdm(found, total=len(cells), unit="cell", desc=f"{what:<12}"))

    def chosen(self) -> tuple[dict[tuple[str, str], float], list[dict[str, Any]]]:
        """The rate of each task and objective, and the validation records that chose it."""
        plan, scale = self.plan, self.size.scale
        grid, beyond = ([rate / scale for rate in rates] for rates in (plan.rates, plan.beyond))
        pairs = plan.pairs()
        if len(grid) == 1:
            return dict.fromkeys(pairs, grid[0]), []
        tried = self.all(
            (Cell(*p, rate, self.grid_seed, "validation") for p in pairs for rate in grid), "rates"
        )
        while True:
            best = self.best(tried)
            known = {
                pair: [r["rate"] for r in tried if (r["task"], r["objective"]) == pair] for pair in pairs
            }
            more = [
                Cell(*pair, following[0], self.grid_seed, "validation")
                for pair in pairs
                if (following := further(best[pair], known[pair], beyond))
            ]
            if not more:
                return best, tried
            tried += self.all(more, "edges")

    def best(self, tried: list[dict[str, Any]]) -> dict[tuple[str, str], float]:
        found: dict[tuple[str, str], dict[str, Any]] = {}
        for r in tried:
            pair = (r["task"], r["objective"])
            if pair not in found or r["top1"] > found[pair]["top1"]:
                found[pair] = r
        return {pair: r["rate"] for pair, r in found.items()}

    def records(self) -> list[dict[str, Any]]:
        """Of all cells, those of the results last."""
        plan = self.plan
        rates, tried = self.chosen()
        cells = [
            Cell(task, objective, rate, seed + APART * self.size.seed, "test")
            for (task, objective), rate in rates.items()
            for seed in range(plan.number_of_seeds(task))
        ]
        results = self.all(cells, "results")
        sgd = [
            Cell(task, objective, rate / self.size.scale, self.grid_seed, "validation", "sgd")
            for task in plan.sgd_tasks
            if task in plan.tasks
            for objective in plan.sgd_objectives
            if objective in plan.objectives
            for rate in plan.sgd_rates
        ]
        return [*tried, *(self.all(sgd, "sgd") if sgd else []), *results]

    def recordings(self) -> None:
        """Where gradients would come from before the first step, task by task."""
        model = load(self.folder, self.size)
        for task in self.plan.tasks:
            for part, what in measured(task, "test", self.size).items():
                if part == task:
                    base_recording(model, what.rows).save(self.folder / f"base-{task}.npz")


def whole(runner: Runner, records: list[dict[str, Any]]) -> str:
    """The file of all records: a line each, so that a difference between two files can be read."""
    head = {
        "size": runner.size._asdict(),
        "plan": runner.plan._asdict(),
        "device": machine.device_name() if DEVICE.type == "cuda" else f"{machine.device_name()} a process",
        "versions": machine.versions(),
        "commit": machine.commit(),
        # From the start to here, and how many cells another start had left.
        "minutes": round((time.monotonic() - runner.began) / 60, 1),
        "workers": runner.workers,
        "found": runner.found,
    }
    lines = ",\n".join(json.dumps(r, separators=(",", ":")) for r in records)
    return json.dumps(head, indent=1)[:-2] + f',\n "records": [\n{lines}\n]\n}}\n'


def table(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    names = ("top1", "nll", "calibration_error", "alpha")
    results = [r for r in records if r["split"] == "test"]
    lines = [f"{'data':<20}{'objective':<16}{'rate':>7}" + "".join(f"{name:>22}" for name in names)]
    for task, objective in dict.fromkeys((r["task"], r["objective"]) for r in results):
        those = [r for r in results if (r["task"], r["objective"]) == (task, objective)]
        for part in those[0]["measured"]:
            called = part if part.startswith(task) else f"{task}: {part}"
            text = f"{called:<20}{objective:<16}{those[0]['rate']:>7g}"
            for name in names:
                values = [r["measured"][part][name] for r in those]
                values = [float("nan") if x is None else x for x in values]
                text += f"{statistics.mean(values):>13.3f} ± {statistics.stdev(values):<6.3f}"
            lines.append(text)
    return "\n".join(lines)


def narrowed(plan: Plan, tasks: list[str] | None, objectives: list[str] | None) -> Plan:
    if objectives:
        plan = plan._replace(objectives=tuple(objectives), remedies=())
    return plan._replace(tasks=tuple(tasks)) if tasks else plan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the records")
    parser.add_argument("--task", action="append", choices=TASKS, help="only this one; may be repeated")
    parser.add_argument("--objective", action="append", choices=OBJECTIVES, help="only this; may be repeated")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="some minutes: fewer cells, half the steps")
    size.add_argument("--tiny", action="store_true", help="seconds, to see it run; learns nothing")
    parser.add_argument("--scale", type=int, default=1, help="width, depth, heads and steps, times this")
    parser.add_argument("--seed", type=int, default=0, help="of pre-training and of every run (default: 0)")
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser.add_argument(
        "--workers",
        type=int,
        default=1 if DEVICE.type == "cuda" else cores,
        help="processes (default: cores)",
    )
    args = parser.parse_args()
    for name in ("scale", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}: expected 1 or more, got {getattr(args, name)}")
    if args.seed < 0:
        parser.error(f"--seed: expected 0 or more, got {args.seed}")
    torch.set_num_threads(1)
    chosen, plan = QUICK if args.quick else TINY if args.tiny else DEFAULT
    chosen = chosen._replace(
        scale=args.scale,
        steps=chosen.steps * args.scale,
        pretrain=chosen.pretrain * args.scale,
        seed=args.seed,
    )
    runner = Runner(args.out, chosen, narrowed(plan, args.task, args.objective), args.workers)
    records = runner.records()
    runner.recordings()
    write(args.out / "records.json", whole(runner, records))
    print(table(records))


if __name__ == "__main__":
    main()
