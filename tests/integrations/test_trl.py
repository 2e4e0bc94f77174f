"""SFTTrainer, with a tokenizer trained here; the tests also run against versions before its fused head."""

from __future__ import annotations

import contextlib

import pytest
import torch
import trl
from datasets import Dataset
from packaging.version import Version
from tiny import SIZES, arguments, llama, losses, oracle, parameters
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Trainer
from trl import SFTConfig, SFTTrainer

from deft_kernels import objectives
from deft_kernels.integrations import trl as integration
from deft_kernels.integrations.transformers import (
    ComputeLoss,
    patch_model,
    set_loss_function,
    unpatch_model,
)

FUSED_HEAD = Version(trl.__version__) >= Version("1.15")
# Of `arguments`; the others stay SFTConfig's own.
SETTINGS = (
    *("output_dir", "use_cpu", "report_to", "disable_tqdm", "save_strategy", "logging_steps", "max_steps"),
    *("learning_rate", "optim", "lr_scheduler_type", "max_grad_norm", "train_sampling_strategy"),
    *("per_device_train_batch_size", "per_device_eval_batch_size"),
)
TEXTS = [
    {"prompt": f"{word} is", "completion": f" {' '.join(rest)}"}
    for word, rest in zip(
        ["iron", "snow", "grass", "coal"] * 8,
        [["grey", "and", "heavy"], ["white"], ["green", "and", "wet", "and", "soft"], ["black", "dust"]] * 8,
        strict=True,
    )
]


def trained_tokenizer():
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<pad>", "<s>", "</s>", "<unk>"]
    trainer = trainers.WordLevelTrainer(vocab_size=SIZES["vocab_size"], special_tokens=special)
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in TEXTS], trainer)
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.fixture(scope="module")
def tokenizer():
    return trained_tokenizer()


def prepared(folder, tokenizer, model=None, compute_loss_func=None, **settings):
    plain = arguments(folder).to_dict()
    chosen = {name: plain[name] for name in SETTINGS}
    # bf16 is SFTConfig's default; its gradients of accumulated parts differ in their last bits.
    chosen |= {"bf16": False, "loss_type": "nll", "gradient_checkpointing": False, **settings}
    return SFTTrainer(
        model=llama() if model is None else model,
        args=SFTConfig(**chosen),
        train_dataset=Dataset.from_list(TEXTS),
        eval_dataset=Dataset.from_list(TEXTS[:8]),
        processing_class=tokenizer,
        compute_loss_func=compute_loss_func,
    )


def first_batch(run):
    return next(iter(run.get_train_dataloader()))


@pytest.mark.parametrize("objective", ["deft", "eaft", "dft", "cayley", objectives.tsallis(0.5)], ids=str)
def test_the_first_loss_is_the_oracles(objective, tmp_path, tokenizer):
    run = prepared(tmp_path, tokenizer, max_steps=1)
    rows = first_batch(run)
    assert (rows["labels"] == -100).any(), "the prompts are not ignored"
    expected, plain = oracle(llama(), rows, objective), oracle(llama(), rows, "nll")
    integration.apply(run, objective)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]
    assert losses(run, "nll") == [pytest.approx(plain, rel=1e-5)]


def test_a_batch_of_8_is_4_of_2_accumulated(tmp_path, tokenizer):
    runs = []
    for settings in ({}, {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}):
        # One after the other: what accelerate divides by is shared in a process.
        runs.append(prepared(tmp_path, tokenizer, **settings))
        integration.apply(runs[-1])
        runs[-1].train()
    whole, parts = runs
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    start = parameters(llama())
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, parameters(parts.model)[name])
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"


def test_the_parameters_are_those_of_a_transformers_trainer(tmp_path, tokenizer):
    run = prepared(tmp_path, tokenizer)
    integration.apply(run)
    run.train()
    prepared_by_trl = prepared(tmp_path, tokenizer)
    model = llama()
    patch_model(model)
    other = Trainer(
        model=model,
        args=arguments(tmp_path, remove_unused_columns=False),
        train_dataset=prepared_by_trl.train_dataset,
        data_collator=prepared_by_trl.data_collator,
    )
    other.train()
    assert losses(run) == pytest.approx(losses(other), rel=1e-5)
    for name, parameter in parameters(model).items():
        torch.testing.assert_close(parameters(run.model)[name], parameter, rtol=1e-4, atol=1e-6)


def test_its_own_metrics_stay(tmp_path, tokenizer):
    plain, gated = prepared(tmp_path, tokenizer, max_steps=1), prepared(tmp_path, tokenizer, max_steps=1)
    integration.apply(gated)
    plain.train(), gated.train()
    for name in ("entropy", "mean_token_accuracy", "num_tokens"):
        assert losses(gated, name) == pytest.approx(losses(plain, name), rel=1e-5), name
    # And ours agree with them, and with the plain loss.
    assert losses(gated, "mean_entropy") == pytest.approx(losses(plain, "entropy"), rel=1e-5)
    assert losses(gated, "top1") == pytest.approx(losses(plain, "mean_token_accuracy"), rel=1e-5)
    assert losses(gated, "nll") == pytest.approx(losses(plain), rel=1e-5)
    assert 0 < losses(gated, "mean_gate")[0] < 1
    assert 0 < losses(gated, "mean_alpha")[0] < 1


def test_evaluation(tmp_path, tokenizer):
    run = prepared(tmp_path, tokenizer)
    rows = first_batch(run)
    integration.apply(run)
    metrics = run.evaluate()
    expected = oracle(llama(), rows, "nll" if FUSED_HEAD else "deft")
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_lora(tmp_path, tokenizer):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    before = parameters(model)
    run = prepared(tmp_path, tokenizer, model)
    expected = oracle(model, first_batch(run))
    integration.apply(run)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    for name, parameter in parameters(model).items():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


