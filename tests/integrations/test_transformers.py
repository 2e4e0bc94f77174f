"""The three routes through transformers' own Trainer, on a CPU."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from routes import ROUTES, prepared
from tiny import batch, examples, llama, losses, oracle, parameters

from deft_kernels import objectives


@pytest.mark.sampled
@pytest.mark.parametrize("objective", ["deft", "eaft", objectives.tsallis(0.5), "nll"], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_the_first_loss_is_the_oracles(route, objective, tmp_path):
    expected = oracle(llama(), batch(), objective)
    run = prepared(route, tmp_path, objective=objective, max_steps=1)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_of_8_is_4_of_2_accumulated(route, tmp_path):
    whole = prepared(route, tmp_path)
    whole.train()  # before the other is made: what accelerate divides by is shared in a process
    parts = prepared(route, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    start, end = parameters(llama()), parameters(parts.model)
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, end[name])
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"


@pytest.mark.parametrize("route", ROUTES)
def test_all_routes_give_the_parameters_of_a_loop_over_the_logits(route, tmp_path):
    model = llama().train()
    for step in range(3):
        rows = {name: values[8 * step : 8 * step + 8] for name, values in batch(24).items()}
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        logp = F.log_softmax(logits[:, :-1].double(), -1)
        labels = rows["labels"][:, 1:]
        chosen = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        alpha = logp.exp().square().sum(-1).detach()
        loss = (((1 - (alpha * chosen).exp()) / alpha)[labels != -100]).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    run = prepared(route, tmp_path)
    run.train()
    trained = parameters(run.model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_evaluation(route, tmp_path):
    """Gated where the loss is over logits, the model's own where it is inside a patched forward."""
    model = llama()
    plain, gated = oracle(model, batch(), "nll"), oracle(model, batch())
    run = prepared(route, tmp_path, model)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain if route == "patch_model" else gated, rel=1e-5)
    logged = run.state.log_history[-1]
    if route == "patch_model":
        assert "eval_nll" not in logged
    else:
        assert logged["eval_nll"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_the_logs_have_plain_cross_entropy_and_the_gate(route, tmp_path):
    model = llama()
    rows = batch()
    plain = oracle(model, rows, "nll")
    with torch.no_grad():
        p = model(input_ids=rows["input_ids"]).logits[:, :-1].softmax(-1)
    labels = rows["labels"][:, 1:]
    valid = labels != -100
    p_y = p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    alpha = p.square().sum(-1)
    run = prepared(route, tmp_path, model, max_steps=2)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    expected = {
        "nll": plain,
        "mean_alpha": alpha[valid].mean().item(),
        "mean_gate": (p_y**alpha)[valid].mean().item(),
        "mean_entropy": -(p * p.log()).sum(-1)[valid].mean().item(),
        "top1": (p.argmax(-1) == labels)[valid].float().mean().item(),
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_accumulated_statistics_are_means_over_tokens(tmp_path):
    run = prepared(
        "patch_model", tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    run.train()
    assert losses(run, "nll") == [pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)]


@pytest.mark.parametrize("route", ROUTES)
def test_lora(route, tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    expected = oracle(model, batch())
    before = parameters(model)
    run = prepared(route, tmp_path, model)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    for name, parameter in parameters(run.model).items():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


@pytest.mark.parametrize("route", ROUTES)
def test_a_head_that_peft_trains_whole(route, tmp_path):
    """modules_to_save: the copy that PEFT trains is the head, and the one it was copied from stays."""
    import peft

    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings, r=2))
    expected, before = oracle(model, batch()), parameters(model)
    run = prepared(route, tmp_path, model)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    trained = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert {name for name in trained if "lora" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("route", ROUTES)
def test_torch_compile(route, tmp_path, pytestconfig):
    eager = prepared(route, tmp_path, llama(num_hidden_layers=1))
    settings = {"torch_compile": True, "torch_compile_backend": pytestconfig.getoption("compile_backend")}
    compiled = prepared(route, tmp_path, llama(num_hidden_layers=1), **settings)
    eager.train(), compiled.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert losses(compiled, "nll") == pytest.approx(losses(eager, "nll"), rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_checkpointing_and_bf16(route, tmp_path):
    plain = prepared(route, tmp_path)
    saved = prepared(route, tmp_path, gradient_checkpointing=True)
    mixed = prepared(route, tmp_path, bf16=True)
    plain.train(), saved.train(), mixed.train()
    assert losses(saved) == pytest.approx(losses(plain), rel=1e-5)
    # bf16 logits near 5 are off by up to 2^-7; a mean over 50 tokens by less than that.
    assert losses(mixed) == pytest.approx(losses(plain), abs=2**-7)


def test_the_dataset_has_prompts_of_different_lengths():
    counts = {int((row["labels"] != -100).sum()) for row in examples(8)}
    assert len(counts) == 8
