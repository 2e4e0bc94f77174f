"""The paper's regimes in small: every objective on strong, intermediate and weak bytes, in one command.

    python benchmarks/regimes/run.py OUT            # the default size
    python benchmarks/regimes/run.py OUT --tiny     # seconds, to see it run; learns nothing

The learning rate of each objective and task is chosen by top-1 on the validation files, with a seed of its
own, from one grid; the result is on the test files, over three seeds. OUT has one JSON file a finished cell:
after a kill the same command goes on, and ends with the same numbers. It prints a table.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import torch
from cells import OBJECTIVES, Cell, base_model, read, run, write
from texts import DEVICE, TASKS, ByteModel, pretraining, splits
from tqdm import tqdm

SIZES: dict[str, dict[str, Any]] = {
    "default": {
        "pretrain": 2000,
        "steps": 600,
        "windows": 128,
        "rates": [1e-3, 3e-3, 6e-3],
        "seeds": [0, 1, 2],
    },
    "tiny": {"pretrain": 4, "steps": 3, "windows": 4, "rates": [1e-3, 3e-3], "seeds": [0, 1]},
}
GRID_SEED = 100


class Runner:
    """The cells of one folder; those that are finished are read, the others run."""

    def __init__(self, folder: Path, size: dict[str, Any]):
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.size = folder, size
        settings = folder / "settings.json"
        if settings.exists() and read(settings) != size:
            raise SystemExit(f"{settings}: the folder has records of another size; give another folder")
        write(settings, json.dumps(size))
        self.known = pretraining()
        self.base = base_model(folder, self.known, size["pretrain"])

    def record(self, cell: Cell) -> dict[str, Any]:
        path = self.folder / f"{cell.name}.json"
        if not path.exists():
            model = ByteModel().to(DEVICE)
            model.load_state_dict(self.base)
            data = splits(cell.task, cell.seed)
            made = run(cell, model, data, self.known, self.size["steps"], self.size["windows"])
            write(path, json.dumps(made) + "\n")
        return read(path)

    def all(self, tasks: list[str]) -> list[dict[str, Any]]:
        """The test cells' records, after the validation cells' have chosen the rates."""
        rates, seeds = self.size["rates"], self.size["seeds"]
        pairs = [(task, objective) for task in tasks for objective in OBJECTIVES]
        found = []
        with tqdm(total=len(pairs) * (len(rates) + len(seeds)), unit="cell") as bar:
            for task, objective in pairs:
                tried = []
                for rate in rates:
                    tried.append(self.record(Cell(task, objective, rate, GRID_SEED, "validation")))
                    bar.update()
                best = max(tried, key=lambda record: record["top1"])["rate"]
                for seed in seeds:
                    found.append(self.record(Cell(task, objective, best, seed, "test")))
                    bar.update()
        return found


def table(records: list[dict[str, Any]]) -> str:
    """Mean and standard deviation over seeds."""
    names = ("top1", "nll", "calibration_error", "alpha", "pretraining_nll_rise")
    lines = [f"{'task':<14}{'objective':<14}{'rate':>7}" + "".join(f"{name:>23}" for name in names)]
    for task, objective in dict.fromkeys((r["task"], r["objective"]) for r in records):
        those = [r for r in records if (r["task"], r["objective"]) == (task, objective)]
        cells = [[r[name] for r in those] for name in names]
        numbers = "".join(f"{statistics.mean(x):>14.3f} ± {statistics.stdev(x):<6.3f}" for x in cells)
        lines.append(f"{task:<14}{objective:<14}{those[0]['rate']:>7g}{numbers}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="a folder for the records")
    parser.add_argument("--task", action="append", choices=TASKS, help="only this one; may be repeated")
    parser.add_argument("--tiny", action="store_true", help="seconds, to see it run; learns nothing")
    args = parser.parse_args()
    torch.set_num_threads(1)
    runner = Runner(args.out, SIZES["tiny" if args.tiny else "default"])
    print(table(runner.all(args.task or list(TASKS))))


if __name__ == "__main__":
    main()
