"""Unsloth's trainer on its CPU backend trains the gated loss."""

from __future__ import annotations

import unsloth  # isort: skip  # before transformers, of which it changes parts
from unsloth import FastLanguageModel  # isort: skip

import pytest
import torch
from datasets import Dataset
from files import ALPACA, model_in, save
from pages import run_block
from tiny import oracle, parameters
from trl import SFTConfig, SFTTrainer

from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations import trl

CLOSE = {"rel": 1e-6}
TEXTS = [{"text": f"{row['instruction']} {row['output']}"} for row in ALPACA]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


def given(folder, output, lora=False, **settings):
    """What the page takes as given."""
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(folder / "model"),
        max_seq_length=64,
        load_in_4bit=False,
        dtype=torch.float32,
        full_finetuning=not lora,
    )
    if lora:
        model = FastLanguageModel.get_peft_model(
            model, r=2, lora_alpha=4, target_modules=["q_proj", "v_proj"]
        )
    args = {
        "output_dir": str(output),
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "bf16": False,
        "train_sampling_strategy": "sequential",
        **settings,
    }
    dataset = Dataset.from_list(TEXTS)
    names = {"SFTTrainer": SFTTrainer, "model": model, "tokenizer": tokenizer, "dataset": dataset}
    return {**names, "args": SFTConfig(**args)}


def trained(folder, output, **settings):
    return run_block("unsloth", 0, given(folder, output, **settings))["trainer"]


def logged(run, name="loss"):
    return [entry[name] for entry in run.state.log_history if name in entry]


def first_batch(run):
    return next(iter(run.get_train_dataloader()))


def test_the_trainer_is_unsloths(folder, tmp_path):
    assert unsloth.__version__ and getattr(SFTTrainer, "_unsloth_cpu", False)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_the_first_loss_is_the_oracles(lora, folder, tmp_path):
    run = trained(folder, tmp_path, lora=lora)
    rows = first_batch(run)
    assert logged(run)[0] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert logged(run, "nll")[0] == pytest.approx(oracle(model_in(folder), rows, "nll"), **CLOSE)
    assert len(logged(run)) == 3 and logged(run)[2] < logged(run)[0]
    if lora:
        changed = [name for name, p in run.model.named_parameters() if "lora_B" in name and p.any()]
        assert len(changed) == 4


def test_a_batch_of_8_is_4_of_2_accumulated(folder, tmp_path):
    whole = trained(folder, tmp_path)
    parts = trained(folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    for name in ("loss", "nll", "mean_gate"):
        assert logged(parts, name) == pytest.approx(logged(whole, name), rel=1e-5), name
    end = parameters(parts.model)
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, end[name], rtol=1e-4, atol=1e-6)


def test_evaluation_is_gated_with_plain_cross_entropy_beside_it(folder, tmp_path):
    run = trained(folder, tmp_path, max_steps=1, learning_rate=0.0)
    metrics = run.evaluate(run.train_dataset)
    rows = first_batch(run)
    assert metrics["eval_loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert metrics["eval_nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), **CLOSE)


def test_trl_apply_raises_before_a_parameter_changes(folder, tmp_path):
    names = given(folder, tmp_path)
    run = SFTTrainer(
        model=names["model"],
        args=names["args"],
        train_dataset=names["dataset"],
        processing_class=names["tokenizer"],
    )
    trl.apply(run)
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match="the gated loss was never called"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_patch_model_raises(folder, tmp_path):
    with pytest.raises(ValueError, match="^model: its forward has been replaced already"):
        integration.patch_model(given(folder, tmp_path)["model"])
