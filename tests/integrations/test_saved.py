"""A patched model copied, or saved whole: the copy trains the gated loss, and nothing trains another one."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from tiny import batch, llama, oracle

from deft_kernels.integrations.transformers import patch_model, set_loss_function, unpatch_model


def saved(model):
    """The model after torch.save and torch.load."""
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def step(model):
    model.train()
    loss = model(**batch()).loss
    loss.backward()
    return loss.item()


@pytest.mark.parametrize("trained", [False, True])
def test_a_patched_model_is_not_saved_whole(trained):
    """Read back, its forward would be the class's own, which trains plain cross-entropy."""
    model = llama()
    expected = oracle(model, batch())
    patch_model(model)
    if trained:
        step(model)
    for write in (saved, pickle.dumps):
        with pytest.raises(pickle.PicklingError, match=r"^model: .*state_dict.*unpatch_model"):
            write(model)
    assert step(model) == pytest.approx(expected, rel=1e-5)
    unpatch_model(model)
    other = saved(model)
    patch_model(other)
    assert step(other) == pytest.approx(expected, rel=1e-5)


def test_a_copy_is_patched():
    model = llama()
    patch_model(model)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.lm_head.weight.mul_(1.5)
    for each in (model, other):
        assert step(each) == pytest.approx(oracle(each, batch()), rel=1e-5)
    unpatch_model(other)
    assert "forward" in vars(model) and "forward" not in vars(other)
    assert step(model) == pytest.approx(oracle(model, batch()), rel=1e-5)


def test_a_model_with_a_loss_function_is_saved_whole():
    model = llama()
    set_loss_function(model, "eaft")
    other = saved(model)
    assert step(other) == pytest.approx(oracle(other, batch(), "eaft"), rel=1e-5)
