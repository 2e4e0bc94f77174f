"""docs/diagnostics.md: every block runs, and its numbers are the code's."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded
import torch
from documents import ROOT, commands, execute, prose

from deft_kernels import __main__ as program
from deft_kernels import row_statistics
from deft_kernels.diagnostics import Recorder, Recording, readings
from deft_kernels.diagnostics.bins import ALPHA, ENTROPY, P
from deft_kernels.diagnostics.sample import INTEGERS, NUMBERS

PAGE = "docs/diagnostics.md"


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def rows() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 6, 11, requires_grad=True), torch.randint(0, 11, (4, 6))


def test_record_and_draw_a_run() -> None:
    batches = [rows() for _ in range(3)]
    recorder = execute(PAGE, 0, {"batches": batches})["recorder"]
    assert all(logits.grad is not None for logits, _ in batches)
    assert Recording.load("run.npz").count == recorder.recording().count == 72
    execute(PAGE, 3, {})
    assert {path.name for path in Path().glob("*.png")} == {"training.png", "mass.png"}


def test_channels() -> None:
    logits, labels = rows()
    kind = torch.arange(24).reshape(4, 6) % 2
    stats = row_statistics(logits, labels)
    scope = execute(PAGE, 1, {"Recorder": Recorder, "stats": stats, "labels": labels, "kind": kind})
    means = [stats.collision[kind == number].mean().item() for number in (0, 1)]
    assert list(scope["alpha"].values()) == pytest.approx(means)
    assert list(scope["alpha"]) == ["code", "mathematics"]


def test_learned_and_forgotten() -> None:
    run = recorded.run()
    given = {"Recorder": Recorder, "torch": torch, "row_statistics": row_statistics, "labels": run.labels}
    logits = run.logits.clone()
    given |= {"model": lambda inputs: logits[inputs], "inputs": torch.arange(len(logits))}
    from deft_kernels.diagnostics import figures

    scope = execute(PAGE, 4, {**given, "figures": figures, "train": lambda: logits.mul_(2)})
    assert scope["after"].mean("alpha") > scope["before"].mean("alpha")
    assert Path("learned.png").exists()


def test_saved_logits_and_their_report() -> None:
    """The page's two commands in turn, the example's model hardly trained; then the line with two files."""
    lines = [shlex.split(line) for line in commands(PAGE)]
    example, *reports = (words for words in lines if words[0].endswith("python"))
    assert example[1:] == ["docs/examples/finetune.py", "--logits", "logits.npz"]
    subprocess.run(
        [sys.executable, ROOT / example[1], *example[2:], "--tiny"], check=True, capture_output=True
    )
    with np.load("logits.npz") as fields:
        assert fields["logits"].shape == (96, 128, 256) and fields["labels"].shape == (96, 128)
        np.savez("labels.npz", labels=fields["labels"])
        np.savez("unlabelled.npz", logits=fields["logits"])
    assert [words[1:4] for words in reports] == [["-m", "deft_kernels", "report"]] * 2
    for words in reports:
        Path("report/recording.npz").unlink(missing_ok=True)
        assert (
            program.command([word.replace("logits.safetensors", "unlabelled.npz") for word in words[3:]]) == 0
        )
        assert Recording.load("report/recording.npz").count == 96 * 128


def test_numbers_of_the_page() -> None:
    page = prose(PAGE)
    assert "p in hundredths, alpha in fiftieths, H in quarters of a nat up to 12.5" in page
    assert (P.number, ALPHA.number, ENTROPY.top / ENTROPY.number, ENTROPY.top) == (100, 50, 0.25, 12.5)
    recorder = Recorder()
    assert f"at most {recorder.slots} intervals" in page and f"{recorder.size} single tokens" in page
    assert "the default six" in page and len(recorder.objectives) == 6
    assert len((*INTEGERS, *NUMBERS)) == len(
        ["id", "step", "channel", "label", "log p", "H", "alpha", "max p", "gate"]
    )
    assert (
        f"strong: alpha near {readings.STRONG_START} at the start, weak: near {readings.WEAK_START}" in page
    )
    logits, labels = rows()
    recorder.add(row_statistics(logits, labels), labels)
    sample = recorder._sample
    tables = [*recorder._tables.values(), sample.keys, sample.integers, sample.numbers]
    assert f"{sum(t.untyped_storage().nbytes() for t in tables) / 1e6:.1f} MB" in page
