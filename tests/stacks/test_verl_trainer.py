"""verl's own SFT trainers from their own configuration, on the CPU that `verl_cpu.py` gives them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas
import pytest
import torch
from files import ALPACA, model_in, save
from omegaconf import OmegaConf
from pages import blocks
from safetensors.torch import load_file
from transformers import AutoTokenizer
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl_cpu import ENVIRONMENT
from verl_runs import overrides

from deft_kernels import objectives, reference

HERE = Path(__file__).resolve().parent
TEMPLATE = (
    "{% for message in messages %}{{ bos_token + ' ' + message['content'] + ' ' + eos_token }}{% endfor %}"
)
(FLAG,) = (line.strip() for line in blocks("verl", "text"))
EAFT, DFT = "model.external_lib=objective_eaft", "model.external_lib=objective_dft"
PACKED = "model.override_config.attn_implementation=packed_cpu"
# fp32 sums in another order: the differences seen are 1 to 2 units in the last place, 2.4e-7.
SAME = {"rtol": 1e-6, "atol": 1e-6}

ONE_RANK = {
    "plain": [],
    "whole": [FLAG, "data.val_files=${data.train_files}", "trainer.test_freq=1"],
    "parts": [FLAG, "data.micro_batch_size_per_gpu=2"],
    "dynamic": [FLAG, "data.use_dynamic_bsz=True", "data.max_token_len_per_gpu=30"],
    "padded": [FLAG, "data.micro_batch_size_per_gpu=2", "model.use_remove_padding=False"],
    "fsdp": [FLAG, "data.micro_batch_size_per_gpu=2", "engine.strategy=fsdp"],
    "lora": [FLAG, "data.micro_batch_size_per_gpu=2", "model.lora_rank=4"],
    "bf16": [FLAG, "engine.mixed_precision={param_dtype:bf16}"],
    "eaft": [EAFT],
    "eaft padded": [EAFT, "data.micro_batch_size_per_gpu=2", "model.use_remove_padding=False"],
    "mtp": [FLAG, "model.mtp.enable=True", "model.mtp.enable_train=True"],
    "right": [FLAG, "data.pad_mode=right"],
    # Last, as verl's fused kernels stay in the model's class. They take no weight that fsdp2 has sharded.
    "fused": [FLAG, "model.use_fused_kernels=True"],
    "dft fused": [DFT, "model.use_fused_kernels=True", "engine.strategy=fsdp"],
}
TWO_RANKS = {
    "two": [FLAG, "data.micro_batch_size_per_gpu=4"],
    "two parts": [FLAG, "data.micro_batch_size_per_gpu=1"],
    "ulysses": [FLAG, PACKED, "engine.ulysses_sequence_parallel_size=2"],
    "ulysses parts": [
        FLAG,
        PACKED,
        "engine.ulysses_sequence_parallel_size=2",
        "data.micro_batch_size_per_gpu=2",
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    chats = [
        [{"role": "user", "content": row["instruction"]}, {"role": "assistant", "content": row["output"]}]
        for row in ALPACA
    ]
    pandas.DataFrame({"messages": chats}).to_parquet(folder / "data" / "train.parquet")
    (eaft,) = blocks("verl")
    (folder / "objective_eaft.py").write_text(eaft)
    (folder / "objective_dft.py").write_text(eaft.replace("eaft", "dft"))
    return folder


def execute(command, folder, **variables):
    paths = [str(HERE), str(HERE.parent / "integrations"), str(folder), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": os.pathsep.join(paths), **variables}
    run = subprocess.run(
        [sys.executable, *map(str, command)],
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-5000:]


def outcome(output, name):
    """What a run logged, step by step, and what it raised; its parameters are read when asked for."""
    path = output / f"{name}.jsonl"
    entries = [json.loads(line)["data"] for line in path.read_text().splitlines()] if path.exists() else []
    error = output / f"{name}.error"
    return SimpleNamespace(
        log=[entry for entry in entries if "train/loss" in entry],
        losses=[entry["train/loss"] for entry in entries if "train/loss" in entry],
        val=[entry["val/loss"] for entry in entries if "val/loss" in entry],
        error=error.read_text() if error.exists() else "",
        parameters=lambda: load_file(output / name / "global_step_3" / "huggingface" / "model.safetensors"),
    )


def trained(folder, output, ranks, runs):
    output.mkdir()
    settings = {name: overrides(folder, output / name) + own for name, own in runs.items()}
    (output / "runs.json").write_text(json.dumps(settings))
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    execute([*launch, HERE / "verl_runs.py", output], folder)
    return {name: outcome(output, name) for name in runs}


@pytest.fixture(scope="module")
def runs(folder, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    return {**trained(folder, output / "1", 1, ONE_RANK), **trained(folder, output / "2", 2, TWO_RANKS)}


@pytest.fixture(scope="module")
def rows(folder):
    """The samples that verl's own dataset makes: token ids and which of them the loss counts."""
    config = OmegaConf.create({"pad_mode": "no_padding"})
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    dataset = MultiTurnSFTDataset(str(folder / "data" / "train.parquet"), tokenizer, config)
    samples = [dataset[i] for i in range(len(dataset))]
    counts = {int(sample["loss_mask"].sum()) for sample in samples}
    assert len(samples) == 8 and len(counts) > 1 and not any(s["loss_mask"][0] for s in samples)
    return samples


