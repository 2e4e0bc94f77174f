"""Recordings of two ranks, in real processes, summed: those of one process with the same tokens."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from ranks import device, run

from deft_kernels import row_statistics
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.diagnostics.recorder import IDS_A_RANK

N, V, CHANNELS = 60, 23, ("strong", "weak")
TABLES = ("p_entropy", "p_alpha", "alpha_entropy", "mass", "totals", "series", "tokens", "values")


def recorder() -> Recorder:
    return Recorder(["nll", "deft", "eaft"], channels=CHANNELS, tokens=20, slots=4)


def add(to: Recorder, step: int, rows: slice) -> None:
    generator = torch.Generator().manual_seed(step)
    # Doubles: in fp32 a row's own statistics depend in the last digit on how many rows a call has.
    logits = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 3)[rows].to(device())
    labels = torch.randint(-1, V, (N,), generator=generator)[rows].to(device())
    labels = labels.masked_fill(labels == -1, -100)
    ids = torch.arange(N, device=logits.device)[rows]
    to.add(row_statistics(logits, labels), labels, channel=ids % 2, ids=step * N + ids, step=step)


def same(found: Recording, expected: Recording) -> None:
    for name in TABLES:
        one, other = getattr(found, name), getattr(expected, name)
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-12, err_msg=name)
    assert (found.stride, found.channels, found.gate_of) == (expected.stride, CHANNELS, expected.gate_of)


def summed() -> None:
    """Uneven parts of every step."""
    rank, own, whole = dist.get_rank(), recorder(), recorder()
    for step in range(3):
        add(own, step, slice(0, 13) if rank == 0 else slice(13, N))
        add(whole, step, slice(0, N))
    same(own.recording(dist.group.WORLD), whole.recording())
    # What a rank has by itself stays what it was.
    assert own.recording().count < whole.recording().count


def one_rank_has_more_steps() -> None:
    """The other's intervals are made as long."""
    rank, own, whole = dist.get_rank(), recorder(), recorder()
    for step in range(11):
        if rank == 0 or step < 2:
            add(own, step, slice(0, 30) if rank == 0 else slice(30, N))
        add(whole, step, slice(0, N if step < 2 else 30))
    same(own.recording(dist.group.WORLD), whole.recording())


def a_rank_without_a_token() -> None:
    own, whole = Recorder(["nll"], device=device()), Recorder(["nll"])
    labels = torch.arange(5, device=device())
    stats = row_statistics(torch.eye(5, device=device()), labels)
    if dist.get_rank() == 1:
        own.add(stats, labels)
    whole.add(stats, labels)
    found = own.recording(dist.group.WORLD)
    assert found.count == 5 and found.gate_of == "nll"
    np.testing.assert_array_equal(found.mass, whole.recording().mass)


def ids_of_the_ranks_differ() -> None:
    own, labels = Recorder(["nll"]), torch.arange(5, device=device())
    own.add(row_statistics(torch.eye(5, device=device()), labels), labels)
    ids = own.recording(dist.group.WORLD).token("id")
    assert ids.tolist() == [*range(5), *range(IDS_A_RANK, IDS_A_RANK + 5)]


def the_first_rank_writes() -> None:
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    path, own = Path(folder[0]) / f"{dist.get_rank()}.npz", recorder()
    add(own, 0, slice(0, 30) if dist.get_rank() == 0 else slice(30, N))
    own.save(path, dist.group.WORLD)
    dist.barrier()
    assert os.listdir(folder[0]) == ["0.npz"]
    same(Recording.load(Path(folder[0]) / "0.npz"), own.recording(dist.group.WORLD))


CASES = [
    summed,
    one_rank_has_more_steps,
    a_rank_without_a_token,
    ids_of_the_ranks_differ,
    the_first_rank_writes,
]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return run(CASES, ranks=2)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_two_ranks(case, outcomes: dict[str, list[str]]) -> None:
    assert outcomes[case.__name__] == ["passed"] * 2, "\n".join(outcomes[case.__name__])
