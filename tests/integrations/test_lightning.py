"""The module on docs/integrations/lightning.md, alone and as two ranks (this file is their script)."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
import torch
from pages import run_block, two_ranks
from tiny import batch, examples, llama, oracle, parameters

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
QUIET |= {"enable_model_summary": False}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trained(size, accumulate, sampler=None, **settings):
    """What each step logged, and the parameters, after one epoch of 32 rows by the page's own lines."""
    model = llama().train()
    scope = run_block("lightning")
    logged = []

    class Kept(scope["lightning"].Callback):
        def on_train_batch_end(self, trainer, *others):
            logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    class Trainer(scope["lightning"].Trainer):
        def __init__(self, **given):
            super().__init__(**{**given, "accumulate_grad_batches": accumulate})

    scope["lightning"] = type("lightning", (), {"Trainer": Trainer})
    loader = torch.utils.data.DataLoader(examples(), batch_size=size, sampler=sampler)
    scope |= {"model": model, "loader": loader, "settings": {**QUIET, **settings, "callbacks": [Kept()]}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Lightning's, of few workers and the like
        run_block("lightning", 1, scope)
    return logged, parameters(model)


def test_the_first_loss_is_the_oracles_and_cross_entropy_is_logged_beside_it():
    logged, _ = trained(8, 1)
    assert len(logged) == 4
    assert logged[0]["train_loss"] == pytest.approx(oracle(llama(), batch()), rel=1e-5)
    assert logged[0]["nll"] == pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)
    assert 0 < logged[0]["mean_alpha"] < 1 and 0 < logged[0]["mean_gate"] < 1


def test_a_batch_of_8_is_4_of_2_accumulated():
    (whole, end), (parts, same) = trained(8, 1), trained(2, 4)
    torch.testing.assert_close(same, end)
    # Logged when a step is made: the means of all its tokens.
    assert [entry["nll"] for entry in whole] == pytest.approx(
        [entry["nll"] for entry in parts[3::4]], rel=1e-5
    )


def test_the_last_step_of_an_epoch_counts_what_is_left_of_it():
    """32 rows in batches of 2, 5 of them a step: 10, 10, 10 rows, and 2."""
    _, end = trained(2, 5)
    model, rows = llama().train(), batch(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    deft_loss = run_block("lightning")["deft_loss"]
    for start in (0, 10, 20, 30):
        part = {name: values[start : start + 10] for name, values in rows.items()}
        optimizer.zero_grad()
        deft_loss(model(input_ids=part["input_ids"]).logits, part["labels"], shift=True).backward()
        optimizer.step()
    torch.testing.assert_close(end, parameters(model))


def test_two_ranks_accumulating_twice_are_one_batch_of_8(tmp_path):
    _, end = trained(8, 1)
    two_ranks(__file__, tmp_path / "ranks.pt")
    torch.testing.assert_close(torch.load(tmp_path / "ranks.pt"), end)


if __name__ == "__main__":
    # A rank takes every second row, so that 2 ranks and 2 batches of 2 are the same 8 rows in each step;
    # the sampler that Lightning would put there shuffles.
    import lightning

    gloo = lightning.pytorch.strategies.DDPStrategy(process_group_backend="gloo")
    rows = torch.utils.data.DistributedSampler(
        examples(), num_replicas=2, rank=int(os.environ["RANK"]), shuffle=False
    )
    _, after = trained(2, 2, rows, devices=2, strategy=gloo, use_distributed_sampler=False)
    if torch.distributed.get_rank() == 0:
        torch.save(after, Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
