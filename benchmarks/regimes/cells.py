"""A cell: one fine-tuning of one task with one rate and seed, and what it leaves on disk."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from texts import CONTEXT, DEVICE, ByteModel, Splits, Text
from torch import Tensor, nn

from deft_kernels import deft_loss, objectives, row_statistics

# dft has neg_prob's gradient (docs/mathematics.md), so its cells would be the same.
OBJECTIVES: dict[str, Any] = {
    "nll": "nll",
    "neg_prob": "neg_prob",
    "tsallis-0.5": objectives.tsallis(0.5),
    "eaft": "eaft",
    "cayley": "cayley",
    "deft": "deft",
    "deft-order-1": objectives.deft(1),
}
BINS = 15  # of confidence, for the calibration error


class Cell(NamedTuple):
    task: str
    objective: str
    rate: float
    seed: int
    split: str  # that it is measured on: validation to choose a rate, test for the result

    @property
    def name(self) -> str:
        return f"{self.split}-{self.task}-{self.objective}-{self.rate:g}-{self.seed}"


def write(path: Path, content: str) -> None:
    """Beside, then renamed: a record that is there is whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(content)
    os.replace(beside, path)


def batch(text: Text, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs, labels, _ = text.windows(
        torch.randint(len(text.inputs) - CONTEXT + 1, (size,), generator=generator)
    )
    return inputs, labels


def train(model: ByteModel, text: Text, objective: Any, rate: float, seed: int, steps: int) -> list[Any]:
    """Fine-tune in place; (step, mean alpha, mean p) of the training tokens at ten points."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rate, total_steps=steps + 1, pct_start=0.05, cycle_momentum=False
    )
    points = []
    for step in range(1, steps + 1):
        inputs, labels = batch(text, 8, generator)
        loss, stats = deft_loss(model(inputs), labels, objective=objective, return_stats=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step == 1 or step % max(1, steps // 10) == 0:
            points.append((step, stats.collision.mean().item(), stats.logp.exp().mean().item()))
    return points


@torch.no_grad()
def rows(model: ByteModel, text: Text, windows: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """-log p, top-1, largest p and alpha of the tokens of evenly spaced windows, each [tokens]."""
    parts: list[Any] = []
    for starts in torch.linspace(0, len(text.inputs) - CONTEXT, windows).long().split(32):
        inputs, labels, _ = text.windows(starts)
        stats = row_statistics(model(inputs), labels)
        correct, most = stats.correct.float(), stats.max_prob
        parts.append([x.flatten().cpu() for x in (-stats.logp, correct, most, stats.collision)])
    nll, correct, most, alpha = (torch.cat(x) for x in zip(*parts, strict=True))
    return nll, correct, most, alpha


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The expected calibration error, over bins of equal width."""
    at = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add_(0, at, confidence - correct)
    return (gap.abs().sum() / len(at)).item()


def run(cell: Cell, base: ByteModel, data: Splits, before: Text, steps: int, windows: int) -> dict[str, Any]:
    """Fine-tune the base model, which becomes the fine-tuned one, and measure it."""
    held_out = getattr(data, cell.split)
    nll_before = rows(base, held_out, windows)[0]
    known_before = rows(base, before, windows)[0].mean().item()
    course = train(base, data.train, OBJECTIVES[cell.objective], cell.rate, cell.seed, steps)
    nll, correct, most, alpha = rows(base, held_out, windows)
    p_before, p = (-nll_before).exp(), (-nll).exp()
    return {
        **cell._asdict(),
        "nll": nll.mean().item(),
        "top1": 100 * correct.mean().item(),
        "calibration_error": calibration_error(most, correct),
        "alpha": alpha.mean().item(),
        "p": p.mean().item(),
        "learned": 100 * ((p_before < 0.5) & (p >= 0.5)).float().mean().item(),
        "forgotten": 100 * ((p_before >= 0.5) & (p < 0.5)).float().mean().item(),
        "pretraining_nll_rise": rows(base, before, windows)[0].mean().item() - known_before,
        "course": course,
    }


def read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise SystemExit(f"{path}: no JSON ({error}); remove it, and the cell is run again") from error


def base_model(folder: Path, text: Text, steps: int) -> dict[str, Any]:
    """The weights after pre-training with cross-entropy, from disk if they are there."""
    path = folder / "base.pt"
    if not path.exists():
        torch.manual_seed(0)
        model = ByteModel().to(DEVICE)
        train(model, text, "nll", 5e-3, 0, steps)
        beside = path.with_name("base.pt.part")
        torch.save(model.state_dict(), beside)
        os.replace(beside, path)
    return torch.load(path, map_location=DEVICE, weights_only=True)
