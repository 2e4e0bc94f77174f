"""Axolotl's own configuration, datasets and training, from the YAML on docs/integrations/axolotl.md.

As a script, one rank of two:  python -m torch.distributed.run --nproc-per-node=2 axolotl_runs.py CONFIG
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_datasets
from axolotl.integrations.base import PluginManager
from axolotl.train import train
from files import Observer
from pages import blocks
from words import WORDS

from deft_kernels.integrations.axolotl import DeftPlugin

PLUGIN = f"{DeftPlugin.__module__}.{DeftPlugin.__name__}"


def written(folder: Path, output: Path, **settings: Any) -> Path:
    """A configuration file for the model and the data in `folder`; a setting of None leaves a key out."""
    (lines,) = blocks("axolotl", "yaml")
    config = {
        "base_model": str(folder / "model"),
        "tokenizer_type": "PreTrainedTokenizerFast",
        "datasets": [alpaca(folder)],
        "dataset_prepared_path": str(folder / "prepared"),  # shared, as each saving starts processes
        "dataset_num_proc": 1,
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
    output.mkdir(exist_ok=True, parents=True)
    path = output / "config.yml"
    path.write_text(yaml.safe_dump({key: value for key, value in config.items() if value is not None}))
    return path


def alpaca(folder: Path) -> dict[str, str]:
    return {"path": str(folder / "data" / "alpaca.jsonl"), "ds_type": "json", "type": "alpaca"}


def completions(folder: Path) -> dict[str, str]:
    """Texts without prompts: every token is a label, the first of each text too."""
    path = folder / "data" / "completions.jsonl"
    texts = [" ".join(WORDS[i : i + 4 + i % 5]) for i in range(8)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return {"path": str(path), "ds_type": "json", "type": "completion"}


def configuration(folder: Path, output: Path, **settings: Any) -> Any:
    # Axolotl keeps the plugins of earlier configurations for as long as the process lives.
    PluginManager.get_instance().plugins.clear()
    return load_cfg(str(written(folder, output, **settings)))


def trained(folder: Path, output: Path, **settings: Any) -> Observer:
    """`axolotl train`, with an observer among the trainer's callbacks."""
    observer = Observer()
    cfg = configuration(folder, output, **settings)
    with pytest.MonkeyPatch.context() as patch:
        create = PluginManager.post_trainer_create

        def post_trainer_create(self: Any, cfg: Any, trainer: Any) -> None:
            create(self, cfg, trainer)
            trainer.add_callback(observer)

        patch.setattr(PluginManager, "post_trainer_create", post_trainer_create)
        train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return observer


def rank(path: str) -> None:
    """One rank's training; the first leaves its logs beside the model that Axolotl saves."""
    cfg = load_cfg(path)
    # Axolotl puts rank N on GPU N whenever there are several ranks; there is none here.
    cfg.device_map = {"": "cpu"}
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    assert trainer.args.world_size == 2
    if trainer.args.process_index == 0:
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
        (Path(cfg.output_dir) / "logs.json").write_text(json.dumps(logs))


if __name__ == "__main__":
    rank(sys.argv[1])
