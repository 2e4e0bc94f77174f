"""Fine-tune a causal language model with a gated loss, in the setting that the paper published.

    python docs/examples/paper/train.py math --model Qwen/Qwen2.5-Math-1.5B --objective deft --out out/math
    accelerate launch --config_file docs/examples/paper/fsdp2.yaml --num_processes 8 \\
        docs/examples/paper/train.py figfont --model meta-llama/Llama-3.1-8B --objective cayley --out out/art

Tasks: math (NuminaMath-CoT), medical (m23k), figfont. The loss is made from hidden states (`patch_model`), so
no logits exist. The model is saved in --out, with its settings and log; `evaluate.py` judges it.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tasks import IGNORED, TASKS, encoded, given, refuse_out, rows_of, tokenizer_of
from transformers import AutoModelForCausalLM, DataCollatorForSeq2Seq, Trainer, TrainingArguments

from deft_kernels import objectives
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics
from deft_kernels.integrations.transformers import patch_model

NAMED = ("nll", "neg_prob", "tsallis", "deft", "cayley", "rational", "dft", "eaft", "chord", "mile")


def objective_of(written: str) -> Any:
    """`deft`, `tsallis(0.5)`, `deft(order=1)`, `nll.within("p>=0.1")`: a call of objectives."""

    def made(node: ast.expr) -> Any:
        if isinstance(node, ast.Name) and node.id in NAMED:
            return getattr(objectives, node.id)
        if isinstance(node, ast.Attribute) and node.attr == "within":
            of = made(node.value)
            return (of if not callable(of) else of()).within
        if isinstance(node, ast.Call):
            keywords = {str(k.arg): ast.literal_eval(k.value) for k in node.keywords}
            return made(node.func)(*(ast.literal_eval(a) for a in node.args), **keywords)
        raise ValueError(written)

    try:
        found = made(ast.parse(written, mode="eval").body)
        return found() if callable(found) else found
    except (SyntaxError, ValueError, TypeError, AttributeError) as error:
        raise SystemExit(f"--objective: {written!r} is none of {', '.join(NAMED)}: {error}") from error


def published_rate(model: str) -> float:
    """The paper's: 5e-5, and 2e-5 for Llama-3.1-8B."""
    return 2e-5 if "llama-3.1-8b" in model.lower() else 5e-5


def accumulation(batch: int, micro_batch: int, processes: int) -> int:
    steps, rest = divmod(batch, micro_batch * processes)
    if rest or not steps:
        raise SystemExit(
            f"--batch: {batch} rows are no multiple of --micro-batch {micro_batch} x {processes} processes"
        )
    return steps


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, help="an id on the hub, or a folder")
    parser.add_argument("--objective", default="deft", help='as in Python: "tsallis(0.5)" (default deft)')
    parser.add_argument("--out", type=Path, required=True, help="a folder for the model, made if missing")
    parser.add_argument("--data", help="another id, or a .jsonl, .json, .parquet or .csv file")
    parser.add_argument("--split", default="train", help="of a data set on the hub (default train)")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--learning-rate", type=float, help="default 5e-5; 2e-5 for Llama-3.1-8B")
    parser.add_argument("--batch", type=int, default=256, help="rows of an optimizer step (default 256)")
    parser.add_argument("--micro-batch", type=int, default=4, help="rows a process has at once (default 4)")
    parser.add_argument("--epochs", type=float, default=1.0, help="default 1")
    parser.add_argument("--max-length", type=int, help="tokens a row; default 3072, for figfont 800")
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps (default 0.1, verl's)")
    parser.add_argument("--weight-decay", type=float, default=0.01, help="default 0.01, verl's")
    parser.add_argument("--fp32", action="store_true", help="no bf16, to compare runs on a CPU")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name in ("batch", "micro_batch", "epochs", "max_length", "limit", "learning_rate"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: {value} is not above 0")
    if not 0 <= args.warmup < 1:
        parser.error(f"--warmup: {args.warmup} is no share in [0, 1)")
    if not 0 <= args.weight_decay < math.inf:
        parser.error(f"--weight-decay: {args.weight_decay} is no finite number from 0 on")
    if not 0 <= args.seed < 2**32:  # NumPy's, which the trainer seeds, too
        parser.error(f"--seed: {args.seed} is not in [0, 2**32)")
    refuse_out(args.out)
    return args


def main() -> None:
    args = parsed()
    objective = objective_of(args.objective)
    task = TASKS[args.task]
    args.learning_rate = args.learning_rate or published_rate(args.model)
    args.max_length = args.max_length or task.max_length
    state = PartialState()
    steps = accumulation(args.batch, args.micro_batch, state.num_processes)

    tokenizer = tokenizer_of(args.model, "right")
    with state.main_process_first():  # one process makes the tokens, the others read them from its cache
        rows, report = encoded(
            task, rows_of(task, args.data, args.split, args.limit), tokenizer, args.max_length
        )
    state.print(report)
    # The weights, their gradients and AdamW's states are fp32; matrix products are bf16.
    with given("--model"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    model.config.use_cache = False
    statistics = RunningStatistics()
    patch_model(model, objective, statistics=statistics)
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(args.out),
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.micro_batch,
            gradient_accumulation_steps=steps,
            learning_rate=args.learning_rate,
            lr_scheduler_type="cosine",
            warmup_steps=args.warmup,
            weight_decay=args.weight_decay,
            adam_beta2=0.95,
            max_grad_norm=1.0,
            bf16=not args.fp32,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            seed=args.seed,
        ),
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED),
        processing_class=tokenizer,
    )
    StatisticsCallback(statistics).add_to(trainer)
    trainer.train()
    trainer.save_model()
    if state.is_main_process:
        settings = {**vars(args), "out": str(args.out), "data": args.data or task.data, "rows": report}
        record = {"settings": settings, "processes": state.num_processes, "log": trainer.state.log_history}
        (args.out / "run.json").write_text(json.dumps(record, indent=1))
        state.print(f"saved: {args.out}")


if __name__ == "__main__":
    main()
