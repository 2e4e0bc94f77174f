"""What two ranks log (gloo, CPU): DTensor statistics, ranks without a call, repeated rows, settings."""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import ranks
import routes
import test_liger
import torch
import torch.distributed as dist
from tiny import V, arguments, examples, llama, oracle
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import Trainer

from deft_kernels import deft_loss
from deft_kernels.integrations import liger
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

RANKS = 2
EVALUATED = 10  # rows; the last batch of 2 x 4 has 2 of them and 6 repeated ones


def rows(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(n, 5, V, generator=generator) * 3
    labels = torch.randint(0, V, (n, 5), generator=generator)
    labels[0, :3] = labels[-1, 1] = -100
    return logits, labels


def dtensor_statistics() -> None:
    """Sharded on the vocabulary, as ColwiseParallel(use_local_output=False) gives logits, and on the rows."""
    logits, labels = rows()
    expected = RunningStatistics()
    expected.update(deft_loss(logits, labels, return_stats=True)[1], labels != -100)
    expected = expected.means()
    mesh = init_device_mesh("cpu", (RANKS,))
    for placement, lying in ((Shard(-1), Replicate()), (Replicate(), Replicate()), (Shard(0), Shard(0))):
        x, y = distribute_tensor(logits, mesh, [placement]), distribute_tensor(labels, mesh, [lying])
        stats = deft_loss(x, y, return_stats=True)[1]
        for valid in (y != -100, labels != -100):
            running = RunningStatistics()
            if lying == Shard(0) and valid is not None and not hasattr(valid, "placements"):
                with pytest.raises(TypeError, match="valid: the statistics are DTensors with sharded rows"):
                    running.update(stats, valid)
                continue
            running.update(stats, valid)
            assert running.means() == pytest.approx(expected, rel=1e-5)


def a_rank_without_a_call() -> None:
    """Objectives without a focus index have none on any rank; others have that of the ranks that know."""
    logits, labels = rows()
    for objective, gated in ((lambda r: -r.logp, False), ("deft", True)):
        running = RunningStatistics()
        if dist.get_rank() == 0:
            running.update(
                deft_loss(logits, labels, objective=objective, return_stats=True)[1], labels != -100
            )
        means = running.means()
        assert ("mean_alpha" in means) == ("mean_gate" in means) == gated
        if gated:
            stats = deft_loss(logits, labels, return_stats=True)[1]
            assert means["mean_gate"] == pytest.approx((stats.gate.sum() / (labels != -100).sum()).item())
    assert RunningStatistics().means() == {}


def as_torchrun() -> None:
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used, the group is there


def repeated_rows() -> None:
    as_torchrun()
    expected = _nll(llama())
    settings = {"per_device_eval_batch_size": 4, "per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    for route in ("compute_loss_func", "loss_function", "liger"):
        for last in (EVALUATED, 8, 4):
            model = llama()
            with tempfile.TemporaryDirectory() as folder:
                run = _trainer(route, Path(folder), model, last, settings)
                try:
                    metrics = run.evaluate()
                finally:
                    if route == "liger":
                        liger.uninstall()
            wanted = expected if last == EVALUATED else _nll(llama(), last)
            logged = run.state.log_history[-1]
            assert "eval_loss" in metrics and logged["eval_nll"] == pytest.approx(wanted, rel=1e-5), route


def _nll(model: Any, count: int = EVALUATED) -> float:
    found = examples()[:count]
    batch = {name: torch.stack([row[name] for row in found]) for name in found[0]}
    return oracle(model, batch, "nll")


def _trainer(route: str, folder: Path, model: Any, count: int, settings: dict[str, Any]) -> Trainer:
    statistics = RunningStatistics()
    if route == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        settings = settings | test_liger.FUSED
        off = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
        apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **off)
        liger.install(model=model, statistics=statistics)
    elif route == "loss_function":
        integration.set_loss_function(model, statistics=statistics)
    args = arguments(folder, **settings)
    run = Trainer(model=model, args=args, train_dataset=examples(), eval_dataset=examples()[:count])
    if route == "compute_loss_func":
        integration.apply(run)
    else:
        StatisticsCallback(statistics).add_to(run)
    return run


def means_of_means_raise() -> None:
    """A token would weigh more on a rank that has fewer of them, whichever route the loss takes."""
    as_torchrun()
    settings = {
        "average_tokens_across_devices": False,
        "per_device_train_batch_size": 4,
        "ddp_backend": "gloo",
    }
    match = "average_tokens_across_devices: is False on 2 ranks"
    for route in routes.ROUTES:
        with tempfile.TemporaryDirectory() as folder, pytest.raises(ValueError, match=match):
            routes.prepared(route, Path(folder), **settings).train()


CASES = [dtensor_statistics, a_rank_without_a_call, repeated_rows, means_of_means_raise]


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
