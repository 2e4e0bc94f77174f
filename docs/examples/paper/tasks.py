"""The paper's three data sets: where the rows are, and what of a row is prompt, response and answer.

`train.py` and `evaluate.py` read them by name, or local files with the same columns.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetGenerationError

Row = Mapping[str, Any]
IGNORED = -100
READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


class Task(NamedTuple):
    """One data set. `question`, `response` and `answer` name a column, or "column.field" of a nested one."""

    data: str  # the id on the hub
    question: str
    response: str  # what the model is trained to write
    answer: str  # what the evaluation looks for
    instruction: str  # before the question
    max_length: int  # tokens of prompt and response together
    new_tokens: int  # most that an evaluation lets the model write
    measures: tuple[str, ...]  # of scores.MEASURES


TASKS = {
    "math": Task(  # strong: NuminaMath-CoT
        "AI-MO/NuminaMath-CoT",
        "problem",
        "solution",
        "solution",
        "Please reason step by step, and put your final answer within \\boxed{}.",
        3072,
        3072,
        ("exact",),
    ),
    "medical": Task(  # intermediate: m23k
        "UCSC-VLAA/m23k-tokenized",
        "prompt",
        "distilled_answer_string",
        "answer_letter",
        "Answer the multiple-choice question. End with the letter of your choice within \\boxed{}.",
        3072,
        2048,
        ("choice",),
    ),
    "figfont": Task(  # weak: art in, word out
        "gaotang/figlet_font",
        "extra_info.question",
        "extra_info.answer",
        "extra_info.answer",
        "The following is a word in the letters of a FIGlet font. Write the word and nothing else.",
        800,
        16,
        ("word", "jaro_winkler"),
    ),
}


@contextmanager
def given(option: str) -> Iterator[None]:
    """Around the reading of what an option names: an error there ends the program and names the option."""
    try:
        yield
    except DatasetGenerationError as error:  # says no more than that there was an error; its cause says which
        raise SystemExit(f"{option}: {error.__cause__ or error}") from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"{option}: {error}") from error


@given("--out")
def refuse_out(folder: Path) -> None:
    """Results are written last: where they cannot be, the program ends before the work begins."""
    there = next(path for path in (folder, *folder.parents) if os.path.lexists(path))
    if not there.is_dir():
        raise ValueError(f"{there} is no folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"nothing can be written to {there}")


@given("--data")
def rows_of(task: Task, data: str | None, split: str, limit: int | None) -> Dataset:
    """The rows of the task's data set, of another id, or of a local file.

    Raises: SystemExit that names the file or id and the column, if one that the task needs is missing.
    """
    name = task.data if data is None else data
    path = Path(name)
    if path.suffix in READERS:
        if not path.is_file():
            raise ValueError(f"no file {name}")
        if not path.stat().st_size:  # which datasets answers with a bare StopIteration
            raise ValueError(f"{name} has no rows")
        rows = load_dataset(READERS[path.suffix], data_files=str(path), split="train")
    else:
        rows = load_dataset(name, split=split)
    if not len(rows):
        raise ValueError(f"{name} has no rows")
    for column in dict.fromkeys((task.question, task.response, task.answer)):
        if not isinstance(_value(rows[0], column), str):
            raise ValueError(f"{name} has no text in column {column}; it has {rows.column_names}")
    return rows if limit is None else rows.select(range(min(limit, len(rows))))


def _value(row: Row, column: str) -> Any:
    value: Any = row
    for part in column.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def text(row: Row, column: str) -> str:
    value = _value(row, column)
    if not isinstance(value, str):
        raise ValueError(f"a row has no text in column {column}: {row!r:.200}")
    return value


def prompt_of(task: Task, row: Row, tokenizer: Any) -> str:
    """The question as the model sees it: by the tokenizer's chat template, where it has one."""
    question = f"{text(row, task.question)}\n\n{task.instruction}"
    if tokenizer.chat_template is None:
        return question + "\n\n"
    turns = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def tokens_of(tokenizer: Any, prompt: str) -> list[int]:
    # A chat template writes the special tokens itself; without one the tokenizer adds what it begins with.
    return tokenizer(prompt, add_special_tokens=tokenizer.chat_template is None)["input_ids"]


def encoder(task: Task, tokenizer: Any, max_length: int) -> Callable[[Row], dict[str, Any]]:
    """Maps a row to input_ids and labels; the response and the end token are learned, not the prompt."""

    def encode(row: Row) -> dict[str, Any]:
        prompt = tokens_of(tokenizer, prompt_of(task, row, tokenizer))
        response = tokenizer(text(row, task.response), add_special_tokens=False)["input_ids"]
        response = [*response, tokenizer.eos_token_id]
        ids = (prompt + response)[:max_length]
        labels = ([IGNORED] * len(prompt) + response)[:max_length]
        return {"input_ids": ids, "labels": labels, "cut": len(prompt) + len(response) > max_length}

    return encode


def encoded(task: Task, rows: Dataset, tokenizer: Any, max_length: int) -> tuple[Dataset, str]:
    """The rows as tokens, and what became of long ones: cut, or left out if no response is left."""
    with given("--data"):
        made = rows.map(encoder(task, tokenizer, max_length), remove_columns=rows.column_names, desc="tokens")
    kept = made.filter(lambda row: any(label != IGNORED for label in row["labels"]), desc="rows to learn")
    if not len(kept):
        raise SystemExit(f"--max-length: no response begins within {max_length} tokens")
    cut = sum(kept["cut"])
    report = f"{len(kept)} rows, {cut} of them cut at {max_length} tokens; {len(made) - len(kept)} left out"
    return kept.remove_columns("cut"), report


@given("--model")
def tokenizer_of(name: str, padding_side: str) -> Any:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(name, padding_side=padding_side)
    if tokenizer.eos_token_id is None:
        raise ValueError(f"the tokenizer of {name} has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer
