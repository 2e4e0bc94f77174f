"""Axolotl trains the gated loss, from YAML to the trained model, by both of its routes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from axolotl_runs import alpaca, completions, trained, written
from files import assert_only_adapters_were_trained, model_in, save
from pages import two_ranks
from tiny import oracle
from transformers import AutoModelForCausalLM

from deft_kernels import objectives, reference

ROUTES = pytest.mark.parametrize("without_logits", [False, True], ids=["logits", "hidden"])
# Losses are logged as they are, in fp32, whose rounding is 6e-8; sums in another order erred by 2e-7 where
# this was written.
CLOSE = {"rel": 1e-6}
# Its kernels for LoRA are Triton's, for a GPU, and stay in the attention's class for later models.
NO_KERNELS = {f"lora_{part}_kernel": False for part in ("qkv", "o", "mlp", "embedding")}
LORA = {"adapter": "lora", "lora_r": 2, "lora_alpha": 4, **NO_KERNELS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    """A run of three steps over all eight examples at once, by each route."""
    output = tmp_path_factory.mktemp("runs")
    return [trained(folder, output / str(route), deft_without_logits=route) for route in (False, True)]


def logged(run, name="loss"):
    return [entry[name] for entry in run.logs]


@ROUTES
def test_the_first_loss_is_the_oracles(runs, folder, without_logits):
    run = runs[without_logits]
    (rows,) = run.rows
    assert (rows["labels"] == -100).any() and (rows["labels"] != -100).any()
    plain = oracle(model_in(folder), rows, "nll")
    assert len(run.logs) == 3
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert run.logs[0]["nll"] == pytest.approx(plain, **CLOSE)
    assert run.logs[0]["ppl"] == pytest.approx(math.exp(plain), rel=1e-5)  # e^x has x times the error of x


@ROUTES
def test_a_batch_of_8_is_4_of_2_accumulated(runs, folder, tmp_path, without_logits):
    whole = runs[without_logits]
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    parts = trained(folder, tmp_path, deft_without_logits=without_logits, **sizes)
    assert logged(parts) == pytest.approx(logged(whole), **CLOSE)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-5, atol=1e-6)


@ROUTES
def test_gradient_checkpointing(runs, folder, tmp_path, without_logits):
    run = trained(folder, tmp_path, deft_without_logits=without_logits, gradient_checkpointing=True)
    assert logged(run) == pytest.approx(logged(runs[without_logits]), **CLOSE)


@ROUTES
def test_lora(folder, tmp_path, without_logits):
    targets = {"lora_target_modules": ["q_proj", "v_proj"]}
    run = trained(folder, tmp_path, deft_without_logits=without_logits, **LORA, **targets)
    (rows,) = run.rows
    # A new adapter adds nothing yet.
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert run.logs[2]["loss"] < run.logs[0]["loss"]
    assert_only_adapters_were_trained(run, folder)


def test_a_head_with_an_adapter_is_trained_over_logits_only(folder, tmp_path):
    settings = {**LORA, "lora_target_modules": ["q_proj", "lm_head"]}
    with pytest.raises(ValueError, match="deft_without_logits: set it to false.*lm_head: carries an adapter"):
        trained(folder, tmp_path / "hidden", deft_without_logits=True, **settings)
    run = trained(folder, tmp_path / "logits", **settings)
    assert any("lm_head.lora_B" in name and parameter.any() for name, parameter in run.parameters.items())
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)


@ROUTES
def test_a_head_that_is_trained_whole_beside_adapters(folder, tmp_path, without_logits):
    whole = {"lora_target_modules": ["q_proj"], "lora_modules_to_save": ["lm_head", "embed_tokens"]}
    run = trained(folder, tmp_path, deft_without_logits=without_logits, **LORA, **whole)
    heads = [p for name, p in run.parameters.items() if "lm_head.modules_to_save" in name]
    before = model_in(folder).lm_head.weight
    assert len(heads) == 1 and not torch.equal(heads[0], before)
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)
    assert run.logs[2]["loss"] < run.logs[0]["loss"]


@ROUTES
def test_evaluation(folder, tmp_path, without_logits):
    """Gated over logits, the model's own plain loss from hidden states; it is made before training too."""
    sets = {"test_datasets": [{**alpaca(folder), "split": "train"}], "eval_steps": 1}
    run = trained(folder, tmp_path, deft_without_logits=without_logits, max_steps=1, **sets)
    before, after = [entry for entry in run.history if "eval_loss" in entry][:2]
    (rows,) = run.rows
    gated, plain = oracle(model_in(folder), rows), oracle(model_in(folder), rows, "nll")
    assert before["eval_loss"] == pytest.approx(plain if without_logits else gated, **CLOSE)
    assert before["eval_ppl"] == pytest.approx(math.exp(plain), rel=1e-5)
    assert after["eval_loss"] < before["eval_loss"]
    assert ("eval_nll" in before) is not without_logits
    if not without_logits:
        assert before["eval_nll"] == pytest.approx(plain, **CLOSE)


