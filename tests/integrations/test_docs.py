"""The lines in docs/integrations are run as they stand; only what they take as given is made here."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from pages import blocks, run_block
from test_liger import FUSED
from test_trl import TEXTS, prepared, tokenizer  # noqa: F401  # the fixture
from tiny import arguments, batch, examples, llama, losses, oracle
from transformers import Trainer

from deft_kernels import deft_loss

WEIGHT = 0.5


@pytest.mark.parametrize("index", range(len(blocks("transformers"))))
def test_transformers(index, tmp_path):
    rows = [{**row, "domain": "code", "trust": WEIGHT} for row in examples()]
    given = {"Trainer": Trainer, "model": llama(), "args": arguments(tmp_path), "dataset": rows}
    trainer = run_block("transformers", index, given)["trainer"]
    weight = of_columns(trainer, "columns=" in blocks("transformers")[index])
    assert losses(trainer)[0] == pytest.approx(weight * oracle(llama(), batch()), rel=1e-5)
    assert len(losses(trainer)) == 3


def of_columns(trainer, asked):
    """The weight of every row, if the block asks for the column of weights."""
    nll, code = losses(trainer, "nll"), losses(trainer, "nll/code")
    assert code == (nll if asked else [])
    return WEIGHT if asked else 1.0


@pytest.mark.parametrize("index", range(len(blocks("trl"))))
def test_trl(index, tmp_path, tokenizer):  # noqa: F811
    from datasets import Dataset
    from trl import SFTTrainer

    like = prepared(tmp_path, tokenizer)
    rows = next(iter(like.get_train_dataloader()))
    given = {"SFTTrainer": SFTTrainer, "model": llama(), "args": like.args, "tokenizer": tokenizer}
    dataset = Dataset.from_list([{**row, "domain": "code", "trust": WEIGHT} for row in TEXTS])
    trainer = run_block("trl", index, {**given, "dataset": dataset})["trainer"]
    weight = of_columns(trainer, "columns=" in blocks("trl")[index])
    assert losses(trainer)[0] == pytest.approx(weight * oracle(llama(), rows), rel=1e-5)


@pytest.mark.parametrize("index", range(len(blocks("liger"))))
def test_liger(index, tmp_path):
    given = {
        "Trainer": Trainer,
        "model": llama(),
        "args": arguments(tmp_path, **FUSED),
        "dataset": examples(),
    }
    trainer = run_block("liger", index, given)["trainer"]
    assert losses(trainer)[0] == pytest.approx(oracle(llama(), batch()), rel=1e-5)


@pytest.mark.parametrize("index", range(len(blocks("moving"))))
def test_moving(index):
    logits = (3 * torch.randn(9, 20, dtype=torch.float64)).requires_grad_()
    given = {"F": F, "math": math, "torch": torch, "deft_loss": deft_loss, "logits": logits}
    results = run_block("moving", index, {**given, "labels": torch.randint(0, 20, (9,))})
    gradients = [torch.autograd.grad(results[name], logits)[0] for name in ("theirs", "ours")]
    torch.testing.assert_close(results["ours"], results["theirs"])
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_pages_have_lines_to_run():
    assert [len(blocks(page)) for page in ("transformers", "trl", "liger", "moving")] == [
        6,
        2,
        1,
        5,
    ]
