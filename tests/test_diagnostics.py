"""The recorder: what it sums is what the tokens say, in memory that does not grow."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from recorded import CLASSES as V
from recorded import rows
from torch import Tensor

from deft_kernels import deft_loss, objectives, reference, row_statistics
from deft_kernels.diagnostics import OBJECTIVES, Recorder, gradient_norm
from deft_kernels.diagnostics.bins import ALPHA, ENTROPY, P


def oracle(logits: Tensor, labels: Tensor) -> dict[str, np.ndarray]:
    """p, H and alpha of the rows that count, the slow way."""
    counts = labels != -100
    found = reference.statistics(logits[counts].double(), labels[counts])
    names = {"p": "logp", "entropy": "entropy", "alpha": "collision"}
    values = {name: found[of].numpy() for name, of in names.items()}
    return values | {"p": np.exp(values["p"])}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_histograms_are_numpys(dtype: torch.dtype) -> None:
    logits, labels = rows(dtype=dtype)
    recorder = Recorder()
    for part in range(0, 240, 100):
        some = slice(part, part + 100)
        recorder.add(row_statistics(logits[some], labels[some]), labels[some])
    found, expected = recorder.recording(), oracle(logits, labels)
    assert found.count == int((labels != -100).sum())
    for name, of in {
        "p_entropy": (P, ENTROPY),
        "p_alpha": (P, ALPHA),
        "alpha_entropy": (ALPHA, ENTROPY),
    }.items():
        values = [expected[axis] for axis in name.split("_", 1)]
        # Values a rounding away from an edge may lie on either side of it: uniform and certain rows.
        table, *_ = np.histogram2d(*values, bins=[bins.edges() for bins in of])
        assert np.abs(getattr(found, name)[0] - table).sum() <= (0 if dtype == torch.float64 else 4), name
    assert found.histogram("p").sum() == found.histogram("alpha").sum() == found.histogram("entropy").sum()
    for name, value in expected.items():
        assert found.mean(name) == pytest.approx(value.mean(), rel=1e-5)
    assert found.mean("nll") == pytest.approx(-np.log(expected["p"]).mean(), rel=1e-5)


def test_bins_hold_what_lies_outside() -> None:
    assert ENTROPY.index(torch.tensor([-1e-7, 0.0, 0.2499, 0.25, 12.4, 99.0])).tolist() == [
        0,
        0,
        0,
        1,
        49,
        49,
    ]
    assert P.index(torch.tensor([0.0, 0.0099, 0.9999, 1.0])).tolist() == [0, 0, 99, 99]
    with pytest.raises(ValueError, match="edge: 0.005 is no edge"):
        P.at(0.005)


MORE = OBJECTIVES | {
    "shannon": objectives.deft(1),
    "largest": objectives.deft(math.inf),
    "rational": objectives.rational(),
    "dft": objectives.dft(),
    "band": objectives.deft().within("p>=0.1"),
    "floor": objectives.cayley(mean_prob=0.3),
}


@pytest.mark.parametrize("name", MORE)
@pytest.mark.parametrize("dtype, rtol, atol", [(torch.float64, 1e-6, 1e-9), (torch.float32, 1e-4, 4e-4)])
def test_norm_and_mass_are_the_gradients(name: str, dtype: torch.dtype, rtol: float, atol: float) -> None:
    """atol in fp32: S is good to 6e-8, and the root of that is 2.4e-4 where the gradient itself vanishes."""
    logits, labels = rows(dtype=dtype)
    logits.requires_grad_()
    loss, stats = deft_loss(logits, labels, objective=MORE[name], reduction="none", return_stats=True)
    counts = labels != -100
    (gradient,) = torch.autograd.grad(loss[counts].sum(), logits)
    norm = gradient[counts].norm(dim=-1)
    torch.testing.assert_close(gradient_norm(stats)[counts], norm, rtol=rtol, atol=atol)

    # A recorder finds the same gate without it, from statistics that have none.
    recorder = Recorder(MORE)
    recorder.add(row_statistics(logits, labels), labels)
    found = recorder.recording()
    number = found.number(name)
    assert found.mass[number].sum() == pytest.approx(norm.sum().item(), rel=1e-4)
    count = counts.sum().item()
    gate, square, alpha, _ = found.totals[number, 0] / count
    assert gate == pytest.approx(stats.gate[counts].mean().item(), rel=1e-5)
    assert square == pytest.approx(stats.gate[counts].square().mean().item(), rel=1e-5)
    assert alpha == pytest.approx(stats.alpha[counts].mean().item(), rel=1e-5, abs=1e-12)


def test_mass_lies_where_the_tokens_are() -> None:
    logits, labels = rows()
    recorder = Recorder(["nll"])
    recorder.add(row_statistics(logits, labels), labels)
    found, expected = recorder.recording(), oracle(logits, labels)
    norm = np.sqrt(np.maximum(expected["alpha"] - 2 * expected["p"] + 1, 0))
    table, *_ = np.histogram2d(expected["p"], expected["entropy"], [P.edges(), ENTROPY.edges()], weights=norm)
    np.testing.assert_allclose(found.mass[0, 0], table, rtol=1e-6, atol=1e-7)


def test_norm_needs_a_gate() -> None:
    logits, labels = rows(8)
    with pytest.raises(ValueError, match="gate: neither given"):
        gradient_norm(row_statistics(logits, labels))


def test_the_gate_of_the_loss_is_kept_beside_the_others() -> None:
    logits, labels = rows()
    recorder = Recorder(["nll"])
    _, stats = deft_loss(logits, labels, objective="eaft", return_stats=True)
    recorder.add(stats, labels)
    found = recorder.recording()
    assert found.gate_of == "the loss"
    assert found.mean("gate") == pytest.approx(stats.gate[labels != -100].mean().item())
    with pytest.raises(ValueError, match="stats: gate: is of the loss so far"):
        recorder.add(row_statistics(logits, labels), labels)


@pytest.mark.parametrize("steps", [1, 8, 9, 50])
def test_means_over_time(steps: int) -> None:
    """Eight slots: intervals double in length when they run out."""
    recorder, alphas = Recorder(["nll"], slots=8), []
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        logits = torch.randn(6, V, generator=generator) * 3
        labels = torch.randint(0, V, (6,), generator=generator)
        stats = row_statistics(logits, labels)
        recorder.add(stats, labels)
        alphas.append(stats.collision.double().numpy())
    step, mean, spread = recorder.recording().over_time("alpha")
    stride = recorder.stride
    assert stride == {1: 1, 8: 1, 9: 2, 50: 8}[steps]
    assert step.tolist() == list(range(0, steps, stride))
    for first, m, s in zip(step, mean, spread, strict=True):
        own = np.concatenate(alphas[first : first + stride])
        assert m == pytest.approx(own.mean()) and s == pytest.approx(own.std(), rel=1e-6)


def test_steps_of_ones_own() -> None:
    logits, labels = rows(8)
    recorder = Recorder(["nll"], slots=4)
    for step in (0, 0, 5):
        recorder.add(row_statistics(logits, labels), labels, step=step)
    found = recorder.recording()
    assert found.over_time("p")[0].tolist() == [0, 4] and recorder.stride == 2
    assert set(found.token("step")) == {0, 5}


def test_channels_are_apart() -> None:
    logits, labels = rows()
    channel = torch.arange(240) % 3
    recorder = Recorder(channels=("a", "b", "c"))
    recorder.add(row_statistics(logits, labels), labels, channel=channel)
    found = recorder.recording()
    for number, name in enumerate("abc"):
        own = Recorder()
        mine = channel == number
        own.add(row_statistics(logits[mine], labels[mine]), labels[mine])
        alone = own.recording()
        np.testing.assert_array_equal(found.p_entropy[number], alone.p_entropy[0])
        np.testing.assert_allclose(found.mass[3, number], alone.mass[3, 0], rtol=1e-12)
        assert found.mean("entropy", name) == pytest.approx(alone.mean("entropy"))
        assert found.histogram("p", name).sum() == int((labels[mine] != -100).sum())
    with pytest.raises(ValueError, match="channel: expected one of a, b, c, got 'd'"):
        found.mean("p", "d")


def test_rows_with_nan_are_left_out_and_counted() -> None:
    logits, labels = rows()
    clean = Recorder()
    clean.add(row_statistics(logits[10:], labels[10:]), labels[10:], ids=torch.arange(10, 240))
    logits[:10, 3] = math.nan
    recorder = Recorder()
    recorder.add(row_statistics(logits, labels), labels)
    found, expected = recorder.recording(), clean.recording()
    assert found.left_out == int((labels[:10] != -100).sum()) > 0
    for name in ("p_entropy", "p_alpha", "alpha_entropy"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    np.testing.assert_allclose(found.mass, expected.mass, rtol=1e-12)
    np.testing.assert_array_equal(found.values, expected.values)


def test_a_label_of_probability_zero() -> None:
    logits, labels = torch.zeros(2, V, dtype=torch.float64), torch.tensor([1, 2])
    logits[0, 1] = -math.inf
    recorder = Recorder(OBJECTIVES)
    recorder.add(row_statistics(logits, labels), labels)
    found = recorder.recording()
    assert found.mean("nll") == math.inf and found.left_out == 0
    assert np.isfinite(found.mass).all() and found.mean("p") == pytest.approx(1 / V / 2)


def test_labels_shifted_or_a_mask() -> None:
    logits, labels = rows()
    logits, labels = logits.reshape(8, 30, V), labels.reshape(8, 30)
    shifted, masked = Recorder(), Recorder()
    _, stats = deft_loss(logits, labels, shift=True, return_stats=True)
    shifted.add(stats, labels, shift=True)
    counts = torch.nn.functional.pad(labels[:, 1:] != -100, (0, 1))
    masked.add(stats, counts)
    first, second = shifted.recording(), masked.recording()
    assert first.count == int(counts.sum())
    np.testing.assert_array_equal(first.mass, second.mass)
    assert (second.token("label") == -1).all() and (first.token("label") >= 0).all()


def test_nothing_is_imported_before_it_is_asked_for() -> None:
    program = """
import sys, deft_kernels
assert not any(name.startswith("deft_kernels.diagnostics") for name in sys.modules)
import deft_kernels.diagnostics.figures, deft_kernels.diagnostics.command
assert "matplotlib" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
