"""`logit_scale`, and what is refused, where two real processes split the vocabulary or the rows."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deft_kernels import VocabShard, deft_loss, objectives, row_statistics

RANKS = 2
N, V = 4, 9


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh(ranks.device(), (RANKS,))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(N, V, generator=generator)
    return logits.to(ranks.device()), torch.tensor([2, -100, 8, 5]).to(ranks.device())


SCALED = {"logit_scale": 0.25, "softcap": 4.0, "temperature": 1.5}


def scaled_dtensors() -> None:
    logits, labels = batch()
    for placement, rows in ((Shard(1), Replicate()), (Shard(0), Shard(0))):
        given = distribute_tensor(labels, mesh(), [rows])
        for objective in ("deft", lambda r: -r.logp * r.entropy):
            whole = logits.clone().requires_grad_()
            expected = deft_loss(whole, labels, objective=objective, **SCALED)
            expected.backward()
            mine = distribute_tensor(logits, mesh(), [placement]).requires_grad_()
            loss = deft_loss(mine, given, objective=objective, **SCALED)
            loss.backward()
            torch.testing.assert_close(loss.full_tensor(), expected)
            torch.testing.assert_close(mine.grad.full_tensor(), whole.grad)
        stats = row_statistics(mine, given, **SCALED)
        wanted = row_statistics(logits, labels, **SCALED)
        torch.testing.assert_close(stats.lse.full_tensor(), wanted.lse)


def scaled_group() -> None:
    """The place of the columns counted by NumPy."""
    logits, labels = batch()
    bounds = np.cumsum([0, 5, 4])
    rank = dist.get_rank()
    place = VocabShard(dist.group.WORLD, bounds[rank], bounds[-1])
    whole = logits.clone().requires_grad_()
    deft_loss(whole, labels, **SCALED).backward()
    mine = logits[:, bounds[rank] : bounds[rank + 1]].clone().requires_grad_()
    for group in (place, dist.group.WORLD):
        mine.grad = None
        loss = deft_loss(mine, labels, group=group, **SCALED)
        loss.backward()
        torch.testing.assert_close(loss, deft_loss(logits, labels, **SCALED))
        torch.testing.assert_close(mine.grad, whole.grad[:, bounds[rank] : bounds[rank + 1]])


def refused_before_a_message() -> None:
    """By one rank alone: the other would wait for a message that had been sent."""
    if dist.get_rank() == 0:
        logits, labels = batch()
        local = DTensor.from_local(logits, mesh(), [Shard(0)], run_check=False)
        rows = DTensor.from_local(labels, mesh(), [Shard(0)], run_check=False)
        for name, value, error in (
            ("ignore_index", 2**63, ValueError),
            ("objective", objectives.deft, TypeError),
            ("smoothing", 0.1, TypeError),
        ):
            with pytest.raises(error, match=f"^{name}: "):
                deft_loss(local, rows, **{name: value})


CASES = [scaled_dtensors, scaled_group, refused_before_a_message]


@pytest.fixture(scope="module")
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case, outcomes):
    for rank, outcome in enumerate(outcomes[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
