"""LLaMA-Factory trains the gated loss, from its own settings to the trained model."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch
from files import ALPACA, assert_only_adapters_were_trained, model_in, save
from llamafactory_runs import trained
from pages import run_block, two_ranks
from tiny import oracle
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from deft_kernels import objectives, reference

# Losses are logged as they are, in fp32, whose rounding is 6e-8; sums in another order erred by 2e-7 where
# this was written.
CLOSE = {"rel": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    return trained(folder, tmp_path_factory.mktemp("whole"))


def logged(run, name="loss"):
    return [entry[name] for entry in run.logs]


def test_the_first_loss_is_the_oracles_and_cross_entropy_is_logged_beside_it(whole, folder):
    (rows,) = whole.rows
    assert (rows["labels"] == -100).any() and (rows["labels"] != -100).any()
    assert whole.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert whole.logs[0]["nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), **CLOSE)
    assert len(whole.logs) == 3


def test_a_batch_of_8_is_4_of_2_accumulated(whole, folder, tmp_path):
    parts = trained(folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert logged(parts) == pytest.approx(logged(whole), **CLOSE)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-5, atol=1e-6)


def test_two_ranks_train_as_one_process(whole, folder, tmp_path):
    """DDP over gloo, with accumulation on both ranks."""
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    script = str(Path(__file__).with_name("llamafactory_runs.py"))
    two_ranks(script, folder, tmp_path, json.dumps(settings))
    for rank in (0, 1):
        logs = json.loads((tmp_path / f"logs{rank}.json").read_text())
        for name in ("loss", "nll"):
            assert [entry[name] for entry in logs] == pytest.approx(logged(whole, name), **CLOSE)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(dict(saved.named_parameters()), whole.parameters, rtol=1e-5, atol=1e-6)


def test_lora(folder, tmp_path):
    run = trained(folder, tmp_path, finetuning_type="lora", lora_rank=2, lora_target="q_proj,v_proj")
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)
    assert run.logs[2]["loss"] < run.logs[0]["loss"]
    assert_only_adapters_were_trained(run, folder)


def test_evaluation_is_gated_with_plain_cross_entropy_beside_it(folder, tmp_path):
    settings = {"eval_dataset": "tiny", "eval_strategy": "steps", "eval_steps": 1, "eval_on_start": True}
    run = trained(folder, tmp_path, max_steps=1, per_device_eval_batch_size=8, **settings)
    before = next(entry for entry in run.history if "eval_loss" in entry)
    (rows,) = run.rows
    assert before["eval_loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert before["eval_nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), **CLOSE)


@pytest.mark.parametrize("neat", [False, True])
def test_packing(folder, tmp_path, neat):
    run = trained(folder, tmp_path, packing=True, neat_packing=neat, cutoff_len=64, max_steps=1)
    (rows,) = run.rows
    assert len(rows["labels"]) < len(ALPACA)
    inputs = {name: x for name, x in rows.items() if name != "labels"}
    with torch.no_grad():
        logits = model_in(folder)(**inputs, use_cache=False).logits[:, :-1].double()
    labels = rows["labels"][:, 1:]
    valid = labels != -100
    logp = logits.log_softmax(-1)
    chosen = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    assert run.logs[0]["nll"] == pytest.approx(-float(chosen[valid].mean()), **CLOSE)
    alpha = logp.exp().square().sum(-1)
    loss = -torch.special.expm1(alpha * chosen) / alpha
    assert run.logs[0]["loss"] == pytest.approx(float(loss[valid].mean()), **CLOSE)


def test_gradient_checkpointing_off_is_the_same(whole, folder, tmp_path):
    """LLaMA-Factory checkpoints unless told not to."""
    run = trained(folder, tmp_path, disable_gradient_checkpointing=True)
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)


def test_the_trainer_for_generation_trains_the_same(whole, folder, tmp_path):
    """Its evaluation generates, without a loss."""
    settings = {"eval_dataset": "tiny", "eval_strategy": "steps", "eval_steps": 1, "max_new_tokens": 2}
    run = trained(folder, tmp_path, predict_with_generate=True, **settings)
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)
    evaluated = [entry for entry in run.history if "eval_rouge-1" in entry]
    assert evaluated and not any(name in entry for entry in evaluated for name in ("eval_loss", "eval_nll"))


@pytest.fixture
def with_columns(folder, tmp_path, monkeypatch):
    """LLaMA-Factory's own tokenisation of the examples, with columns added by the page's lines."""
    from llamafactory.train.sft import workflow

    monkeypatch.setattr(workflow, "CustomSeq2SeqTrainer", workflow.CustomSeq2SeqTrainer)
    trained(folder, tmp_path, tokenized_path=str(tmp_path / "tokenised"), max_steps=1)
    given = {
        "folder": str(tmp_path / "tokenised"),
        "with_columns": str(tmp_path / "with columns"),
        "domains": ["code" if i % 3 else "mathematics" for i in range(len(ALPACA))],
        "weights": [0.5 + i % 4 for i in range(len(ALPACA))],
    }
    run_block("llamafactory", 1, given)
    return given


def test_columns(folder, tmp_path, with_columns):
    run = trained(folder, tmp_path / "out", block=2, tokenized_path=with_columns["with_columns"])
    (rows,) = run.rows
    assert not [name for name in rows if name in ("domain", "trust")]
    channel, weight = rows["deft_kernels_channel"][:, 1:], rows["deft_kernels_token_weight"][:, 1:]
    assert len(weight[:, 0].unique()) == 4
    with torch.no_grad():
        logits = model_in(folder)(rows["input_ids"], rows["attention_mask"]).logits[:, :-1].double()
    labels = rows["labels"][:, 1:]
    described = objectives.resolve("deft")
    loss, stats = reference.loss(logits, labels, objective=described, token_weight=weight.double())
    assert run.logs[0]["loss"] == pytest.approx(float(loss), **CLOSE)
    for number, name in enumerate(("code", "mathematics")):
        own = (labels != -100) & (channel == number)
        assert run.logs[0][f"nll/{name}"] == pytest.approx(float(-stats["logp"][own].mean()), **CLOSE)
        assert run.logs[0][f"mean_gate/{name}"] == pytest.approx(float(stats["gate"][own].mean()), **CLOSE)


def test_columns_that_are_not_there(folder, tmp_path, with_columns):
    with pytest.raises(ValueError, match="^channel: the data set has no column 'domain' where the collator"):
        trained(folder, tmp_path / "out", block=2)


class TestRefusals:
    """Each before a parameter changes."""

    @pytest.fixture(autouse=True)
    def _unchanged(self, folder, tmp_path, monkeypatch):
        import files

        models = []
        started = files.Observer.on_train_begin

        def on_train_begin(self, args, state, control, **others):
            models.append(others["model"])
            started(self, args, state, control, **others)

        monkeypatch.setattr(files.Observer, "on_train_begin", on_train_begin)
        yield
        for model in models:
            before = model_in(folder).state_dict()
            assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_without_the_flag(self, folder, tmp_path):
        with pytest.raises(RuntimeError, match="never called"):
            trained(folder, tmp_path, use_dft_loss=False)

    def test_another_stage(self, folder, tmp_path):
        """Its trainer for pre-training has no place for a loss."""
        with pytest.raises(RuntimeError, match="never called"):
            trained(folder, tmp_path, stage="pt", cutoff_len=8)

    def test_label_smoothing(self, folder, tmp_path):
        with pytest.raises(ValueError, match="label_smoothing_factor"):
            trained(folder, tmp_path, label_smoothing_factor=0.1)

    def test_asft_beside_it(self, folder, tmp_path):
        """Calls the function with a reference model's logits where the number of items was."""
        with pytest.raises((TypeError, ValueError), match="num_items"):
            trained(folder, tmp_path, use_asft_loss=True)

    def test_eaft_alone(self, folder, tmp_path):
        with pytest.raises(RuntimeError, match="never called"):
            trained(folder, tmp_path, use_dft_loss=False, use_eaft_loss=True)


def test_liger_makes_logits_for_it(whole, folder, tmp_path, monkeypatch):
    """The trainer keeps the labels for the loss, and without them Liger's forward makes logits."""
    import liger_kernel.transformers as liger

    # For want of a GPU without Liger's kernels for single layers; the model's forward is what it replaces.
    layers = {"rope": False, "rms_norm": False, "swiglu": False}
    patched = functools.partial(liger.apply_liger_kernel_to_llama, **layers)
    monkeypatch.setattr(liger, "apply_liger_kernel_to_llama", patched)
    monkeypatch.setattr(LlamaForCausalLM, "forward", LlamaForCausalLM.forward)  # put back at the end
    run = trained(folder, tmp_path, enable_liger_kernel=True)
    assert "liger" in LlamaForCausalLM.forward.__module__
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)


def test_eaft_beside_it_is_not_trained(whole, folder, tmp_path):
    """LLaMA-Factory asks for use_dft_loss first."""
    run = trained(folder, tmp_path, use_eaft_loss=True)
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)
