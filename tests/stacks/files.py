"""A tiny model, a tokenizer trained on the spot and eight examples, as files for a stack's own loader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tiny import SIZES, llama
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, TrainerCallback
from words import WORDS, trained_tokenizer

# As many examples as a step takes: each step is all of them, in whatever order a stack shuffles them.
ALPACA = [
    {"instruction": f"the {WORDS[2 + i % 3]}", "input": "", "output": " ".join(WORDS[i : i + 3 + i % 4])}
    for i in range(8)
]


def save(folder: Path) -> None:
    """folder/model: model and tokenizer; folder/data: alpaca.jsonl, and LLaMA-Factory's dataset_info.json."""
    tokenizer = trained_tokenizer(SIZES["vocab_size"], ["<pad>", "<s>", "</s>", "<unk>"])
    names = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder / "model")
    llama().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    (folder / "data" / "alpaca.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ALPACA))
    (folder / "data" / "dataset_info.json").write_text(json.dumps({"tiny": {"file_name": "alpaca.jsonl"}}))


def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


class Observer(TrainerCallback):
    """Keeps what the trainer trains on, each step's logs and the parameters at the end."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Tensor]] = []
        self.logs: list[dict[str, float]] = []
        self.history: list[dict[str, float]] = []
        self.rank = 0
        self.parameters: dict[str, Tensor] = {}

    def on_train_begin(
        self, args: Any, state: Any, control: Any, train_dataloader: Any, **others: Any
    ) -> None:
        self.rows = [dict(batch) for batch in train_dataloader]

    def on_train_end(self, args: Any, state: Any, control: Any, model: Any, **others: Any) -> None:
        self.logs = [entry for entry in state.log_history if "loss" in entry]
        self.history = list(state.log_history)
        self.rank = args.process_index
        self.parameters = {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_only_adapters_were_trained(run: Observer, folder: Path) -> None:
    before = model_in(folder).state_dict()
    for name, parameter in run.parameters.items():
        if "lora_B" in name:
            assert parameter.any(), f"{name} was not trained"
        elif "lora" not in name:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(parameter, before[name]), name
