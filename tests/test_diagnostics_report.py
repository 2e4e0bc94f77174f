"""Figures and the report: what they show is what was recorded."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest
import recorded
import torch
from matplotlib.axes import Axes
from matplotlib.image import imread
from test_diagnostics_files import safetensors

from deft_kernels import __main__ as program
from deft_kernels import deft_loss, row_statistics
from deft_kernels.diagnostics import OBJECTIVES, Recorder, Recording, figures, readings, streaming
from deft_kernels.diagnostics.bins import ENTROPY, P


@pytest.fixture
def axis() -> Axes:
    return figures.blank().subplots()


def legend(axis: Axes) -> list[str]:
    return [text.get_text() for text in axis.get_legend().get_texts()]


def drawn(axis: Axes, path: Path) -> np.ndarray:
    """The picture's pixels: its ground is white and opaque, and there is something on it."""
    figures.save(axis.figure, path, caption="What to read from it.")
    pixels = imread(path)
    assert (pixels[0, 0] == 1).all() and (pixels[..., 3] == 1).all()
    assert (pixels[..., :3].min(-1) < 0.5).mean() > 0.002
    return pixels


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_gradient_mass(axis: Axes, objective: str, tmp_path: Path) -> None:
    recording = recorded.run().after
    assert figures.gradient_mass(recording, axis, objective) is axis
    (mesh,) = axis.collections
    shares = mesh.get_array()
    mass = recording.mass[recording.number(objective)].sum(0)
    assert shares.sum() == pytest.approx(100)
    coarse = mass.reshape(25, 4, -1).sum(1).T
    np.testing.assert_allclose(shares.filled(0), 100 * coarse / mass.sum())
    assert shares.mask.sum() == (coarse == 0).sum()
    highest = np.flatnonzero(recording.histogram("entropy"))[-1]
    assert axis.get_xlim() == (0, 1) and axis.get_ylim() == (0, ENTROPY.edges()[highest + 1])
    assert (axis.get_title(), axis.get_ylabel()) == (objective, "entropy H, nats")
    assert mesh.norm.vmin == figures.LEAST_SHARE and mesh.norm.vmax == figures.MOST_SHARE
    drawn(axis, tmp_path / "mass.png")


def test_panels_have_one_scale_and_the_objectives() -> None:
    recording = recorded.run().after
    figure = figures.panels_of_mass(recording)
    panels = [axis for axis in figure.axes if axis.get_title()]
    assert [axis.get_title() for axis in panels] == list(recording.objectives)
    assert len({(axis.get_ylim(), axis.collections[0].norm.vmax) for axis in panels}) == 1


def test_over_training(axis: Axes, tmp_path: Path) -> None:
    recording = recorded.run().training
    figures.over_training(recording, axis)
    assert legend(axis) == ["focus index α = Σ p²", "gate of the loss", "probability p of the label"]
    for line, of in zip(axis.lines, ("alpha", "gate", "p"), strict=True):
        step, mean, _ = recording.over_time(of)
        np.testing.assert_array_equal(line.get_xydata(), np.stack([step, mean], 1))
    assert len(axis.lines[0].get_xdata()) == recorded.STEPS
    assert len(axis.collections) == 3  # the spreads
    for bars, of in zip(axis.collections, ("alpha", "gate", "p"), strict=True):
        step, mean, spread = recording.over_time(of)
        for (x, low), (_, high) in bars.get_segments():
            place = list(step).index(x)
            assert low == pytest.approx(max(mean[place] - spread[place], 0))
            assert high == pytest.approx(min(mean[place] + spread[place], 1))
    assert axis.get_ylim() == (0, 1.02) and "step" in axis.get_xlabel()
    drawn(axis, tmp_path / "training.png")


@pytest.mark.parametrize("of, unit", [("p", "p"), ("nll", "−log p, nats")])
def test_learned_and_forgotten(axis: Axes, of: str, unit: str, tmp_path: Path) -> None:
    before, after = recorded.run().before, recorded.run().after
    figures.learned_and_forgotten(before, after, axis, of=of)
    assert legend(axis) == ["mean change", "learned", "forgotten"]
    assert axis.get_ylabel() == f"mean change of {unit}"
    # The two samples are of the same tokens, so their change is that of the tokens.
    np.testing.assert_array_equal(before.token("id"), after.token("id"))
    change = np.exp(after.token("logp")) - np.exp(before.token("logp"))
    change = before.token("logp") - after.token("logp") if of == "nll" else change
    group = np.minimum((before.token("alpha") * 5).astype(int), 4)
    (dots,) = (line for line in axis.lines if line.get_marker() == "o")
    for number, height in enumerate(dots.get_ydata()):
        own = change[group == number]
        assert height == pytest.approx(own.mean() if len(own) else 0)
    bars = np.array([bar.get_height() for bar in axis.patches]).reshape(2, 5)
    assert (bars[0] * (1 if of == "p" else -1) >= 0).all() and (bars[0] * bars[1] <= 0).all()
    ticks = " ".join(text.get_text() for text in axis.get_xticklabels())
    assert sum(int(n) for n in re.findall(r"n = (\d+)", ticks)) == 256
    drawn(axis, tmp_path / "learned.png")


