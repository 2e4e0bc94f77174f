"""Liger's patched forward with the gated loss under its name; its other kernels, for GPUs, are left out."""

from __future__ import annotations

import inspect

import liger_kernel.transformers.functional as functional
import pytest
import torch
from liger_kernel.transformers import apply_liger_kernel_to_gemma2
from test_models import FAMILIES
from tiny import SIZES, V, batch, llama, losses, oracle, parameters, trainer
from transformers import Trainer

from deft_kernels import fused_linear_deft_loss
from deft_kernels.integrations import liger
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

FUSED = {
    "use_liger_kernel": True,
    "liger_kernel_config": {
        "rope": False,
        "rms_norm": False,
        "swiglu": False,
        "cross_entropy": False,
        "fused_linear_cross_entropy": True,
    },
}


@pytest.fixture(autouse=True)
def _installed():
    """No test leaves the loss installed for another."""
    original = functional.liger_fused_linear_cross_entropy
    yield
    if functional.liger_fused_linear_cross_entropy is not original:
        liger.uninstall()
    assert functional.liger_fused_linear_cross_entropy is original


def prepared(folder, model=None, **settings):
    model = llama() if model is None else model
    statistics = RunningStatistics()
    liger.install(model=model, statistics=statistics)
    run = trainer(folder, model, **FUSED, **settings)
    StatisticsCallback(statistics).add_to(run)
    return run


def test_the_trainer_trains_the_gated_loss(tmp_path):
    expected, plain = oracle(llama(), batch()), oracle(llama(), batch(), "nll")
    run = prepared(tmp_path)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    assert losses(run, "nll")[0] == pytest.approx(plain, rel=1e-5)
    other = trainer(tmp_path, llama())
    integration.apply(other)
    other.train()
    for name, parameter in parameters(other.model).items():
        torch.testing.assert_close(parameters(run.model)[name], parameter, rtol=1e-4, atol=1e-6)


def test_a_batch_of_8_is_4_of_2_accumulated(tmp_path):
    whole = prepared(tmp_path)
    whole.train()
    liger.uninstall()
    parts = prepared(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, parameters(parts.model)[name])


def test_evaluation_is_gated_where_liger_makes_no_logits(tmp_path):
    """A trainer that asks for no logits in evaluation (transformers 5.15 and later) gets the gated loss."""
    run = prepared(tmp_path)
    run.train()
    metrics = run.evaluate()
    gated = "skip_logits" in inspect.getsource(Trainer.prediction_step)
    expected = oracle(run.model, batch(), "deft" if gated else "nll")
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert ("eval_nll" in run.state.log_history[-1]) == gated


def test_lora(tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(llama(), config)
    expected, before = oracle(model, batch()), parameters(model)
    run = prepared(tmp_path, model)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


def test_gemma2_with_its_softcap():
    make, config, settings = FAMILIES["gemma2"]
    torch.manual_seed(0)
    model = make(config(**{**SIZES, **settings})).train()
    expected = oracle(model, batch())
    liger.install(model=model)
    off = {"rope": False, "rms_norm": False, "geglu": False, "cross_entropy": False}
    apply_liger_kernel_to_gemma2(model=model, fused_linear_cross_entropy=True, **off)
    assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)


def test_the_signature_is_ligers():
    wanted = inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
    liger.install()
    given = inspect.signature(functional.liger_fused_linear_cross_entropy).parameters
    assert [(p.name, p.default) for p in given.values()] == [(p.name, p.default) for p in wanted.values()]


def test_what_ligers_caller_gives_reaches_the_loss():
    liger.install("eaft")
    hidden, weight, bias = torch.randn(6, 4), torch.randn(V, 4), torch.randn(V)
    target = torch.tensor([1, 2, 3, 9, 9, 5])
    classes = torch.rand(V)
    result = functional.liger_fused_linear_cross_entropy(
        hidden,
        weight,
        target,
        bias,
        ce_weight=classes,
        ignore_index=9,
        lse_square_scale=0.1,
        label_smoothing=0.2,
        reduction="sum",
        softcap=3.0,
        accum_dtype=torch.float32,
        return_token_accuracy=True,
    )
    keywords = {"class_weight": classes, "ignore_index": 9, "z_loss": 0.1, "label_smoothing": 0.2}
    keywords |= {"objective": "eaft", "reduction": "sum", "softcap": 3.0, "return_stats": True}
    loss, stats = fused_linear_deft_loss(hidden, weight, target, bias, **keywords)
    assert torch.equal(result.loss, loss)
    assert result.token_accuracy == stats.correct.sum() / 4


@pytest.mark.parametrize(
    "asked",
    [
        {"return_z_loss": True},
        {"use_token_scaling": True},
        {"accum_dtype": torch.bfloat16},
        {"chunk_mem_const": 2},
    ],
    ids=lambda asked: next(iter(asked)),
)
def test_what_cannot_be_honoured_raises(asked):
    liger.install()
    with pytest.raises(ValueError, match=next(iter(asked))):
        functional.liger_fused_linear_cross_entropy(
            torch.randn(2, 4), torch.randn(V, 4), torch.tensor([1, 2]), **asked
        )


def test_installing_twice_and_uninstalling_nothing():
    with pytest.raises(RuntimeError, match="no gated loss is installed"):
        liger.uninstall()
    liger.install()
    with pytest.raises(RuntimeError, match="installed already"):
        liger.install()
    with pytest.raises(TypeError, match="softcap: not a keyword"):
        liger.uninstall(), liger.install(softcap=1.0)


def test_a_lora_head_raises():
    import peft

    model = peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["lm_head"], r=2))
    with pytest.raises(ValueError, match="remove 'lm_head' from target_modules"):
        liger.install(model=model)


def test_installed_but_not_used_raises(tmp_path):
    """The flag forgotten: the model's own loss would be trained."""
    model = llama()
    liger.install(model=model)
    before = parameters(model)
    with pytest.raises(RuntimeError, match="went past the gated loss"):
        trainer(tmp_path, model).train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("hook", [integration.patch_model, integration.set_loss_function])
def test_the_fused_flag_with_the_wrong_hook_raises(hook, tmp_path):
    """Liger replaces the forward when training starts, and would train plain cross-entropy."""
    model = llama()
    hook(model)
    before = parameters(model)
    run = trainer(tmp_path, model, **FUSED)
    # Its own cross-entropy is a GPU kernel; here a stand-in, so that the step gets as far as it would there.
    functional_name = "liger_fused_linear_cross_entropy"
    original = getattr(functional, functional_name)

    def plain(input, weight, target, reduction="mean", **_):
        return torch.nn.functional.cross_entropy(input @ weight.T, target, reduction=reduction)

    setattr(functional, functional_name, plain)
    try:
        with pytest.raises(RuntimeError, match=r"use_liger_kernel=True.*liger.install\(\)"):
            run.train()
    finally:
        setattr(functional, functional_name, original)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_the_fused_flag_with_compute_loss_func_raises(tmp_path):
    with pytest.raises(ValueError, match=r"use_liger_kernel.*liger.install\(model=trainer.model\)"):
        integration.apply(trainer(tmp_path, llama(), **FUSED))
    run = trainer(
        tmp_path, llama(), use_liger_kernel=True, liger_kernel_config={"fused_linear_cross_entropy": False}
    )
    integration.apply(run)
