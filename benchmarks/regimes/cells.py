"""A cell: one fine-tuning of one task with one rate and seed, and what it leaves on disk."""

from __future__ import annotations

import json
import math
import os
import time
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import measures
import torch
from tasks import BUDGETS, Measured, Rows, parts, random_windows, task, windows
from texts import DEVICE, ByteModel, pretraining
from torch import nn
from treatments import Treatment, treatment

from deft_kernels import deft_loss


class Cell(NamedTuple):
    task: str
    objective: str
    rate: float
    seed: int
    split: str  # that it is measured on: validation to choose a rate, test for the result
    optimizer: str = "adamw"

    @property
    def name(self) -> str:
        end = "" if self.optimizer == "adamw" else f"-{self.optimizer}"
        return f"{self.split}-{self.task}-{self.objective}-{self.rate:g}-{self.seed}{end}"


class Size(NamedTuple):
    """What decides a cell's numbers besides the cell."""

    pretrain: int = 2000
    steps: float = 1.0  # times the task's budget
    windows: int = 128  # that are measured
    written: int = 40  # samples of art that a model writes
    scale: int = 1  # of the model: width, heads and depth; the rates are divided by it
    seed: int = 0  # of pre-training

    def model(self) -> ByteModel:
        return ByteModel(64 * self.scale, 2 * self.scale, 4 * self.scale).to(DEVICE)


def write(path: Path, content: str) -> None:
    """Beside, then renamed: a record that is there is whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(content)
    os.replace(beside, path)


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path}: no JSON ({error}); remove it, and the cell is run again") from error


def optimizer_of(model: ByteModel, name: str, rate: float) -> torch.optim.Optimizer:
    if name == "sgd":
        return torch.optim.SGD(model.parameters(), rate, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)


def train(model: ByteModel, draw: Any, treat: Treatment, cell: Cell, steps: int) -> list[Any]:
    """Fine-tune in place; [step, mean alpha, p, gate] of the labels since the last of ten points."""
    generator = torch.Generator().manual_seed(cell.seed)
    optimizer = optimizer_of(model, cell.optimizer, cell.rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, cell.rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    points, pending = [], []
    for step in range(1, steps + 1):
        rows: list[Rows] = draw(generator)
        logits = torch.cat([model(part.inputs).flatten(0, 1) for part in rows])
        labels = torch.cat([part.labels.flatten() for part in rows])
        counts = labels != -100
        if not counts.all():
            logits, labels = logits[counts], labels[counts]
        objective = treat(logits, labels, (step - 1) / steps)
        loss, stats = deft_loss(logits, labels, objective=objective, return_stats=True)
        loss.backward()
        # Under SGD the scale of the gate's gradients is what is asked about, which clipping would hide.
        if cell.optimizer != "sgd":
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        pending.append(torch.stack([stats.collision.mean(), stats.logp.exp().mean(), stats.gate.mean()]))
        if step == 1 or step % max(1, steps // 10) == 0:
            points.append([step, *(round(x, 5) for x in torch.stack(pending).mean(0).tolist())])
            pending.clear()
    return points


@lru_cache(maxsize=4)
def known(number: int) -> list[Rows]:
    return windows(pretraining(), number)


@lru_cache(maxsize=2)
def measured(name: str, split: str, size: Size) -> dict[str, Measured]:
    """The same for every seed, as only training labels are ever wrong."""
    return task(name, 0).measured(split, size.windows, size.written if split == "test" else 0)


@lru_cache(maxsize=4)
def before(folder: Path, size: Size, name: str) -> tuple[dict[str, measures.Seen], float]:
    """The base model on what is tested, and on its own text."""
    model = load(folder, size)
    found = {what: measures.seen(model, m.rows) for what, m in measured(name, "test", size).items()}
    return found, measures.seen(model, known(size.windows)).nll.mean().item()


def run(cell: Cell, folder: Path, size: Size) -> dict[str, Any]:
    """Fine-tune the base model and measure it."""
    begin = time.process_time()
    model, data = load(folder, size), task(cell.task, cell.seed)
    steps, each = BUDGETS[cell.task]
    steps = max(3, round(steps * size.steps))
    course = train(model, lambda g: data.batch(each, g), treatment(cell.objective), cell, steps)
    made: dict[str, Any] = {**cell._asdict(), "course": course, "measured": {}}
    tuned = measured(cell.task, "validation", size)
    if cell.split == "validation":
        made["measured"] = {part: measures.quick(model, what) for part, what in tuned.items()}
    else:
        first, loss_before = before(folder, size, cell.task)
        temperatures = {part: measures.seen(model, what.rows, scaled=True) for part, what in tuned.items()}
        for part, what in measured(cell.task, "test", size).items():
            own = temperatures[part.partition(",")[0]]
            made["measured"][part] = measures.whole(model, what, first[part], own)
        rise = measures.seen(model, known(size.windows)).nll.mean().item() - loss_before
        made["pretraining_nll_rise"] = rise
    made["top1"] = sum(made["measured"][part]["top1"] for part in parts(cell.task)) / len(parts(cell.task))
    made["seconds"] = time.process_time() - begin  # of a core: others may want the machine too
    return rounded(made)


def rounded(what: Any) -> Any:
    """Six digits are more than any of it means; a number that is none is null, as JSON has no NaN."""
    if isinstance(what, dict):
        return {name: rounded(x) for name, x in what.items()}
    if isinstance(what, list):
        return [rounded(x) for x in what]
    if isinstance(what, float):
        return float(f"{what:.6g}") if math.isfinite(what) else None
    return what


def pretrain(folder: Path, size: Size) -> None:
    """Leave the weights after pre-training with cross-entropy in the folder, unless they are there."""
    path = folder / "base.pt"
    if path.exists():
        return
    torch.manual_seed(size.seed)
    model, text = size.model(), pretraining()
    cell = Cell("pretraining", "nll", 5e-3 / size.scale, size.seed, "train")
    train(model, lambda g: [random_windows(text, 8, g)], treatment("nll"), cell, size.pretrain)
    beside = path.with_name("base.pt.part")
    torch.save(model.state_dict(), beside)
    os.replace(beside, path)


def load(folder: Path, size: Size) -> ByteModel:
    model = size.model()
    model.load_state_dict(torch.load(folder / "base.pt", map_location=DEVICE, weights_only=True))
    return model
