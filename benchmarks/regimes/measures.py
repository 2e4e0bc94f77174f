"""What is measured of a model: loss, top-1, calibration, alpha, what it learned and forgot, and writes."""

from __future__ import annotations

from typing import Any, NamedTuple

import art
import torch
from tasks import Measured, Rows
from texts import DEVICE, ByteModel
from torch import Tensor

from deft_kernels import row_statistics
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.diagnostics.readings import paired

BINS = 15  # of confidence, for the calibration error
SHARES = 20  # bins of p
TEMPERATURES = [0.5 * 8 ** (i / 16) for i in range(17)]  # 0.5 to 4
DRAWN = 4096  # tokens that are followed from before to after


class Seen(NamedTuple):
    """Of each label that counts, in order."""

    nll: Tensor  # -log p, nats
    correct: Tensor  # 1 where the label is the most probable
    most: Tensor  # the largest probability
    alpha: Tensor
    ink: Tensor  # bool; empty where the data is no art
    scaled: Tensor  # [temperatures], mean -log p with the logits over each temperature
    recording: Recording


@torch.no_grad()
def seen(model: ByteModel, rows: list[Rows], scaled: bool = False) -> Seen:
    parts: list[Any] = []
    sums = torch.zeros(len(TEMPERATURES), dtype=torch.float64)
    recorder = Recorder(("nll",), tokens=DRAWN)
    for inputs, labels, ink in rows:
        counts = labels != art.IGNORED
        logits, labels = model(inputs)[counts], labels[counts]
        stats = row_statistics(logits, labels)
        recorder.add(stats, labels)
        shown = ink[counts] if ink is not None else labels.new_zeros(0, dtype=torch.bool)
        correct, most = stats.correct.float(), stats.max_prob
        parts.append([x.cpu() for x in (-stats.logp, correct, most, stats.collision, shown)])
        if scaled:
            at = logits.float().gather(-1, labels[:, None])[:, 0]
            for place, temperature in enumerate(TEMPERATURES):
                sums[place] += ((logits.float() / temperature).logsumexp(-1) - at / temperature).sum().item()
    nll, correct, most, alpha, shown = (torch.cat(x) for x in zip(*parts, strict=True))
    return Seen(nll, correct, most, alpha, shown, sums / len(nll), recorder.recording())


def calibration_error(confidence: Tensor, correct: Tensor) -> float:
    """The expected calibration error, over bins of equal width."""
    at = (confidence * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS).index_add_(0, at, confidence - correct)
    return (gap.abs().sum() / len(at)).item()


def histogram(nll: Tensor) -> list[float]:
    """Per cent of the labels in each twentieth of p."""
    counts = torch.bincount((nll.neg().exp() * SHARES).long().clamp(max=SHARES - 1), minlength=SHARES)
    return [round(100 * x / len(nll), 3) for x in counts.tolist()]


def quick(model: ByteModel, what: Measured) -> dict[str, Any]:
    """Enough to choose a learning rate."""
    after = seen(model, what.rows)
    return {"nll": after.nll.mean().item(), "top1": 100 * after.correct.mean().item()}


def whole(model: ByteModel, what: Measured, before: Seen, tuned: Seen) -> dict[str, Any]:
    """`before` is of the same rows; `tuned` is of validation rows, for the temperature."""
    after = seen(model, what.rows, scaled=True)
    place = int(tuned.scaled.argmin())
    p_before, p = (-before.nll).exp(), (-after.nll).exp()
    found = {
        "nll": after.nll.mean().item(),
        "top1": 100 * after.correct.mean().item(),
        "calibration_error": calibration_error(after.most, after.correct),
        "temperature": TEMPERATURES[place],
        "nll_with_temperature": after.scaled[place].item(),
        "alpha_before": before.alpha.mean().item(),
        "alpha": after.alpha.mean().item(),
        "p": p.mean().item(),
        "learned": 100 * ((p_before < 0.5) & (p >= 0.5)).float().mean().item(),
        "forgotten": 100 * ((p_before >= 0.5) & (p < 0.5)).float().mean().item(),
        "p_before_histogram": histogram(before.nll),
        "p_histogram": histogram(after.nll),
        # (alpha before from, to, tokens, what those that got better add to the mean change of p, and worse)
        "change_of_p": [[*group] for group in paired(before.recording, after.recording)],
    }
    if what.samples:
        found["top1_ink"] = 100 * after.correct[after.ink].mean().item()
        which = list(what.samples)
        found |= art.scores(which, art.written(model, which))
    return found


def base_recording(model: ByteModel, rows: list[Rows]) -> Recording:
    """Where every objective's gradient would come from, before a step is taken."""
    recorder = Recorder(tokens=256, slots=2, device=DEVICE)
    with torch.no_grad():
        for inputs, labels, _ in rows:
            counts = labels != art.IGNORED
            recorder.add(row_statistics(model(inputs)[counts], labels[counts]), labels[counts])
    return recorder.recording()
