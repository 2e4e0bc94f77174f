"""Two ranks (gloo, CPU): a patched model under DDP, FSDP2, LoRA under both; each route through its trainer.

All cases share one pair of processes, as importing the stacks takes seconds; each is reported apart.
"""

from __future__ import annotations

import copy
import os
import socket
import tempfile
import traceback
from pathlib import Path
from typing import Any

import pytest
import test_liger
import test_trl
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from processes import start_method
from tiny import batch, examples, llama, losses, oracle, parameters, trainer
from torch import Tensor, nn
from transformers import Trainer

from deft_kernels.integrations import liger, trl
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics
from deft_kernels.integrations.transformers import apply, patch_model, set_loss_function

RANKS = 2


def own(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.chunk(RANKS)[dist.get_rank()] for name, values in rows.items()}


def gradients(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {name: g.full_tensor() if hasattr(g, "full_tensor") else g for name, g in found.items()}


def agree(model: nn.Module, whole: nn.Module, rows: dict[str, Tensor]) -> None:
    """Two ranks with half the rows each have the gradients of one process over the model's own logits."""
    items = (rows["labels"][:, 1:] != -100).sum()
    whole.train()(**rows, num_items_in_batch=items).loss.backward()
    # The ranks' gradients are averaged, as a trainer knows: it multiplies the loss by their number.
    (model(**own(rows), num_items_in_batch=items).loss * RANKS).backward()
    wanted, found = gradients(whole), gradients(model)
    assert {name.removeprefix("module.") for name in found} == wanted.keys()
    for name, gradient in found.items():
        name = name.removeprefix("module.")
        torch.testing.assert_close(
            gradient, wanted[name], rtol=1e-4, atol=1e-7, msg=lambda m, n=name: f"{n}: {m}"
        )


def pair(adapted: bool = False, **settings: Any) -> tuple[nn.Module, nn.Module]:
    """(patched, the same model with the loss on its own logits)."""
    model = llama(**settings)
    if adapted:
        import peft

        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        torch.manual_seed(0)
        model = peft.get_peft_model(model, config)
    whole = copy.deepcopy(model)
    patch_model(model)
    set_loss_function(whole)
    return model.train(), whole


def ddp() -> None:
    model, whole = pair()
    agree(nn.parallel.DistributedDataParallel(model), whole, batch())


def ddp_lora() -> None:
    model, whole = pair(adapted=True)
    agree(nn.parallel.DistributedDataParallel(model), whole, batch())


def ddp_without_labels_on_one_rank() -> None:
    rows = batch()
    rows["labels"][4:] = -100
    model, whole = pair()
    agree(nn.parallel.DistributedDataParallel(model), whole, rows)


def sharded(model: nn.Module, *, head_apart: bool = False) -> nn.Module:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (RANKS,))
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    for layer in bare.model.layers:
        fully_shard(layer, mesh=mesh)
    if head_apart:
        fully_shard(bare.lm_head, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def fsdp2() -> None:
    model, whole = pair()
    agree(sharded(model), whole, batch())


def fsdp2_tied() -> None:
    model, whole = pair(tie_word_embeddings=True)
    agree(sharded(model), whole, batch())


def fsdp2_head_apart() -> None:
    """The head is a group of its own, so its weight is a DTensor when the loss is made."""
    model, whole = pair()
    agree(sharded(model, head_apart=True), whole, batch())


def fsdp2_lora() -> None:
    model, whole = pair(adapted=True)
    agree(sharded(model), whole, batch())


def fsdp2_checkpointed() -> None:
    model, whole = pair()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    agree(sharded(model), whole, batch())


def made(route: str, folder: Path, model: Any, **settings: Any) -> Trainer:
    """A trainer of the model with the gated loss by one of the routes, and its statistics logged."""
    if route == "trl":
        run = test_trl.prepared(folder, test_trl.trained_tokenizer(), model, **settings)
        trl.apply(run)
        return run
    if route == "compute_loss_func":
        run = trainer(folder, model, **settings)
        apply(run)
        return run
    statistics = RunningStatistics()
    if route == "liger":
        settings |= test_liger.FUSED
        liger.install(model=model, statistics=statistics)
    else:
        {"patch_model": patch_model, "loss_function": set_loss_function}[route](model, statistics=statistics)
    run = trainer(folder, model, **settings)
    StatisticsCallback(statistics).add_to(run)
    return run


def trained(route: str, **settings: Any) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Losses, plain losses and parameters after two steps."""
    model = llama()
    try:
        with tempfile.TemporaryDirectory() as folder:
            run = made(route, Path(folder), model, max_steps=2, **settings)
            run.train()
    finally:
        if route == "liger":
            liger.uninstall()
    assert run.args.world_size == (dist.get_world_size() if dist.is_initialized() else 1)
    return losses(run), losses(run, "nll"), parameters(model)


def trained_by_two_ranks(route: str) -> None:
    """Two ranks with 4 rows each, for `test_two_ranks_train_as_one_process`."""
    found = trained(route, per_device_train_batch_size=4, ddp_backend="gloo")
    torch.save(found, f"{os.environ['DEFT_TEST_FOLDER']}/{route}.{dist.get_rank()}.pt")


def trainer_patch_model() -> None:
    trained_by_two_ranks("patch_model")


def trainer_loss_function() -> None:
    trained_by_two_ranks("loss_function")


def trainer_compute_loss_func() -> None:
    trained_by_two_ranks("compute_loss_func")


def trainer_trl() -> None:
    trained_by_two_ranks("trl")


def trainer_liger() -> None:
    trained_by_two_ranks("liger")


CASES = (
    ddp,
    ddp_lora,
    ddp_without_labels_on_one_rank,
    fsdp2,
    fsdp2_tied,
    fsdp2_head_apart,
    fsdp2_lora,
    fsdp2_checkpointed,
    trainer_patch_model,
    trainer_loss_function,
    trainer_compute_loss_func,
    trainer_trl,
    trainer_liger,
)


def worker(rank: int, folder: str, port: int) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # here: a fork server has only what its start had
    # What torchrun would set; the trainer reads it.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DEFT_TEST_FOLDER": folder}
    dist.init_process_group("gloo")
    for case in CASES:
        outcome = "passed"
        try:
            case()
        except BaseException:
            outcome = traceback.format_exc()
        Path(folder, f"{case.__name__}.{rank}").write_text(outcome)
        dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = mp.start_processes(
        worker, args=(str(folder), port), nprocs=RANKS, join=False, start_method=start_method()
    )
    waited = 0
    while not context.join(timeout=1):
        waited += 1
        if waited >= 180:  # a rank that waits for one that failed must not wait for long
            for process in context.processes:
                process.kill()
            break
    return folder


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case, outcomes):
    for rank in range(RANKS):
        report = outcomes / f"{case}.{rank}"
        assert report.exists(), f"rank {rank} never came to an end: it hangs in this case or an earlier one"
        assert report.read_text() == "passed", f"rank {rank}: {report.read_text()}"


@pytest.mark.parametrize("route", ["patch_model", "loss_function", "compute_loss_func", "trl", "liger"])
def test_two_ranks_train_as_one_process(route, outcomes):
    """The ranks take every other batch of 4, so their first 8 rows are those of one batch of 8."""
    means, plain, end = trained(route)
    if route != "trl":  # whose batches are padded: test_trl.py asks the oracle
        assert means[0] == pytest.approx(oracle(llama(), batch()), rel=1e-5)
    for rank in range(RANKS):
        theirs = torch.load(outcomes / f"{route}.{rank}.pt")
        assert (theirs[0], theirs[1]) == (pytest.approx(means, rel=1e-5), pytest.approx(plain, rel=1e-5))
        for name, parameter in theirs[2].items():
            torch.testing.assert_close(parameter, end[name], rtol=1e-4, atol=1e-6)
    assert len(examples()) >= 16
