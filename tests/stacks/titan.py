"""torchtitan's own trainer on a CPU: its debug model, a tokenizer, a dataset, a record of the losses.

`run(folder, ...)` is torchtitan's command line in this process. As a script this file is one rank of
several: titan.py FOLDER "NAME OPTION..." ...
"""

from __future__ import annotations

import gc
import json
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import titan_device  # noqa: F401  the device, before torchtitan looks for one
import torch
from pages import run_block
from torchtitan import train
from torchtitan.components.lora import LoRAConverter
from torchtitan.components.metrics import MetricsProcessor
from torchtitan.components.optimizer import default_adamw
from torchtitan.components.validate import Validator
from torchtitan.hf_datasets.text_datasets import ChatDataLoader
from torchtitan.models.common.attention import ScaledDotProductAttention
from torchtitan.models.llama3 import model_registry
from words import WORDS, trained_tokenizer

SEQ_LEN = 32
RUNS: dict[str, Any] = {}  # what the configuration functions below are told by `run`


def save(folder: Path) -> None:
    """folder/tokenizer, and folder/data.jsonl with eight examples of which each fills a sequence."""
    tokenizer = trained_tokenizer(64, ["<s>", "</s>", "<unk>"])
    (folder / "tokenizer").mkdir()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    settings = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": template}
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    generator = torch.Generator().manual_seed(1)

    def words(n: int) -> str:
        return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator))

    # Prompts of other lengths: a mean over the batch is not a mean of means.
    rows = [{"question": words(3 + i), "answer": words(17 + i % 3)} for i in range(8)]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def messages(row: dict[str, str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}, {"role": "assistant", "content": row["answer"]}]


class Record(MetricsProcessor):
    """torchtitan's metrics, with each loss it is given kept unrounded, and the parameters at the end."""

    @dataclass(kw_only=True, slots=True)
    class Config(MetricsProcessor.Config):
        pass

    losses: list[float]
    validation: list[float]
    parameters: dict[str, torch.Tensor]

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.losses, self.validation, self.parameters = [], [], {}
        RUNS["record"] = self

    def log(self, step: int, global_avg_loss: float, *args: Any, **kwargs: Any) -> None:
        self.losses.append(global_avg_loss)
        super().log(step, global_avg_loss, *args, **kwargs)

    def log_validation(self, loss: float, step: int, *args: Any, **kwargs: Any) -> None:
        self.validation.append(loss)
        super().log_validation(loss, step, *args, **kwargs)

    def close(self) -> None:
        for part in self.model_parts or ():
            for name, p in part.named_parameters():
                whole = p.full_tensor() if hasattr(p, "full_tensor") else p
                self.parameters[name] = whole.detach().clone()
        super().close()


def small(config: Any) -> Any:
    """A configuration, as far as a CPU and a test need it changed; never its loss."""
    folder = RUNS["folder"]
    for layer in config.model_spec.model.layers:
        # FlexAttention has no backward pass on a CPU; this is what torchtitan's graph trainer is tested with.
        layer.attention.inner_attention = ScaledDotProductAttention.Config()
    # Sharper than a fresh model's logits: the gates are then far from 1 and from each other.
    config.model_spec.model.lm_head.param_init["weight"] = partial(torch.nn.init.normal_, std=0.2)
    config.dump_folder, config.hf_assets_path = str(folder / "out"), str(folder / "tokenizer")
    data = {"data_files": str(folder / "data.jsonl"), "split": "train", "cache_dir": str(folder / "cache")}
    config.dataloader = ChatDataLoader.Config(
        dataset_path="json", load_dataset_kwargs=data, sample_processor=messages
    )
    config.validator = Validator.Config(freq=3, steps=1, dataloader=replace(config.dataloader))
    config.metrics = Record.Config(log_freq=1)
    # torchtitan has Adam only, which divides a gradient by its own size: rounding in a gradient of nearly
    # nothing would move a parameter by the whole learning rate. A large eps keeps steps in proportion.
    config.optimizer = default_adamw(lr=0.02, eps=0.1)
    config.lr_scheduler.warmup_steps = 0
    training = {
        "seq_len": SEQ_LEN,
        "steps": 3,
        "disable_cuda_graphs": True,
        "mixed_precision_param": "float32",
    }
    for name, value in training.items():
        setattr(config.training, name, value)
    config.debug.seed = 7
    # Every run starts from the same parameters, whatever its ranks: torchtitan's seed checkpoint.
    config.checkpoint.enable, config.checkpoint.load_only = True, True
    config.checkpoint.initial_load_path = str(folder / "seed" / "checkpoint" / "step-0")
    config.debug.enable_structured_logging = False
    return config


def whole() -> Any:
    return small(run_block("torchtitan")["llama3_deft"]())


def chunked() -> Any:
    return small(run_block("torchtitan", 1)["llama3_deft_in_chunks"]())


def lora() -> Any:
    """Adapters on all linear layers, the head's too; the seed checkpoint has none."""
    config = run_block("torchtitan")["llama3_deft"]()
    config.model_spec = model_registry("debugmodel", converters=[LoRAConverter.Config(rank=4)])
    config = small(config)
    config.checkpoint.enable = False
    return config


def lora_in_chunks() -> Any:
    config = lora()
    config.loss = run_block("torchtitan", 1)["llama3_deft_in_chunks"]().loss
    return config


def seed() -> Any:
    config = whole()
    config.dump_folder, config.checkpoint.create_seed_checkpoint = str(RUNS["folder"] / "seed"), True
    config.checkpoint.load_only, config.checkpoint.initial_load_path = False, None
    return config


def run(folder: Path, name: str, *options: str) -> Record:
    """`python -m torchtitan.train --module titan --config NAME OPTION...`, in this process."""
    RUNS["folder"] = folder
    argv, sys.argv = sys.argv, ["train", "--module", "titan", "--config", name, *options]
    try:
        with process_group():
            train.main()
    finally:
        sys.argv = argv
    return RUNS["record"]


@contextmanager
def process_group() -> Iterator[None]:
    """What a launcher gives to torchtitan, for a single process, and afterwards all as it was."""
    before = dict(os.environ)
    if "RANK" not in os.environ:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    else:  # a store of its own for every process group, as the launcher's remembers the last one
        os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "False"
        os.environ["MASTER_PORT"] = str(
            int(os.environ["MASTER_PORT"]) + 1 + len(RUNS.setdefault("groups", []))
        )
        RUNS["groups"].append(os.environ["MASTER_PORT"])
    try:
        yield
    finally:
        gc.enable()  # torchtitan takes it over
        torch.autograd.set_multithreading_enabled(True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


if __name__ == "__main__":
    sys.modules["titan"] = sys.modules["__main__"]
    folder = Path(sys.argv[1])
    results = {}
    for line in sys.argv[2:]:
        record = run(folder, *line.split())
        results[line] = (record.losses, record.validation, record.parameters)
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "ranks.pt")
