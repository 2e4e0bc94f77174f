"""ms-swift trains the gated loss, from its own settings to the trained model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from files import assert_only_adapters_were_trained, model_in
from pages import two_ranks
from swift_runs import prepare, trained
from tiny import oracle

from deft_kernels import objectives, reference

# Losses are logged in fp32, whose rounding is 6e-8; sums in another order err by a few of these.
CLOSE = {"rel": 1e-6}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    prepare(folder)
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
    assert len(whole.logs) == 3 and 0 < whole.logs[0]["mean_gate"] < 1


def test_reports_have_the_numbers(whole, folder, tmp_path):
    """ms-swift writes its logs by a callback of its own."""
    run = trained(folder, tmp_path, max_steps=1)
    lines = [json.loads(line) for line in (tmp_path / "logging.jsonl").read_text().splitlines()]
    first = next(line for line in lines if "loss" in line)
    assert first["nll"] == pytest.approx(run.logs[0]["nll"], rel=1e-4)


def test_a_batch_of_8_is_4_of_2_accumulated(whole, folder, tmp_path):
    parts = trained(folder, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    assert logged(parts) == pytest.approx(logged(whole), **CLOSE)
    assert logged(parts, "nll") == pytest.approx(logged(whole, "nll"), **CLOSE)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-5, atol=1e-6)


def test_two_ranks_train_as_one_process(whole, folder, tmp_path):
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    two_ranks(str(Path(__file__).with_name("swift_runs.py")), folder, tmp_path, json.dumps(settings))
    for rank in (0, 1):
        logs = json.loads((tmp_path / f"logs{rank}.json").read_text())
        for name in ("loss", "nll", "mean_gate"):
            assert [entry[name] for entry in logs] == pytest.approx(logged(whole, name), **CLOSE), name


def test_lora(folder, tmp_path):
    run = trained(folder, tmp_path, tuner_type="lora", lora_rank=2, target_modules=["q_proj", "v_proj"])
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), run.rows[0]), **CLOSE)
    assert run.logs[2]["loss"] < run.logs[0]["loss"]
    assert_only_adapters_were_trained(run, folder)


def test_evaluation_is_gated_with_plain_cross_entropy_beside_it(whole, folder, tmp_path):
    settings = {"val_dataset": [str(folder / "data" / "rows.jsonl")], "eval_strategy": "steps"}
    run = trained(folder, tmp_path, max_steps=1, eval_steps=1, eval_on_start=True, **settings)
    before = next(entry for entry in run.history if "eval_loss" in entry)
    (rows,) = whole.rows
    assert before["eval_loss"] == pytest.approx(oracle(model_in(folder), rows), **CLOSE)
    assert before["eval_nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), **CLOSE)


def test_a_loss_scale_weighs_the_tokens(folder, tmp_path):
    """Numbers as they come from ms-swift's rules for texts: here 2 where a text has a certain word."""
    from files import ALPACA

    words = [word for row in ALPACA for word in row["output"].split()]
    pattern = max(set(words), key=words.count)
    (tmp_path / "scale.json").write_text(json.dumps({pattern: [2.0]}))
    from swift.loss_scale import loss_scale_map
    from swift.loss_scale.base import ConfigLossScale

    class Own(ConfigLossScale):
        loss_scale_config = str(tmp_path / "scale.json")
        is_binary = False

    loss_scale_map["own"] = Own
    run = trained(folder, tmp_path / "out", loss_scale="own", max_steps=1)
    (rows,) = run.rows
    scale = rows["loss_scale"]
    counted = rows["labels"] != -100
    assert (scale[counted] == 2).any() and (scale[counted] == 1).any()
    with torch.no_grad():
        logits = model_in(folder)(rows["input_ids"], rows["attention_mask"]).logits[:, :-1].double()
    deft = objectives.resolve("deft")
    weights = scale[:, 1:].double()
    loss, _ = reference.loss(logits, rows["labels"][:, 1:], objective=deft, token_weight=weights)
    assert run.logs[0]["loss"] == pytest.approx(float(loss), **CLOSE)


def test_its_own_channel_loss_works_beside_it(whole, folder, tmp_path):
    run = trained(folder, tmp_path, enable_channel_loss=True)
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)
    assert {"loss_code", "loss_mathematics"} <= run.logs[0].keys()


def test_the_whole_logits_are_kept(whole, folder, tmp_path):
    run = trained(folder, tmp_path, use_logits_to_keep=False)
    assert logged(run) == pytest.approx(logged(whole), **CLOSE)


class TestRefusals:
    def test_without_the_loss_type(self, folder, tmp_path):
        with pytest.raises(RuntimeError, match="never called"):
            trained(folder, tmp_path, loss_type=None)

    def test_label_smoothing(self, folder, tmp_path):
        with pytest.raises(ValueError, match="label_smoothing_factor"):
            trained(folder, tmp_path, label_smoothing_factor=0.1)

    def test_dft_beside_it(self, folder, tmp_path):
        with pytest.raises(ValueError, match="^enable_dft_loss"):
            trained(folder, tmp_path, enable_dft_loss=True)

    def test_a_name_that_is_taken(self, whole):
        from deft_kernels.integrations.swift import register

        for name in ("cross_entropy", "early_stop", "deft"):
            with pytest.raises(ValueError, match=f"^name: ms-swift has '{name}' already"):
                register("eaft", name=name)
        with pytest.raises(TypeError, match="^alpha: not a keyword"):
            register("deft", name="other", alpha=0.5)

    def test_trainers_that_are_others(self, whole):
        """Those of sequence parallelism and Megatron do not start on a CPU: what the loss asks of them."""
        from types import SimpleNamespace

        from swift.loss import loss_map

        template = SimpleNamespace(sequence_parallel_size=2)
        trainer = SimpleNamespace(task_type="causal_lm", template=template)
        with pytest.raises(ValueError, match="^sequence_parallel_size: "):
            loss_map["deft"](SimpleNamespace(), trainer)
        with pytest.raises(ValueError, match="^task_type: is 'embedding'"):
            loss_map["deft"](SimpleNamespace(), SimpleNamespace(task_type="embedding"))
        megatron = type("BaseMegatronTrainer", (), {})()
        with pytest.raises(ValueError, match="^loss_type: Megatron's trainer"):
            loss_map["deft"](SimpleNamespace(), megatron)
