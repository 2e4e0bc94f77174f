"""Means by channel over two ranks (gloo, CPU): a trainer's columns, a rank without a channel, DTensors."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
from routes import ROUTES
from test_columns import NAMES, both, expected, prepared, rows
from test_statistics_on_ranks import as_torchrun
from test_statistics_on_ranks import rows as logits_and_labels
from tiny import llama, losses
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from deft_kernels import deft_loss
from deft_kernels.integrations.running import RunningStatistics

RANKS = 2


def a_trainers_columns() -> None:
    as_torchrun()
    loss, means = expected(llama(), rows()[:8])
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    for route in ROUTES:
        with tempfile.TemporaryDirectory() as folder:
            run = prepared(route, Path(folder), both(), rows(), **settings)
            run.train()
        assert losses(run)[0] == pytest.approx(loss, rel=1e-5), route
        for name, mean in means.items():
            assert losses(run, name)[0] == pytest.approx(mean, rel=1e-5), (route, name)


def the_rows_that_fill_a_batch_do_not_count() -> None:
    as_torchrun()
    _, means = expected(llama(), rows()[:10])
    settings = {"per_device_eval_batch_size": 4, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    with tempfile.TemporaryDirectory() as folder:
        run = prepared("compute_loss_func", Path(folder), both(), rows(), evaluated=rows()[:10], **settings)
        metrics = run.evaluate()
    assert {name: metrics[f"eval_{name}"] for name in means} == pytest.approx(means, rel=1e-5)


def a_channel_that_one_rank_has() -> None:
    logits, labels = logits_and_labels()
    valid = labels != -100
    _, stats = deft_loss(logits, labels, return_stats=True)
    running = RunningStatistics((*NAMES, "law"))
    if dist.get_rank() == 0:
        running.update(stats, valid, 1)
    else:
        running.update(stats, valid, torch.zeros_like(labels))
    means = running.means()
    for name in NAMES:
        assert means[f"nll/{name}"] == pytest.approx(means["nll"], rel=1e-9)
    assert not [name for name in means if name.endswith("/law")]
    # A rank without a call takes part.
    if dist.get_rank() == 0:
        running.update(stats, valid, 2)
    means = running.means()
    assert means["nll/law"] == means["nll"] and "nll/code" not in means


def dtensors() -> None:
    logits, labels = logits_and_labels()
    channel = torch.arange(labels.numel()).reshape(labels.shape) % 2
    wanted = RunningStatistics(NAMES)
    wanted.update(deft_loss(logits, labels, return_stats=True)[1], labels != -100, channel)
    expected = wanted.means()
    mesh = init_device_mesh("cpu", (RANKS,))
    for placement, lying in ((Shard(-1), Replicate()), (Shard(0), Shard(0))):
        x, y = distribute_tensor(logits, mesh, [placement]), distribute_tensor(labels, mesh, [lying])
        stats = deft_loss(x, y, return_stats=True)[1]
        running = RunningStatistics(NAMES)
        running.update(stats, y != -100, distribute_tensor(channel, mesh, [lying]))
        assert running.means() == pytest.approx(expected, rel=1e-5)
        if lying == Shard(0):
            with pytest.raises(TypeError, match="channel: the statistics are DTensors with sharded rows"):
                running.update(stats, y != -100, channel)
        else:
            running.update(stats, y != -100, channel)
            assert running.means() == pytest.approx(expected, rel=1e-5)


CASES = [
    a_trainers_columns,
    the_rows_that_fill_a_batch_do_not_count,
    a_channel_that_one_rank_has,
    dtensors,
]


@pytest.fixture(scope="module")
def outcomes():
    return ranks.run(CASES, ranks=RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case, outcomes):
    assert outcomes[case] == ["passed"] * RANKS, "\n".join(outcomes[case])
