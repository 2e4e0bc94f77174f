"""transformers' tensor parallelism (tp_plan) on two ranks (gloo, CPU): what refuses it, what trains it."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from tiny import batch, llama
from transformers import AutoModelForCausalLM

from deft_kernels.integrations import liger
from deft_kernels.integrations.transformers import patch_model, set_loss_function

RANKS = 2
SETTINGS = {"num_key_value_heads": 2, "vocab_size": 62}  # the plan splits both evenly


@contextmanager
def saved() -> Iterator[str]:
    """A folder with the model, which rank 0 writes."""
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(RANKS)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used, the group is there
    with tempfile.TemporaryDirectory() as own:
        name = [own]
        dist.broadcast_object_list(name, src=0)
        if dist.get_rank() == 0:
            llama(**SETTINGS).save_pretrained(own)
        dist.barrier()
        yield name[0]
        dist.barrier()


def split(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").train()


def what_takes_a_whole_head_refuses() -> None:
    with saved() as folder:
        calls: list[Callable[[Any], None]] = [patch_model, lambda model: liger.install(model=model)]
        for call in calls:
            model = split(folder)
            with pytest.raises(
                ValueError, match="tensor parallelism.*tp_plan splits it over 2 ranks.*set_loss"
            ):
                call(model)


def its_own_logits_train() -> None:
    with saved() as folder:
        model, whole = split(folder), llama(**SETTINGS).train()
        for one in (model, whole):
            set_loss_function(one)
        found, wanted = model(**batch()).loss, whole(**batch()).loss
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        found.backward()
        wanted.backward()
        parameters = dict(whole.named_parameters())
        for name, parameter in model.named_parameters():
            gradient: Any = parameter.grad
            gradient = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
            if gradient.shape == parameters[name].shape:
                torch.testing.assert_close(gradient, parameters[name].grad, rtol=1e-4, atol=1e-6)


CASES = [what_takes_a_whole_head_refuses, its_own_logits_train]


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
