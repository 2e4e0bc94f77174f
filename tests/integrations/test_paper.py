"""docs/examples/paper: train and evaluate, by the commands on docs/paper.md, all tiny."""

from __future__ import annotations

import json
import os
import re
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from documents import ROOT, commands
from pages import two_ranks
from tiny import SIZES
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from deft_kernels import objectives, reference

FOLDER = ROOT / "docs" / "examples" / "paper"
WORDS = ["sun", "moon", "rain", "wind"]
ART = {"sun": "(*)\n|_|", "moon": "( )\n\\_/", "rain": "' '\n, ,", "wind": "~~~\n ~~"}
ROWS: dict[str, list[dict[str, Any]]] = {
    "math": [
        {"source": "t", "problem": f"{a} + {a}?", "solution": f"It is $\\boxed{{{2 * a}}}$.", "messages": []}
        for a in range(8)
    ],
    "medical": [
        {
            "prompt": f"Which? A. {a} B. {b}",
            "reasoning": "r",
            "distilled_answer_string": f"Answer: {a}.",
            "answer_letter": "A",
        }
        for a in WORDS
        for b in WORDS
        if a != b
    ][:8],
    "figfont": [
        {"extra_info": {"question": ART[w], "answer": w, "index": i}} for i, w in enumerate(2 * WORDS)
    ],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a tokenizer trained here, and a file of 8 rows for each task."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("paper")
    for task, rows in ROWS.items():
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([json.dumps(rows) for rows in ROWS.values()], trainer)
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    whole.chat_template = "{% for m in messages %}<s>{{ m['content'] }}\n{% endfor %}"
    whole.save_pretrained(folder / "model")
    torch.manual_seed(0)
    sizes = {**SIZES, "vocab_size": len(whole), "hidden_size": 32, "initializer_range": 0.1}
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    return folder


class Scripts:
    """The scripts, in this process or as two."""

    def __init__(self, files: Path, monkeypatch: pytest.MonkeyPatch):
        self.files, self.monkeypatch = files, monkeypatch
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
        monkeypatch.syspath_prepend(str(FOLDER))

    def run(self, script: str, *arguments: object, two: bool = False) -> None:
        words = [str(FOLDER / script), *map(str, arguments)]
        if two:
            two_ranks(*words)
            return
        self.monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(words[0], run_name="__main__")

    def train(self, task: str, out: Path, *more: object, two: bool = False) -> Any:
        data = ("--data", self.files / f"{task}.jsonl", "--batch", 8, "--fp32")
        self.run("train.py", task, "--model", self.files / "model", "--out", out, *data, *more, two=two)
        return json.loads((out / "run.json").read_text())


@pytest.fixture
def scripts(files: Path, monkeypatch: pytest.MonkeyPatch) -> Scripts:
    return Scripts(files, monkeypatch)


def losses(record: Any) -> list[float]:
    return [entry["loss"] for entry in record["log"] if "loss" in entry]


def test_first_loss_is_the_oracles_and_two_processes_agree(scripts: Scripts, tmp_path: Path) -> None:
    """8 rows a step, 2 at once, by one process or two. Evaluation by one and by two reads the same."""
    settings = ("--micro-batch", 2, "--epochs", 3, "--objective", "tsallis(0.5)", "--learning-rate", 1e-3)
    alone = scripts.train("math", tmp_path / "one", *settings)
    both = scripts.train("math", tmp_path / "two", *settings, two=True)
    assert (alone["processes"], both["processes"]) == (1, 2)
    assert len(losses(alone)) == 3
    assert losses(both) == pytest.approx(losses(alone), rel=1e-5)
    assert losses(alone)[0] == pytest.approx(
        by_hand(scripts.files, "math", objectives.tsallis(0.5)), rel=1e-4
    )
    assert "nll" in alone["log"][0] and "mean_gate" in alone["log"][0]
    data = ("--data", scripts.files / "math.jsonl", "--new-tokens", 8, "--batch", 3, "--fp32")
    for name in ("one", "two"):
        where = ("--model", tmp_path / "one", "--out", tmp_path / name)
        scripts.run("evaluate.py", "math", *where, *data, two=name == "two")
    one, two = ((tmp_path / name / "math-answers.jsonl").read_text() for name in ("one", "two"))
    assert [json.loads(line)["row"] for line in one.splitlines()] == list(range(8))
    assert one == two


def by_hand(files: Path, task: str, objective: Any) -> float:
    """The float64 reference on the model's logits, the rows encoded again here."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(files / "model")
    model = AutoModelForCausalLM.from_pretrained(files / "model", dtype=torch.float64)
    logits, labels = [], []
    for row in ROWS[task]:
        question = (
            row["problem"] + "\n\nPlease reason step by step, and put your final answer within \\boxed{}."
        )
        prompt = tokenizer(f"<s>{question}\n", add_special_tokens=False)["input_ids"]
        response = [
            *tokenizer(row["solution"], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        with torch.no_grad():
            found = model(torch.tensor([prompt + response])).logits[0]
        logits.append(found[len(prompt) - 1 : -1].double())
        labels += response
    return float(reference.loss(torch.cat(logits), torch.tensor(labels), objective=objective)[0])


def test_a_model_that_learned_its_rows_is_scored_so(scripts: Scripts, tmp_path: Path) -> None:
    more = ("--micro-batch", 8, "--epochs", 60, "--learning-rate", 1e-2, "--objective", "deft(order=1)")
    record = scripts.train("figfont", tmp_path / "learned", *more)
    assert losses(record)[-1] < 0.1 * losses(record)[0]
    found = {}
    for name, model in (("learned", tmp_path / "learned"), ("fresh", scripts.files / "model")):
        data = ("--data", scripts.files / "figfont.jsonl", "--out", tmp_path / name)
        scripts.run("evaluate.py", "figfont", "--model", model, *data, "--fp32")
        found[name] = json.loads((tmp_path / name / "figfont-scores.json").read_text())
    assert found["learned"]["rows"] == 8
    assert found["learned"]["word"] == found["learned"]["jaro_winkler"] == 1
    assert found["fresh"]["word"] == 0 and found["fresh"]["jaro_winkler"] < 1


BAD = {  # files that are no rows of math
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "empty.csv": "",
    "empty.parquet": "",
    "broken.jsonl": "{broken",
    "hole.jsonl": json.dumps(ROWS["math"][0]) + "\n" + json.dumps({**ROWS["math"][1], "solution": None}),
    "no_box.jsonl": json.dumps({"problem": "1?", "solution": "1"}),
}


@pytest.mark.parametrize(
    "command, named",
    [
        (
            "train.py figfont --model M --out O --data math.jsonl",
            "--data: {}/math.jsonl has no text in column",
        ),
        ("train.py math --model M --out O --data none.jsonl", "--data: no file none.jsonl"),
        ("train.py math --model M --out O --data empty.jsonl", "--data: {}/empty.jsonl has no rows"),
        ("train.py math --model M --out O --data empty.csv", "--data: {}/empty.csv has no rows"),
        ("train.py math --model M --out O --data empty.parquet", "--data: {}/empty.parquet has no rows"),
        ("train.py math --model M --out O --data blank.jsonl", "--data: "),
        ("train.py math --model M --out O --data broken.jsonl", "--data: JSON parse error"),
        ("train.py math --model M --out O --data hole.jsonl", "--data: a row has no text in column solution"),
        ("train.py math --model M --out O --data no/such", "--data: "),
        ("train.py math --model none --out O --data math.jsonl", "--model: "),
        ("train.py math --model M --out O --data math.jsonl --max-length 2", "--max-length: no response"),
        ("train.py math --model M --out O --batch 9", "--batch: 9"),
        ("train.py math --model M --out O --seed -1", "--seed: -1 is not in"),
        ("train.py math --model M --out O --seed 4294967296", "--seed: 4294967296 is not in"),
        ("train.py math --model M --out O --weight-decay -1", "--weight-decay: -1.0 is no"),
        ("train.py math --model M --out O --weight-decay nan", "--weight-decay: nan is no"),
        ("train.py math --model M --out O --objective focal", "--objective: 'focal'"),
        ("train.py math --model M --out math.jsonl", "--out: {}/math.jsonl is no folder"),
        ("evaluate.py math --model M", "--data: math was trained on"),
        ("evaluate.py math --model M --data x --temperature 2", "--temperature:"),
        ("evaluate.py math --model M --out O --data none.jsonl", "--data: no file none.jsonl"),
        ("evaluate.py medical --model M --out O --data math.jsonl", "--data: {}/math.jsonl has no text"),
        ("evaluate.py math --model M --out O --data hole.jsonl", "--data: row 1: a row has no text"),
        ("evaluate.py math --model M --out O --data no_box.jsonl", "--data: row 0: the reference"),
        ("evaluate.py math --model none --out O --data math.jsonl", "--model: "),
        ("evaluate.py math --model W --out O --data math.jsonl", "--model: "),
        ("evaluate.py math --model M --out math.jsonl --data x", "--out: {}/math.jsonl is no folder"),
    ],
)
def test_what_is_refused(
    command: str, named: str, scripts: Scripts, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By a message, before a model is trained or asked; what only the end needs, before rows are read."""
    files = scripts.files
    for name, content in BAD.items():
        (files / name).write_text(content)
    given = {"M": files / "model", "O": tmp_path / "out", "W": without_weights(files, tmp_path)}
    given |= {path.name: path for path in files.iterdir() if path.is_file()}
    script, *arguments = command.split()
    if "--out:" in named:
        scripts.monkeypatch.setattr("datasets.load_dataset", unreachable)
        scripts.monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", unreachable)
    scripts.monkeypatch.setattr("transformers.Trainer.train", unreachable)
    scripts.monkeypatch.setattr("transformers.GenerationMixin.generate", unreachable)
    with pytest.raises(SystemExit) as raised:
        scripts.run(script, *(given.get(argument, argument) for argument in arguments))
    assert raised.value.code
    assert named.format(files) in str(raised.value) + capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def unreachable(*arguments: object, **keywords: object) -> None:
    raise AssertionError("the work has begun")


def without_weights(files: Path, folder: Path) -> Path:
    """The model's tokenizer and configuration alone."""
    found = folder / "no_weights"
    shutil.copytree(files / "model", found, ignore=shutil.ignore_patterns("*.safetensors"))
    return found


@pytest.mark.parametrize("out", ["file/below", "link", "shut", "shut/below/it"])
def test_where_nothing_can_be_written(out: str, scripts: Scripts, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "shut").mkdir()
    # Asked of the system, as the tests may run as root, who writes everywhere.
    scripts.monkeypatch.setattr(os, "access", lambda path, mode: path != tmp_path / "shut")
    for script in ("train.py", "evaluate.py"):
        with pytest.raises(SystemExit, match=f"--out: .*{out.split('/')[0]}"):
            scripts.run(script, "math", "--model", "M", "--out", tmp_path / out, "--data", "none.jsonl")


LINES = [line for line in commands("docs/paper.md") if "paper/" in line]


@pytest.mark.parametrize("line", LINES, ids=[" ".join(shlex.split(line)[-6:]) for line in LINES])
def test_commands_of_the_page(line: str, scripts: Scripts, tmp_path: Path) -> None:
    """Each as it stands, but for the model, the rows, their number and what needs several GPUs."""
    words = shlex.split(line)
    at = next(i for i, word in enumerate(words) if word.endswith(("train.py", "evaluate.py")))
    if words[0] == "accelerate":
        accepted_by_accelerate(words[1:])
    script, task, *options = words[at:]
    files = scripts.files
    given = dict(zip(options[::2], options[1::2], strict=True))
    given |= {"--model": str(files / "model"), "--out": str(tmp_path), "--data": str(files / f"{task}.jsonl")}
    if script.endswith("train.py"):
        given |= {"--batch": "8"}
    else:
        given |= {"--new-tokens": "8"}
    scripts.run(Path(script).name, task, *(word for pair in given.items() for word in pair), "--fp32")
    assert list(tmp_path.glob("run.json" if script.endswith("train.py") else f"{task}-scores.json"))


def accepted_by_accelerate(words: list[str]) -> None:
    """Its own parser and checks take the line and its file; FSDP2 itself it starts on GPUs only."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    args = launch_command_parser().parse_args(words[1:])
    args, *_ = _validate_launch_command(args)
    if "fsdp2.yaml" in " ".join(words):
        assert args.use_fsdp and int(args.fsdp_version) == 2 and args.mixed_precision == "bf16"


def test_the_page_has_commands_for_all_tasks() -> None:
    assert {re.search(r"\.py (\w+)", line)[1] for line in LINES} == set(ROWS)  # type: ignore[index]
