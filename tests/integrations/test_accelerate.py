"""The loop on docs/integrations/accelerate.md, alone and as two ranks (this file is their script)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from pages import run_block, two_ranks
from tiny import batch, examples, llama, oracle, parameters


def trained(size, accumulate):
    """Losses and parameters after one epoch of 32 rows by the page's own lines."""
    model = llama().train()
    scope = run_block("accelerate")
    scope["train_epoch"].__defaults__ = (accumulate,)
    loader = torch.utils.data.DataLoader(examples(), batch_size=size)
    scope |= {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), "loader": loader}
    return run_block("accelerate", 1, scope)["losses"], parameters(model)


def test_the_first_loss_is_the_oracles():
    losses, _ = trained(8, 1)
    assert len(losses) == 4
    assert losses[0] == pytest.approx(oracle(llama(), batch()), rel=1e-5)


def test_a_batch_of_8_is_4_of_2_accumulated():
    (whole, end), (parts, same) = trained(8, 1), trained(2, 4)
    assert whole == pytest.approx(parts, rel=1e-5)
    torch.testing.assert_close(same, end)


def test_the_last_step_of_an_epoch_counts_what_is_left_of_it():
    """32 rows in batches of 2, 5 of them a step: the last step has one batch."""
    losses, _ = trained(2, 5)
    assert len(losses) == 4
    model = llama().train()
    rows = batch(32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for start in (0, 10, 20, 30):
        part = {name: values[start : start + 10] for name, values in rows.items()}
        assert losses[start // 10] == pytest.approx(oracle(model, part), rel=1e-4)
        whole = run_block("accelerate")["deft_loss"](
            model(input_ids=part["input_ids"]).logits, part["labels"], shift=True
        )
        optimizer.zero_grad()
        whole.backward()
        optimizer.step()


def test_a_patched_model_gives_the_same_loss_and_gradients():
    rows = batch()
    model, other = llama().eval(), llama()  # eval, as from_pretrained gives it
    logits = other(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    expected = run_block("accelerate")["deft_loss"](logits, rows["labels"], shift=True, num_items=100)
    loss = run_block("accelerate", 2, {"model": model, "batch": rows, "num_items": 100})["loss"]
    torch.testing.assert_close(loss, expected)
    loss.backward(), expected.backward()
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_two_ranks_accumulating_twice_are_one_batch_of_8(tmp_path):
    losses, end = trained(8, 1)
    two_ranks(__file__, tmp_path / "ranks.pt")
    by_ranks, parameters_of_ranks = torch.load(tmp_path / "ranks.pt")
    assert by_ranks == pytest.approx(losses, rel=1e-5)
    torch.testing.assert_close(parameters_of_ranks, end)


if __name__ == "__main__":
    # A rank takes every second batch of 2, so that 2 ranks and 2 batches are the same 8 rows in each step.
    result = trained(2, 2)
    if torch.distributed.get_rank() == 0:
        torch.save(result, Path(sys.argv[1]))
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
