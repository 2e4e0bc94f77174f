"""The YAML on docs/integrations/axolotl.md, through Axolotl's own configuration and training."""

from __future__ import annotations

import pytest
import torch
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.train import train
from files import Observer, model_in, save
from pages import blocks
from tiny import oracle

from deft_kernels.integrations.axolotl import DeftPlugin


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


def configuration(folder, output, **settings):
    (lines,) = blocks("axolotl", "yaml")
    config = {
        "base_model": str(folder / "model"),
        "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [{"path": str(folder / "data" / "alpaca.jsonl"), "ds_type": "json", "type": "alpaca"}],
        "dataset_prepared_path": str(output / "prepared"),
        "output_dir": str(output),
        "sequence_len": 64,
        "sample_packing": False,
        "pad_to_sequence_len": False,
        "val_set_size": 0.0,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "optimizer": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler": "constant",
        "max_grad_norm": 0.0,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "gradient_checkpointing": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_strategy": "no",
        "use_tensorboard": False,
        **yaml.safe_load(lines),
        **settings,
    }
    path = output / "config.yml"
    output.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return load_cfg(str(path))


def trained(monkeypatch, folder, output, **settings):
    observer = Observer()
    create = DeftPlugin.post_trainer_create

    def post_trainer_create(self, cfg, trainer):
        create(self, cfg, trainer)
        trainer.add_callback(observer)

    with monkeypatch.context() as patch:
        patch.setattr(DeftPlugin, "post_trainer_create", post_trainer_create)
        cfg = configuration(folder, output, **settings)
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return observer


@pytest.mark.parametrize("without_logits", [False, True])
def test_the_first_loss_is_the_oracles_and_8_is_4_times_2(monkeypatch, folder, tmp_path, without_logits):
    settings = {"deft_without_logits": without_logits}
    whole = trained(monkeypatch, folder, tmp_path / "whole", **settings)
    (rows,) = whole.rows
    assert (rows["labels"] == -100).any() and (rows["labels"] != -100).any()
    assert whole.logs[0]["loss"] == pytest.approx(oracle(model_in(folder), rows), rel=1e-3)
    assert whole.logs[0]["nll"] == pytest.approx(oracle(model_in(folder), rows, "nll"), rel=1e-3)
    parts = trained(
        monkeypatch,
        folder,
        tmp_path / "parts",
        micro_batch_size=2,
        gradient_accumulation_steps=4,
        **settings,
    )
    losses = [[entry["loss"] for entry in run.logs] for run in (whole, parts)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    torch.testing.assert_close(parts.parameters, whole.parameters, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"deft_objectiv": "eaft"},
        {"deft_objective": "def"},
        {"deft_objective": "tsallis", "deft_objective_args": {"beta": 1}},
    ],
)
def test_a_wrong_key_raises(folder, tmp_path, settings):
    with pytest.raises(Exception, match="deft_objectiv|objective"):
        configuration(folder, tmp_path, **settings)


@pytest.mark.parametrize("settings", [{"use_eaft": True}, {"chunked_cross_entropy": True}])
def test_a_second_loss_raises(monkeypatch, folder, tmp_path, settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        trained(monkeypatch, folder, tmp_path, **settings)
