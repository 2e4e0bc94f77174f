"""The recorder's sample of tokens, its memory, and what it refuses."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch
from recorded import rows
from torch import Tensor
from waits import refusing_waits

from deft_kernels import RowStatistics, deft_loss, objectives, row_statistics
from deft_kernels.diagnostics import Recorder
from deft_kernels.diagnostics.sample import LAST, keys


def sampled(recorder: Recorder, logits: Tensor, labels: Tensor, ids: Tensor, size: int) -> np.ndarray:
    for part in ids.split(size):
        recorder.add(row_statistics(logits[part], labels[part]), labels[part], ids=part)
    return recorder.recording().tokens[:, 0]


def test_the_sample_depends_on_tokens_and_seed_alone() -> None:
    logits, labels = rows()
    order = torch.randperm(240, generator=torch.Generator().manual_seed(1))
    first = sampled(Recorder(["nll"], tokens=32), logits, labels, torch.arange(240), 240)
    again = sampled(Recorder(["nll"], tokens=32), logits, labels, order, 7)
    other = sampled(Recorder(["nll"], tokens=32, seed=1), logits, labels, order, 7)
    assert len(set(first)) == 32 and (labels[first] != -100).all()
    np.testing.assert_array_equal(first, again)
    assert len(set(first) & set(other)) < 16


def test_the_sample_holds_what_the_token_was() -> None:
    logits, labels = rows()
    recorder = Recorder(["deft"], tokens=1000)
    _, stats = deft_loss(logits, labels, return_stats=True)
    recorder.add(stats, labels)
    found = recorder.recording()
    ids = found.token("id")
    np.testing.assert_array_equal(ids, np.flatnonzero(labels != -100))  # fewer than there is room for
    np.testing.assert_array_equal(found.token("label"), labels[ids])
    for name, value in {
        "logp": stats.logp,
        "alpha": stats.alpha,
        "max_prob": stats.max_prob,
        "gate": stats.gate,
    }.items():
        np.testing.assert_array_equal(found.token(name), value[ids].double())


@pytest.mark.parametrize("seed", [0, 1, -3, 2**40])
def test_keys_are_splitmix64(seed: int) -> None:
    ids = [0, 1, 5, 2**40, 2**63 - 1, -7]
    mask = 2**64 - 1

    def mixed(z: int) -> int:
        z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ z >> 27) * 0x94D049BB133111EB) & mask
        return z ^ z >> 31

    assert mixed(0x9E3779B97F4A7C15) == 0xE220A8397B1DCDAF  # its first number, as published
    expected = [mixed((i + (seed + 1) * 0x9E3779B97F4A7C15) & mask) & LAST for i in ids]
    assert keys(torch.tensor(ids), seed).tolist() == expected


def test_the_sample_is_uniform() -> None:
    """Of 4096 tokens in 16 equal parts, 512 sampled: 32 of each on average, standard deviation 5.1."""
    stats = RowStatistics(*(torch.full((4096,), 0.5) for _ in range(5)), torch.ones(4096, dtype=torch.bool))
    for seed in range(4):
        recorder = Recorder(["nll"], tokens=512, seed=seed)
        recorder.add(stats._replace(logp=-stats.logp), torch.zeros(4096, dtype=torch.int64))
        counts = np.bincount(recorder.recording().token("id") // 256, minlength=16)
        assert counts.min() > 32 - 5 * 5.1 and counts.max() < 32 + 5 * 5.1
        assert ((counts - 32) ** 2 / 28).sum() < 38  # chi-square, 15 degrees of freedom: 1 in 1000


def live_bytes() -> int:
    gc.collect()
    tensors = (x for x in gc.get_objects() if type(x) is Tensor)
    # Another test's sparse or nested tensor may still live; a recorder makes none.
    return sum(x.untyped_storage().nbytes() for x in tensors if x.layout == torch.strided and not x.is_nested)


def test_memory_does_not_grow() -> None:
    logits, labels = rows(40)
    recorder = Recorder(slots=16, tokens=64)
    stats = row_statistics(logits, labels)
    for step in range(1, 1001):
        recorder.add(stats, labels)
        if step == 10:
            early = live_bytes()
    assert live_bytes() == early
    assert recorder.recording().count == 1000 * int((labels != -100).sum())
    assert not any(isinstance(value, (list, set)) for value in vars(recorder).values())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the host waits for nothing on a CPU")
def test_nothing_waits_for_the_device() -> None:
    logits, labels = (x.cuda() for x in rows())
    recorder = Recorder(channels=("a", "b"))
    stats = row_statistics(logits, labels)
    with refusing_waits():
        for _ in range(3):
            recorder.add(stats, labels, channel=labels % 2)
    assert recorder.recording().count == 3 * int((labels != -100).sum())


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"objectives": "deft"}, "objectives: expected a sequence"),
        ({"objectives": []}, "objectives: none given"),
        ({"objectives": ["gate"]}, "objectives: unknown name 'gate'"),
        ({"objectives": [objectives.deft(), objectives.deft(1)]}, "objectives: two are called 'deft'"),
        ({"objectives": [objectives.deft(detach=False)]}, "objectives: 'deft' has detach=False"),
        ({"channels": "strong"}, "channels: expected names that differ"),
        ({"channels": ("a", "a")}, "channels: expected names that differ"),
        ({"tokens": 0}, "tokens: expected at least 1"),
        ({"slots": 3}, "slots: expected an even number"),
        ({"seed": 0.5}, "seed: expected an int"),
    ],
)
def test_settings_refused(keywords: dict[str, object], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Recorder(**keywords)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"stats": (1, 2)}, "stats: expected RowStatistics, got tuple"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected the statistics' shape \(8,\)"),
        ({"channel": torch.zeros(8)}, "channel: expected 8 integers, got torch.float32"),
        ({"channel": torch.tensor([0, 0, 0, 2, 0, 0, 0, 0])}, r"channel: 2 is outside \[0, 1\)"),
        ({"step": -1}, "step: expected 0 or more, got -1"),
        ({"channel": -1}, r"channel: -1 is outside \[0, 1\)"),
        ({"ids": torch.zeros(3, dtype=torch.int64)}, "ids: expected 8 int64, got torch.int64"),
        ({"labels": torch.ones(8, dtype=torch.bool), "shift": True}, "shift: labels is a mask"),
    ],
)
def test_rows_refused(change: dict[str, object], message: str) -> None:
    logits, labels = rows(8)
    recorder = Recorder()
    given = {"stats": row_statistics(logits, labels), "labels": labels, **change}
    with pytest.raises((ValueError, TypeError), match=message):
        recorder.add(given.pop("stats"), given.pop("labels"), **given)
    assert recorder.recording().count == 0
