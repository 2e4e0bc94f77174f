"""Trainers whose compute_loss, or idea of the model, is their own: what they train, or that they raise."""

from __future__ import annotations

import pytest
import torch
from tiny import arguments, batch, examples, llama, losses, oracle, parameters
from transformers import Trainer

from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations._shared.patching import calls_of
from deft_kernels.integrations.callback import ProofCallback, StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

ACCUMULATED = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


class OfItsOwn(Trainer):
    """Passes everything on, as a subclass that adds to the inputs does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, dict(inputs), return_outputs, num_items_in_batch)


class Declining(OfItsOwn):
    """As Axolotl's: decides for itself that the model does not take a number of items."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


class Forgetful(Trainer):
    """Written for transformers before 4.46, or with **kwargs since: the number of items ends here."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        return super().compute_loss(model, inputs, return_outputs)


class Plain(Trainer):
    """Makes a loss of its own of the model's logits."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        logits = model(input_ids=inputs["input_ids"], labels=labels).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return (loss, logits) if return_outputs else loss


class Changing(Trainer):
    """Trains the gated loss first and another one from the second step on."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        kind = Plain if self.state.global_step else Trainer
        return kind.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)


def prepared(kind, route, folder, *, log_statistics=True, **settings):
    model = llama()
    statistics = RunningStatistics() if log_statistics else None
    if route == "patch_model":
        integration.patch_model(model, statistics=statistics)
    elif route == "loss_function":
        integration.set_loss_function(model, statistics=statistics)
    run = kind(model=model, args=arguments(folder, **settings), train_dataset=examples())
    if route == "compute_loss_func":
        integration.apply(run, log_statistics=log_statistics)
    else:
        proof = StatisticsCallback(statistics) if log_statistics else ProofCallback(calls_of(model))
        proof.add_to(run)
    return run


ROUTES = ("compute_loss_func", "loss_function", "patch_model")


@pytest.mark.parametrize(
    ("kind", "route"),
    [*((OfItsOwn, route) for route in ROUTES), (Declining, "compute_loss_func")],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_a_subclass_that_passes_the_number_on_accumulates(kind, route, tmp_path):
    whole, expected = prepared(Trainer, route, tmp_path), oracle(llama(), batch())
    whole.train()
    parts = prepared(kind, route, tmp_path, **ACCUMULATED)
    parts.train()
    # rel: sums of fp32 in another order.
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)
    assert losses(parts)[0] == pytest.approx(expected, rel=1e-5)
    wanted = parameters(whole.model)
    for name, parameter in parameters(parts.model).items():
        torch.testing.assert_close(parameter, wanted[name])


@pytest.mark.sampled
@pytest.mark.parametrize("log_statistics", [True, False])
@pytest.mark.parametrize(
    "case",
    [*((Forgetful, route) for route in ROUTES), (Declining, "loss_function"), (Declining, "patch_model")],
    ids=lambda case: f"{case[0].__name__}-{case[1]}",
)
def test_a_mean_of_means_raises(case, log_statistics, tmp_path):
    kind, route = case
    run = prepared(kind, route, tmp_path, log_statistics=log_statistics, **ACCUMULATED)
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match=r"mean of their means.*model_accepts_loss_kwargs = True"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    # One batch a step on one rank: the batch's own mean is the step's.
    whole = prepared(kind, route, tmp_path, log_statistics=log_statistics, max_steps=1)
    whole.train()
    assert losses(whole) == [pytest.approx(oracle(llama(), batch()), rel=1e-5)]


@pytest.mark.parametrize("route", ROUTES[1:])
def test_what_the_message_says_helps(route, tmp_path):
    whole = prepared(Trainer, route, tmp_path)
    whole.train()
    parts = prepared(Declining, route, tmp_path, **ACCUMULATED)
    parts.model_accepts_loss_kwargs = True
    parts.train()
    assert losses(parts) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.parametrize("log_statistics", [True, False])
def test_a_loss_of_the_subclass_raises(log_statistics, tmp_path):
    run = prepared(Plain, "compute_loss_func", tmp_path, log_statistics=log_statistics)
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match="never called"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_a_loss_that_is_left_later_raises(tmp_path):
    run = prepared(Changing, "compute_loss_func", tmp_path)
    with pytest.raises(RuntimeError, match="never called in this step"):
        run.train()
    assert run.state.global_step == 1
