"""Judge a fine-tuned model on held-out rows: exact answer, multiple choice, word and Jaro-Winkler similarity.

    python docs/examples/paper/evaluate.py figfont --model out/art
    accelerate launch --num_processes 8 docs/examples/paper/evaluate.py math --model out/math --data x.jsonl

Each process has the whole model and a part of the rows. Answers and scores are written beside the model.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from scores import MEASURES
from tasks import TASKS, Task, given, prompt_of, refuse_out, rows_of, text, tokenizer_of, tokens_of
from tqdm import tqdm
from transformers import AutoModelForCausalLM


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--model", required=True, help="the folder that train.py made, or an id on the hub")
    parser.add_argument("--data", help="rows that were held out: an id or a file with the task's columns")
    parser.add_argument("--split", help="of a data set on the hub (figfont's default is test)")
    parser.add_argument("--limit", type=int, help="only the first rows")
    parser.add_argument("--batch", type=int, default=16, help="rows that a process has at once (default 16)")
    parser.add_argument("--new-tokens", type=int, help="most that an answer has; default by task")
    parser.add_argument("--samples", type=int, default=1, help="answers a row, averaged (default 1, greedy)")
    parser.add_argument("--temperature", type=float, default=1.0, help="with --samples above 1 (default 1)")
    parser.add_argument("--fp32", action="store_true", help="no bf16")
    parser.add_argument("--out", type=Path, help="a folder for the results; default: the model's")
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    for name in ("batch", "samples", "limit", "new_tokens", "temperature"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            parser.error(f"--{name.replace('_', '-')}: {value} is not above 0")
    if args.samples == 1 and args.temperature != 1.0:
        parser.error("--temperature: one answer a row is greedy; give --samples above 1")
    if args.data is None and args.split is None:
        if args.task != "figfont":
            parser.error(f"--data: {args.task} was trained on its whole split; give rows that were held out")
        args.split = "test"
    if args.out is None:
        args.out = Path(args.model)
        if not args.out.is_dir():
            parser.error(f"--out: {args.model} is no folder, so say where the results go")
    refuse_out(args.out)
    return args


@torch.no_grad()
def written(task: Task, rows: list[dict[str, Any]], model: Any, tokenizer: Any, args: Any) -> list[list[str]]:
    """What the model answers to each row, `samples` texts a row."""
    prompts = [tokens_of(tokenizer, prompt_of(task, row, tokenizer)) for row in rows]
    # The tokenizer pads on the left, so that each answer follows its prompt.
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt").to(model.device)
    how: dict[str, Any] = {"do_sample": False}
    if args.samples > 1:
        how = {"do_sample": True, "temperature": args.temperature, "top_k": 0, "top_p": 1.0}
        how["num_return_sequences"] = args.samples
    found = model.generate(
        **batch,
        max_new_tokens=args.new_tokens or task.new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **how,
    )
    texts = tokenizer.batch_decode(found[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    return [texts[i : i + args.samples] for i in range(0, len(texts), args.samples)]


def judged(task: Task, row: dict[str, Any], texts: list[str]) -> dict[str, Any]:
    wanted = text(row, task.answer)
    scores = {name: statistics.fmean(MEASURES[name](t, wanted) for t in texts) for name in task.measures}
    return {"question": text(row, task.question), "wanted": wanted, "written": texts, **scores}


def write(path: Path, content: str) -> None:
    """Beside, then renamed: a file that is there is whole."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(content)
    os.replace(beside, path)


def main() -> None:
    args = parsed()
    state = PartialState()
    torch.manual_seed(args.seed + state.process_index)
    task = TASKS[args.task]
    tokenizer = tokenizer_of(args.model, "left")
    rows = list(rows_of(task, args.data, args.split or "train", args.limit))
    for number, row in enumerate(rows):  # a row that cannot be judged stops the run before it begins
        try:
            judged(task, row, [""])
        except ValueError as error:
            raise SystemExit(f"--data: row {number}: {error}") from error
    dtype = torch.float32 if args.fp32 else torch.bfloat16
    with given("--model"):
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype)
    model = model.to(state.device).eval()
    results: list[dict[str, Any]] = []
    mine = list(range(state.process_index, len(rows), state.num_processes))
    starts = range(0, len(mine), args.batch)
    for start in tqdm(starts, desc=args.task, unit="batch", disable=not state.is_main_process):
        numbers = mine[start : start + args.batch]
        texts = written(task, [rows[i] for i in numbers], model, tokenizer, args)
        for number, answers in zip(numbers, texts, strict=True):
            results.append({"row": number, **judged(task, rows[number], answers)})
    if state.num_processes > 1:
        results = gather_object(results)
    if state.is_main_process:
        results.sort(key=lambda result: result["row"])
        means = {name: statistics.fmean(r[name] for r in results) for name in task.measures}
        scores = {"task": args.task, "rows": len(results), "samples": args.samples, **means}
        args.out.mkdir(parents=True, exist_ok=True)
        write(args.out / f"{args.task}-answers.jsonl", "".join(json.dumps(r) + "\n" for r in results))
        write(args.out / f"{args.task}-scores.json", json.dumps(scores, indent=1) + "\n")
        print(json.dumps(scores))
    if state.num_processes > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