def logits_and_labels(model, rows):
    logits, labels = [], []
    for row in rows:
        ids, mask = row["input_ids"], row["loss_mask"]
        with torch.no_grad():
            logits.append(model(input_ids=ids[None]).logits[0, :-1].double())
        labels.append(ids[1:].masked_fill(mask[1:] == 0, -100))
    return torch.cat(logits), torch.cat(labels)


def expected(model, rows, objective="deft"):
    """The float64 reference on the model's own logits, each sample by itself."""
    return float(reference.loss(*logits_and_labels(model, rows), objective=objectives.resolve(objective))[0])


def test_the_command_line_with_the_flag_trains_the_gated_loss(folder, tmp_path, rows):
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    settings = [*overrides(folder, tmp_path / "model"), f"hydra.run.dir={tmp_path}", FLAG]
    log = tmp_path / "cli.jsonl"
    execute([*launch, "-m", "verl.trainer.sft_trainer", *settings], folder, VERL_FILE_LOGGER_PATH=str(log))
    run = outcome(tmp_path, "cli")
    assert run.losses[0] == pytest.approx(expected(model_in(folder), rows), rel=1e-6)
    assert len(run.losses) == 3 and run.losses[2] < run.losses[1] < run.losses[0]


def test_without_the_flag_it_is_plain_cross_entropy_which_the_flag_logs_beside(folder, runs, rows):
    model = model_in(folder)
    nll = expected(model, rows, "nll")
    assert runs["plain"].losses[0] == pytest.approx(nll, rel=1e-6)
    assert runs["whole"].losses[0] == pytest.approx(expected(model, rows), rel=1e-6)
    assert runs["whole"].losses[0] < 0.9 * nll
    assert not any(name.startswith("train/mean") for name in runs["plain"].log[0])
    logits, labels = logits_and_labels(model, rows)
    p = logits[labels != -100].softmax(-1)
    alpha = p.square().sum(-1)
    gate = p.gather(-1, labels[labels != -100][:, None])[:, 0] ** alpha
    for name in ("whole", "parts", "dynamic", "padded", "fsdp", "two", "two parts", "ulysses parts"):
        entry = runs[name].log[0]
        seen = [entry["train/nll"], entry["train/mean_alpha"], entry["train/mean_gate"]]
        assert seen == pytest.approx([nll, float(alpha.mean()), float(gate.mean())], rel=1e-6), name


@pytest.mark.parametrize(
    "name", ["parts", "dynamic", "padded", "fsdp", "two", "two parts", "ulysses", "ulysses parts"]
)
def test_8_is_4_times_2_and_2_ranks_are_1(runs, name):
    assert not runs[name].error
    assert len(runs["whole"].losses) == 3
    assert runs[name].losses == pytest.approx(runs["whole"].losses, rel=1e-6)
    torch.testing.assert_close(runs[name].parameters(), runs["whole"].parameters(), **SAME)


def test_the_step_is_the_references(folder, runs, rows):
    """The parameters after the first step, by way of the second step's loss."""
    model = model_in(folder)
    logits, labels = [], []
    for row in rows:
        logits.append(model(input_ids=row["input_ids"][None]).logits[0, :-1])
        labels.append(row["input_ids"][1:].masked_fill(row["loss_mask"][1:] == 0, -100))
    reference.loss(torch.cat(logits).double(), torch.cat(labels), objective=objectives.resolve("deft"))[
        0
    ].backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert runs["whole"].losses[1] == pytest.approx(expected(model, rows), rel=1e-6)


def test_evaluation_is_of_the_gated_loss(runs):
    """After each step, on the same samples: the next step's loss."""
    assert runs["whole"].val[:2] == pytest.approx(runs["whole"].losses[1:], rel=1e-6)


def test_lora(folder, runs, rows):
    run = runs["lora"]
    assert not run.error
    assert run.losses[0] == pytest.approx(expected(model_in(folder), rows), rel=1e-6)
    assert run.losses[2] < run.losses[1] < run.losses[0]
    assert run.losses[1] != pytest.approx(runs["whole"].losses[1], rel=1e-3)


def test_the_default_precision(folder, runs, rows):
    """bf16 rounds logits and log-probabilities by 2^-9 of themselves; seen in the loss: 1.2e-3."""
    model = model_in(folder).bfloat16()
    assert runs["bf16"].losses[0] == pytest.approx(expected(model, rows), rel=2**-8)


def test_the_page_s_own_module_trains_another_objective(folder, runs, rows):
    for name in ("eaft", "eaft padded"):
        assert not runs[name].error
        assert runs[name].losses[0] == pytest.approx(expected(model_in(folder), rows, "eaft"), rel=1e-6)
    torch.testing.assert_close(runs["eaft"].parameters(), runs["eaft padded"].parameters(), **SAME)


def test_an_objective_of_p_alone_takes_the_fused_kernels(folder, runs, rows):
    assert not runs["dft fused"].error
    assert runs["dft fused"].losses[0] == pytest.approx(expected(model_in(folder), rows, "dft"), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fused", "ValueError: use_fused_kernels"),
        ("mtp", "ValueError: model.mtp.enable_train"),
        ("right", "pad_mode right not supported"),  # verl's own
    ],
)
def test_what_cannot_be_honoured_raises_before_a_step(runs, name, message):
    assert message in runs[name].error
    assert runs[name].losses == []


def test_the_ray_trainer_s_workers_have_the_driver_s_objective(folder, runs, tmp_path):
    ranks = ["trainer.n_gpus_per_node=2", "data.micro_batch_size_per_gpu=2"]
    settings = [*overrides(folder, tmp_path / "ray"), f"hydra.run.dir={tmp_path}", EAFT, *ranks]
    log = tmp_path / "ray.jsonl"
    execute(["-m", "verl.trainer.sft_trainer_ray", *settings], folder, VERL_FILE_LOGGER_PATH=str(log))
    run = outcome(tmp_path, "ray")
    assert len(run.losses) == 3
    for name in ("train/loss", "train/nll", "train/mean_gate"):
        logged = [[entry[name] for entry in logs] for logs in (run.log, runs["eaft"].log)]
        assert logged[0] == pytest.approx(logged[1], rel=1e-6)
    torch.testing.assert_close(run.parameters(), runs["eaft"].parameters(), **SAME)
