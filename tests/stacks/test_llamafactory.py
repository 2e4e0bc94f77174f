"""The lines on docs/integrations/llamafactory.md, through LLaMA-Factory's own run_exp."""

from __future__ import annotations

import pytest
import torch
from files import Observer, model_in, save
from pages import run_block
from tiny import oracle


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


def trained(folder, output, **settings):
    observer = Observer()
    args = {
        "stage": "sft",
        "do_train": True,
        "finetuning_type": "full",
        "model_name_or_path": str(folder / "model"),
        "dataset": "tiny",
        "dataset_dir": str(folder / "data"),
        "template": "default",
        "output_dir": str(output),
        "preprocessing_num_workers": 1,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 3,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0.0,
        **settings,
    }
    run_block("llamafactory", 0, {"args": args, "callbacks": [observer]})
    return observer


def test_the_first_loss_is_the_oracles_and_cross_entropy_is_logged_beside_it(folder, tmp_path):
    run = trained(folder, tmp_path)
    (rows,) = run.rows
    assert (rows["labels"] == -100).any() and (rows["labels"] != -100).any()
    assert run.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), rows), rel=1e-4)
    assert run.logs[0]["nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), rel=1e-4)
    assert len(run.logs) == 3


def test_a_batch_of_8_is_4_of_2_accumulated(folder, tmp_path):
    whole = trained(folder, tmp_path / "whole")
    parts = trained(folder, tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=4)
    losses = [[entry["loss"] for entry in run.logs] for run in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-4, atol=1e-5)


def test_without_the_flag_it_raises_instead_of_training_cross_entropy(folder, tmp_path):
    with pytest.raises(RuntimeError, match="never called"):
        trained(folder, tmp_path, use_dft_loss=False)
