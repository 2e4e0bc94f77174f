"""A tiny model and dataset from nothing but a config, and the oracle's loss on a model's own logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from deft_kernels import objectives, reference

V, D, T = 61, 16, 12  # V is a prime, so that nothing divides it by luck
SIZES = {
    "vocab_size": V,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Sharper than a fresh model's: the gates are then far from 1 and from each other.
    "initializer_range": 0.4,
}


def llama(**settings: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **settings}))


def examples(n: int = 32) -> list[dict[str, Tensor]]:
    """Rows with prompts of different lengths ignored: a mean over a batch is not a mean of means."""
    generator = torch.Generator().manual_seed(1)
    rows = []
    for i in range(n):
        ids = torch.randint(3, V, (T,), generator=generator)
        labels = ids.clone()
        # The first label has nothing before it; older versions of transformers count it all the same.
        labels[: 1 + i % (T - 3)] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones(T, dtype=torch.long), "labels": labels})
    return rows


def batch(n: int = 8) -> dict[str, Tensor]:
    rows = examples(n)
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def oracle(model: Any, rows: dict[str, Tensor], objective: Any = "deft") -> float:
    """The float64 reference on the model's own logits."""
    training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        described = objectives.resolve(objective)
        loss, _ = reference.loss(logits[:, :-1].double(), rows["labels"][:, 1:], objective=described)
    model.train(training)
    return float(loss)


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    """Three steps of plain SGD over 8 rows each, in the order of the dataset, every step logged."""
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "use_cpu": True,
            "report_to": [],
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_steps": 1,
            "max_steps": 3,
            "per_device_train_batch_size": 8,
            "per_device_eval_batch_size": 8,
            "learning_rate": 0.1,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "max_grad_norm": 0.0,
            "train_sampling_strategy": "sequential",
            **settings,
        }
    )


def trainer(folder: Path, model: Any, *, callbacks: Any = None, **settings: Any) -> Trainer:
    rows = examples()
    return Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=rows,
        eval_dataset=rows[:8],
        callbacks=callbacks,
    )


def losses(run: Trainer, name: str = "loss") -> list[float]:
    return [entry[name] for entry in run.state.log_history if name in entry]


def parameters(model: Any) -> dict[str, Tensor]:
    return {name: copy.deepcopy(p.detach()) for name, p in model.named_parameters()}
