"""Ways past the gated loss that only the step itself shows: each raises before it trains another one."""

from __future__ import annotations

import liger_kernel.transformers.functional as functional
import pytest
import torch
import torch.nn.functional as F
from test_liger import FUSED, _installed  # noqa: F401  # the fixture
from tiny import batch, examples, llama, losses, oracle, parameters, trainer
from torch import nn
from transformers import AutoModelForCausalLM, Trainer

from deft_kernels.integrations import liger
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations._shared.watch import Watch
from deft_kernels.integrations.callback import ProofCallback, StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

HOOKS = (integration.patch_model, integration.set_loss_function)


class FromLogits(Trainer):
    """Has the gated loss made, and trains another one of the logits that came with it."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs["labels"]
        _, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        logits = outputs.logits[:, :-1].flatten(0, 1)
        return F.cross_entropy(logits, labels[:, 1:].flatten())


@pytest.mark.parametrize("frozen", [False, True])
def test_a_patched_model_in_eval_mode(frozen, tmp_path):
    """As from_pretrained gives it: its forward is then its own, which a loop without train() would train."""
    llama().save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    model.model.requires_grad_(not frozen)
    integration.patch_model(model)
    loss = model(**batch()).loss
    assert loss.item() == pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        loss.backward()
    assert all(p.grad is None for p in model.parameters())
    model.train()(**batch()).loss.backward()


def test_ligers_forward_in_eval_mode():
    model = llama().eval()
    liger.install(model=model)
    with pytest.raises(RuntimeError, match=r"model\.train\(\)"):
        model(**batch()).loss.backward()


@pytest.mark.parametrize("route", ["loss_function", "compute_loss_func"])
def test_another_loss_of_the_same_logits(route, tmp_path):
    model = llama()
    plain = trainer(tmp_path, model)
    run = FromLogits(model=model, args=plain.args, train_dataset=examples())
    if route == "compute_loss_func":
        integration.apply(run)
    else:
        statistics = RunningStatistics()
        integration.set_loss_function(model, statistics=statistics)
        StatisticsCallback(statistics).add_to(run)
    before = parameters(model)
    with pytest.raises(RuntimeError, match="went past the gated loss|never called"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_gradient_through_any_output_of_the_backbone():
    class Two(nn.Module):
        def forward(self, x):
            return x, 2 * x

    backbone = Two().train()
    watch = Watch(backbone, "here")
    x = torch.ones(3, requires_grad=True)
    with pytest.raises(RuntimeError, match="here: a training step went past"):
        backbone(x)[1].sum().backward()
    loss = backbone(x)[1].sum()
    watch.seen(loss)
    loss.backward()


def test_a_forward_before_training_is_no_proof(tmp_path):
    statistics = RunningStatistics()
    other = llama().train()
    integration.set_loss_function(other, statistics=statistics)
    other(**batch()).loss.backward()
    run = trainer(tmp_path, llama())
    StatisticsCallback(statistics).add_to(run)
    with pytest.raises(RuntimeError, match="never called"):
        run.train()


def test_an_adapter_on_the_head_after_ligers_install(tmp_path):
    import peft

    model = llama()
    liger.install(model=model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match="remove 'lm_head' from target_modules"):
        trainer(tmp_path, adapted, **FUSED).train()
    assert functional.liger_fused_linear_cross_entropy is not None


@pytest.mark.parametrize("give", HOOKS)
def test_a_loss_that_is_trained_is_seen(give, tmp_path):
    """In eval mode too, where the hook is on the model's own logits; and for gradients taken one by one."""
    model = llama()
    give(model)
    model.train(give is integration.patch_model)
    gradients = torch.autograd.grad(model(**batch()).loss, list(model.parameters()))
    assert any(gradient.any() for gradient in gradients)


def test_two_callbacks_of_one_loss(tmp_path):
    run = trainer(tmp_path, llama())
    statistics = integration.apply(run)
    for callback in (StatisticsCallback(statistics), ProofCallback(statistics.calls)):
        with pytest.raises(ValueError, match="statistics: the trainer has a callback"):
            callback.add_to(run)
    with pytest.raises(TypeError, match="statistics: expected a RunningStatistics"):
        StatisticsCallback(None)
    with pytest.raises(TypeError, match="calls: expected"):
        ProofCallback(None)


def test_the_logs_of_each_training_and_evaluation_are_its_own(tmp_path):
    """Steps after the last log, a prediction and a count of tokens seen leave the numbers as they are."""
    run = trainer(tmp_path, llama(), logging_steps=2, include_num_input_tokens_seen="all")
    integration.apply(run)
    plain = oracle(run.model, batch(), "nll")
    run.predict(examples()[8:16])
    assert run.evaluate() and run.state.log_history[-1]["eval_nll"] == pytest.approx(plain, rel=1e-5)
    run.train()
    logged = losses(run, "nll")
    again = trainer(tmp_path, run.model, logging_steps=1, max_steps=1)
    again.callback_handler.callbacks = run.callback_handler.callbacks
    again.compute_loss_func = run.compute_loss_func
    expected = oracle(run.model, batch(), "nll")
    again.train()
    assert len(logged) == 1
    assert losses(again, "nll") == [pytest.approx(expected, rel=1e-5)]