def test_a_held_out_part(folder, tmp_path):
    run = trained(folder, tmp_path, val_set_size=2, eval_steps=1, max_steps=1)
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)
    assert len(run.rows[0]["labels"]) == 6
    assert any("eval_nll" in entry for entry in run.history)


def test_streaming(folder, tmp_path):
    run = trained(folder, tmp_path, streaming=True)
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)


def packing(folder):
    # In order: the observer looks at the rows before they are trained on, and what is packed must not change.
    order = {"curriculum_sampling": True, "sample_packing_sequentially": True}
    return {"datasets": [completions(folder)], "sample_packing": True, "micro_batch_size": 1, **order}


def packed_oracle(model, rows, objective="deft"):
    """The float64 reference's sum over packed rows, and the number of labels."""
    inputs = {name: x for name, x in rows.items() if name != "labels"}
    with torch.no_grad():
        # With a cache transformers takes the row for one text.
        logits = model(**inputs, use_cache=False).logits[:, :-1].double()
    labels = rows["labels"][:, 1:]
    described = objectives.resolve(objective)
    loss, _ = reference.loss(logits, labels, objective=described, reduction="sum")
    return float(loss), int((labels != -100).sum())


def test_packed_examples_have_the_labels_of_axolotls_plain_loss(folder, tmp_path):
    """Of texts without a prompt the first token is a label, predicted from the text before it, in both."""
    plain = trained(folder, tmp_path / "plain", plugins=None, trainer_cls=None, **packing(folder))
    for route in (False, True):
        run = trained(folder, tmp_path / str(route), deft_without_logits=route, **packing(folder))
        (rows,) = run.rows
        starts = (rows["position_ids"] == 0) & (rows["labels"] != -100)
        assert starts.sum() == 8
        assert run.logs[0]["nll"] == pytest.approx(plain.logs[0]["loss"], **CLOSE)
        loss, count = packed_oracle(model_in(folder), rows)
        assert run.logs[0]["loss"] == pytest.approx(loss / count, **CLOSE)


def test_accumulated_packed_rows_are_one_mean_over_their_tokens(folder, tmp_path):
    sizes = {"sequence_len": 32, "gradient_accumulation_steps": 2, "max_steps": 1}
    run = trained(folder, tmp_path, deft_without_logits=True, **packing(folder), **sizes)
    sums, counts = zip(*(packed_oracle(model_in(folder), rows) for rows in run.rows), strict=True)
    assert len(counts) == 2 and counts[0] != counts[1]
    assert run.logs[0]["loss"] == pytest.approx(sum(sums) / sum(counts), **CLOSE)


@ROUTES
def test_two_ranks_train_as_one_process(runs, folder, tmp_path, without_logits):
    parts = 2 if without_logits else 1  # accumulation on both ranks besides
    sizes = {"micro_batch_size": 4 // parts, "gradient_accumulation_steps": parts}
    path = written(folder, tmp_path, deft_without_logits=without_logits, **sizes)
    two_ranks(str(Path(__file__).with_name("axolotl_runs.py")), path)
    logs = json.loads((tmp_path / "logs.json").read_text())
    whole = runs[without_logits]
    for name in ("loss", "nll"):
        assert [entry[name] for entry in logs] == pytest.approx(logged(whole, name), **CLOSE)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(dict(saved.named_parameters()), whole.parameters, rtol=1e-5, atol=1e-6)
