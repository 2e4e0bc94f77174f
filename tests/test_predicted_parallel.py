"""The predicted class where ranks split the vocabulary, in real processes.

Every rank knows the whole logits, and passes its columns.
"""

from __future__ import annotations

from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from rows import make
from sampling import first_of
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from deft_kernels import VocabShard, deft_loss, fused_linear_deft_loss, row_statistics

N, V = 7, 37
WIDTHS = {2: (20, 17), 3: (20, 0, 17)}
BACKENDS = ("torch", "triton")


def rows() -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels and what is predicted: ties on one rank and on two, a masked part, a NaN, no label."""
    z, y = make("plain", N, V, torch.float32)
    z[0, [30, 3]], z[1, [36, 25]] = 9.0, 9.0
    z[2, :20] = float("-inf")
    y[2], y[5] = 22, -100
    expected = z.argmax(-1)
    assert expected[:3].min() == 3
    z[4, 11] = float("nan")
    expected[[4, 5]] = -1
    return z.to(ranks.device()), y.to(ranks.device()), expected.to(ranks.device())


def mine(whole: Tensor, dim: int = -1) -> Tensor:
    return whole.split(WIDTHS[dist.get_world_size()], dim)[dist.get_rank()]


def groups() -> list[dist.ProcessGroup | VocabShard]:
    start = sum(WIDTHS[dist.get_world_size()][: dist.get_rank()])
    return [dist.group.WORLD, VocabShard(dist.group.WORLD, start, V)]


def logits_in_a_group() -> None:
    z, y, expected = rows()
    for backend in BACKENDS:
        for group in groups():
            for objective in ("deft", lambda r: -r.logp):
                _, stats = deft_loss(
                    mine(z), y, objective=objective, group=group, backend=backend, return_stats=True
                )
                assert torch.equal(stats.predicted, expected)
            assert torch.equal(row_statistics(mine(z), y, group=group, backend=backend).predicted, expected)


def with_other_numbers_in_a_state() -> None:
    """Behind the sum of label smoothing; in `row_statistics` it stands behind the ties of max p."""
    z, y, expected = rows()
    for backend in BACKENDS:
        _, stats = deft_loss(
            mine(z), y, label_smoothing=0.1, group=dist.group.WORLD, backend=backend, return_stats=True
        )
        assert torch.equal(stats.predicted, expected)


def a_split_head() -> None:
    z, y, _ = rows()
    hidden = torch.randn(N, 5, generator=torch.Generator().manual_seed(1)).to(z.device)
    weight = torch.randn(V, 5, generator=torch.Generator().manual_seed(2)).to(z.device)
    expected = torch.nn.functional.linear(hidden, weight).argmax(-1).masked_fill(y == -100, -1)
    for backend in BACKENDS:
        _, stats = fused_linear_deft_loss(
            hidden, mine(weight, 0), y, group=dist.group.WORLD, backend=backend, chunk_bytes=4 * V * 2,
            return_stats=True,
        )  # fmt: skip
        assert torch.equal(stats.predicted, expected)


def logits_that_are_dtensors() -> None:
    z, y, expected = rows()
    mesh = init_device_mesh(ranks.device(), (dist.get_world_size(),))
    labels = distribute_tensor(y, mesh, [Shard(0)])
    for placement, given in ((Shard(1), y), (Shard(0), labels), (Replicate(), y)):
        logits = distribute_tensor(z, mesh, [placement])
        for stats in (row_statistics(logits, given), deft_loss(logits, given, return_stats=True)[1]):
            assert isinstance(stats.predicted, DTensor)
            assert stats.predicted.dtype == torch.int64
            assert torch.equal(stats.predicted.full_tensor(), expected)


CASES = (
    logits_in_a_group,
    with_other_numbers_in_a_state,
    a_split_head,
    logits_that_are_dtensors,
)


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run(CASES, count)


@pytest.mark.parametrize("count", first_of([3, 2]))
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_in_processes(case, count):
    assert outcomes(count)[case.__name__] == ["passed"] * count