def test_other_tokens_are_not_compared() -> None:
    run = recorded.run()
    other = Recorder(["nll"], tokens=256)
    labels = (run.labels + 1) % recorded.V
    other.add(row_statistics(run.logits, labels), labels)
    with pytest.raises(ValueError, match="after: tokens of the same id have other labels"):
        readings.paired(run.before, other.recording())
    none = Recorder(["nll"])
    none.add(row_statistics(run.logits, labels), labels, ids=torch.arange(10_000, 10_599))
    with pytest.raises(ValueError, match="after: has no token of `before`"):
        readings.paired(run.before, none.recording())


def test_histogram_of_p(axis: Axes, tmp_path: Path) -> None:
    run = recorded.run()
    figures.histogram_of_p({"before": run.before, "after": run.after}, axis)
    assert legend(axis) == ["before, n = 599", "after, n = 599"]
    for stairs, recording in zip(axis.patches, (run.before, run.after), strict=True):
        values, edges, _ = stairs.get_data()
        np.testing.assert_allclose(values, 100 * recording.histogram("p") / 599)
        np.testing.assert_array_equal(edges, P.edges())
    assert axis.get_yscale() == "log" and axis.get_xlim() == (0, 1)
    drawn(axis, tmp_path / "histogram.png")


def test_a_channel_of_a_figure(axis: Axes) -> None:
    recording = recorded.run().before
    figures.histogram_of_p({"odd": recording}, axis, channel="odd")
    assert legend(axis) == ["odd, n = 299"]


def test_shares_of_the_kinds_are_those_of_the_tokens() -> None:
    recording, run = Recorder(tokens=1000), recorded.run()
    _, stats = deft_loss(run.logits, run.labels, return_stats=True)
    recording.add(stats, run.labels)
    conflict, unsure, between, known = readings.kinds(recording.recording())
    p, sure = stats.logp.exp(), stats.entropy < 1.0
    norm = stats.gate * (stats.collision - 2 * p + 1).clamp(min=0).sqrt()
    kinds = [(p < 0.1) & sure, (p < 0.1) & ~sure, (p >= 0.1) & (p < 0.5), p >= 0.5]
    for kind, own in zip((conflict, unsure, between, known), kinds, strict=True):
        assert kind.tokens == pytest.approx(own.double().mean().item()), kind.name
        assert kind.mass["deft"] == pytest.approx((norm[own].sum() / norm.sum()).item(), rel=1e-4), kind.name
    label, share = readings.commonest_label(recording.recording())
    names, counts = run.labels.unique(return_counts=True)
    assert label == names[counts.argmax()] and share == pytest.approx(counts.max().item() / 599)


def test_regimes() -> None:
    assert [readings.regime(a) for a in (0.65, 0.5, 0.3, 0.2, 0.05, float("nan"))] == [
        "strong", "strong", "intermediate", "weak", "weak", "unknown"
    ]  # fmt: skip


def report(*arguments: object) -> int:
    return program.command(["report", *map(str, arguments)])


def test_a_report_of_logits(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    """In blocks of 100 rows; the page and the recording say what the tensors do."""
    run = recorded.run()
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 100 * 4 * recorded.V)
    np.savez(tmp_path / "a.npz", logits=run.logits.numpy(), labels=run.labels.numpy())
    assert report(tmp_path / "a.npz", "--out", tmp_path / "out") == 0
    printed = capsys.readouterr()
    assert "599/599" in printed.err and "over 599 tokens" in printed.out
    found = Recording.load(tmp_path / "out" / "recording.npz")
    np.testing.assert_array_equal(found.p_entropy.sum(0), run.after.p_entropy.sum(0))
    assert found.mean("alpha") == pytest.approx(run.after.mean("alpha"))
    page = (tmp_path / "out" / "index.html").read_text()
    assert (
        f"<b>{found.mean('alpha'):.3f}</b>" in page
        and f"<b>{readings.regime(found.mean('alpha'))}</b>" in page
    )
    for name, (gate, _, _) in readings.gates(found).items():
        assert f"<td>{name}</td><td>{gate:.3f}</td>" in page
    assert "0.65" in page and "What is not measured here" in page
    assert page.count("data:image/png;base64,") == 2
    assert not re.search(r'(?:src|href)="(?!data:)', page) and "http" not in page  # all in one file
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "gradient_mass.png", "histogram_of_p.png", "index.html", "recording.npz"
    ]  # fmt: skip


