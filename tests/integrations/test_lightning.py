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

from deft_kernels import deft_loss, fused_linear_deft_loss

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
QUIET |= {"enable_model_summary": False}
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def trained(size, accumulate, sampler=None, change=None, **settings):
    """What each step logged, and the parameters, after one epoch of 32 rows by the page's own lines."""
    model = llama().train()
    scope = run_block("lightning")
    if change is not None:
        scope["FineTuning"] = change(scope["FineTuning"])
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


def by_hand(starts, size, clip=None):
    """The parameters after a step of plain descent for each start, on the mean over its rows' tokens."""
    model, rows = llama().train(), batch(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in starts:
        part = {name: values[start : start + size] for name, values in rows.items()}
        optimizer.zero_grad()
        deft_loss(model(input_ids=part["input_ids"]).logits, part["labels"], shift=True).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return parameters(model)


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
    torch.testing.assert_close(end, by_hand(range(0, 32, 10), 10))


def test_gradients_are_clipped_after_they_are_divided():
    _, end = trained(2, 4, gradient_clip_val=0.5)
    torch.testing.assert_close(end, by_hand(range(0, 32, 8), 8, clip=0.5))


def test_a_plain_mean_is_a_mean_of_means():
    """The page's trap, so that it is not taken for a strange warning."""

    def change(module):
        class Mean(module):
            def training_step(self, batch, batch_idx):
                logits = self.model(input_ids=batch["input_ids"]).logits
                return deft_loss(logits, batch["labels"], shift=True)

            def on_before_optimizer_step(self, optimizer):
                pass

        return Mean

    whole, parts = trained(8, 1, change=change)[1], trained(2, 4, change=change)[1]
    torch.testing.assert_close(whole, by_hand(range(0, 32, 8), 8))
    assert max(float((whole[name] - parts[name]).abs().max()) for name in whole) > 1e-3


def test_without_logits():
    def change(module):
        class OfHidden(module):
            def training_step(self, batch, batch_idx):
                hidden = self.model.model(batch["input_ids"], attention_mask=batch["attention_mask"])[0]
                head, labels = self.model.lm_head, batch["labels"]
                self.tokens = self.tokens + (labels[:, 1:] != -100).sum()
                return fused_linear_deft_loss(hidden, head.weight, labels, shift=True, reduction="sum")

        return OfHidden

    torch.testing.assert_close(trained(2, 4, change=change)[1], by_hand(range(0, 32, 8), 8))


def test_a_strategy_that_keeps_the_gradients_elsewhere_raises():
    """As DeepSpeed's ZeRO does, which Lightning lets run on GPUs only: its parameters' gradients are None."""

    def change(module):
        class Elsewhere(module):
            def on_after_backward(self):
                self.zero_grad(set_to_none=True)

        return Elsewhere

    with pytest.raises(RuntimeError, match="num_items from the data loader"):
        trained(8, 1, change=change)


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