def test_torch_compile(tmp_path, tokenizer):
    eager = prepared(tmp_path, tokenizer, llama(num_hidden_layers=1))
    settings = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    compiled = prepared(tmp_path, tokenizer, llama(num_hidden_layers=1), **settings)
    for run in (eager, compiled):
        integration.apply(run)
        run.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)


class TestRefusals:
    @pytest.mark.skipif(FUSED_HEAD, reason="since the fused head it is another name of 'nll'")
    def test_chunked_nll(self, tmp_path, tokenizer):
        run = prepared(tmp_path, tokenizer, loss_type="chunked_nll")
        with pytest.raises(ValueError, match=r"chunked_nll.*loss_type=\"nll\""):
            integration.apply(run)

    @pytest.mark.skipif(FUSED_HEAD, reason="since the fused head it is another name of 'nll'")
    def test_chunked_nll_with_compute_loss_func(self, tmp_path, tokenizer):
        run = prepared(tmp_path, tokenizer, loss_type="chunked_nll", compute_loss_func=ComputeLoss("deft"))
        before = parameters(run.model)
        with pytest.raises(ValueError, match=r"chunked_nll.*loss_type=\"nll\".*trl.apply\(trainer\)"):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    def test_dft(self, tmp_path, tokenizer):
        with pytest.raises(ValueError, match=r"loss_type: is 'dft'.*objective=\"dft\""):
            integration.apply(prepared(tmp_path, tokenizer, loss_type="dft"))

    def test_label_smoothing(self, tmp_path, tokenizer):
        with pytest.warns() if FUSED_HEAD else contextlib.nullcontext():
            run = prepared(tmp_path, tokenizer, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match="label_smoothing_factor"):
            integration.apply(run)

    def test_applying_twice(self, tmp_path, tokenizer):
        run = prepared(tmp_path, tokenizer)
        integration.apply(run)
        with pytest.raises(ValueError, match="already"):
            integration.apply(run)

    def test_a_compute_loss_that_drops_the_number_of_items(self, tmp_path, tokenizer):
        class Forgetful(SFTTrainer):
            def compute_loss(self, model, inputs, return_outputs=False, **others):
                return super().compute_loss(model, inputs, return_outputs)

        like = prepared(
            tmp_path, tokenizer, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=1
        )
        dataset = Dataset.from_list(TEXTS)
        run = Forgetful(model=llama(), args=like.args, train_dataset=dataset, processing_class=tokenizer)
        integration.apply(run)
        before = parameters(run.model)
        with pytest.raises(RuntimeError, match="num_items_in_batch"):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    def test_another_trainer(self, tmp_path):
        from tiny import trainer

        with pytest.raises(TypeError, match="expected an SFTTrainer"):
            integration.apply(trainer(tmp_path, llama()))

    def test_transformers_apply_on_this_trainer(self, tmp_path, tokenizer):
        from deft_kernels.integrations.transformers import apply

        with pytest.raises(ValueError, match=r"trl.apply\(trainer\)"):
            apply(prepared(tmp_path, tokenizer))

    @pytest.mark.skipif(not FUSED_HEAD, reason="before the fused head compute_loss_func takes any objective")
    def test_what_the_fused_head_cannot_give(self, tmp_path, tokenizer):
        run = prepared(tmp_path, tokenizer)
        with pytest.raises(ValueError, match="max p"):
            integration.apply(run, objectives.deft(order=float("inf")))
        with pytest.raises(ValueError, match="detach=False"):
            integration.apply(run, objectives.deft(detach=False))
        with pytest.raises(TypeError, match="z_loss: not a setting"):
            integration.apply(run, z_loss=0.1)
        with pytest.raises(TypeError, match="expected a name"):
            integration.apply(run, lambda r: -r.logp)

    @pytest.mark.skipif(not FUSED_HEAD, reason="before the fused head these hooks are right")
    @pytest.mark.parametrize("hook", [patch_model, set_loss_function])
    def test_hooks_that_the_fused_head_goes_past(self, hook, tmp_path, tokenizer):
        model = llama()
        hook(model)
        before = parameters(model)
        run = prepared(tmp_path, tokenizer, model)
        with pytest.raises(RuntimeError, match=r"TRL >= 1.15.*trl.apply\(trainer\)"):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


@pytest.mark.skipif(not FUSED_HEAD, reason="before TRL 1.15 nothing of the model is changed")
def test_a_second_trainer_of_the_same_model(tmp_path, tokenizer):
    """As in training in stages; and the model as it was, when the loss is taken out."""
    run = prepared(tmp_path, tokenizer, max_steps=1)
    integration.apply(run)
    run.train()
    with pytest.raises(ValueError, match="has a gated loss already"):
        integration.apply(run)
    again = prepared(tmp_path, tokenizer, model=run.model, max_steps=1)
    expected = oracle(run.model, first_batch(again), "cayley")
    integration.apply(again, "cayley")
    again.train()
    assert losses(again) == [pytest.approx(expected, rel=1e-5)]

    unpatch_model(again.model)
    with pytest.raises(ValueError, match="^model: has no gated loss"):
        unpatch_model(again.model)
    plain = prepared(tmp_path, tokenizer, model=again.model, max_steps=1)
    expected = oracle(again.model, first_batch(plain), "nll")
    plain.train()
    assert losses(plain) == [pytest.approx(expected, rel=1e-5)]