def test_a_report_of_hidden_states_is_that_of_their_logits(tmp_path: Path) -> None:
    hidden, head = torch.randn(4, 30, 8).bfloat16(), (torch.randn(50, 8) * 2).bfloat16()
    labels = torch.randint(0, 50, (4, 30))
    logits = hidden @ head.T
    safetensors(tmp_path / "model.safetensors", **{"lm_head.weight": head})
    safetensors(tmp_path / "states.safetensors", hidden=hidden, labels=labels)
    safetensors(tmp_path / "logits.safetensors", logits=logits, labels=labels)
    files = [tmp_path / "model.safetensors", tmp_path / "states.safetensors"]
    common = ["--shift", "--objective", "nll", "--objective", "deft", "--temperature", 1.5]
    assert report(*files, "--tensor", "weight=lm_head.weight", "--out", tmp_path / "a", *common) == 0
    assert report(tmp_path / "logits.safetensors", "--out", tmp_path / "b", *common) == 0
    first, second = (Recording.load(tmp_path / name / "recording.npz") for name in "ab")
    assert first.objectives == ("nll", "deft") and first.count == second.count == 4 * 29
    for name in ("alpha", "nll", "p", "gate"):
        assert first.mean(name) == pytest.approx(second.mean(name), rel=1e-5)


@pytest.mark.parametrize(
    "change, arguments, message",
    [
        ({"labels": np.full(4, -100)}, (), "a.npz: labels: every label is the ignored one, -100"),
        ({"labels": np.arange(3)}, (), "a.npz: labels: has shape (3,)"),
        ({"logits": np.full((4, 9), np.nan, np.float32)}, (), "a.npz: logits: row 0 "),
        ({}, ("--objective", "gate"), "objectives: unknown name 'gate'"),
        ({}, ("--device", "gpu"), "--device: expected a device, got 'gpu'"),
        ({}, ("--device", "meta"), "--device: 'meta' cannot compute here"),
        ({}, ("--tensor", "logit=x"), "--tensor: expected NAME=IN_FILE with NAME of logits"),
        ({}, ("--tensor", "logits=x"), "a.npz: x: no file has a tensor of this name"),
    ],
)
def test_a_report_of_bad_input(tmp_path: Path, change, arguments, message: str, capsys) -> None:
    fields = {"logits": np.zeros((4, 9), np.float32), "labels": np.arange(4)} | change
    np.savez(tmp_path / "a.npz", **fields)
    assert report(tmp_path / "a.npz", "--out", tmp_path / "out", *arguments) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_report_into_a_file(tmp_path: Path, capsys) -> None:
    """Before the statistics of all tokens are made."""
    np.savez(tmp_path / "a.npz", logits=np.zeros((4, 9), np.float32), labels=np.arange(4))
    assert report(tmp_path / "a.npz", "--out", tmp_path / "a.npz") == 1
    assert "--out: " in capsys.readouterr().err


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.command(["--help"]) == 0
    assert "report FILE" in capsys.readouterr().out


def test_the_row_with_a_nan_is_named(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 4 * 9 * 2)
    logits = np.zeros((8, 9), np.float32)
    logits[5, 2] = np.nan
    labels = np.arange(8)
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels)
    assert report(tmp_path / "a.npz", "--out", tmp_path / "out") == 1
    assert "logits: row 5 (of all but the last dimension) gives a NaN" in capsys.readouterr().err
    labels[5] = -100  # and then it counts for nothing
    np.savez(tmp_path / "a.npz", logits=logits, labels=labels)
    assert report(tmp_path / "a.npz", "--out", tmp_path / "out") == 0


def test_another_word_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert program.command(["reprot"]) == 2
    assert "unknown 'reprot'" in capsys.readouterr().err


def test_without_matplotlib_the_package_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert report(tmp_path / "none.npz") == 1
    assert "pip install matplotlib tqdm" in capsys.readouterr().err
