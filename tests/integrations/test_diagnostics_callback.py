"""A recorder beside the statistics that a trainer logs."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from documents import execute
from routes import ROUTES, prepared
from sampling import first_of
from tiny import batch, examples, llama, losses, trainer

from deft_kernels import row_statistics
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.integrations.callback import RecordingCallback, StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics


def statistics_of(run) -> RunningStatistics:
    (found,) = (c for c in run.callback_handler.callbacks if isinstance(c, StatisticsCallback))
    return found.statistics


@pytest.mark.parametrize("route", ROUTES)
def test_a_trainers_tokens_are_recorded(route, tmp_path):
    """Three steps of two batches each, evaluated in between: training's tokens by the trainer's steps."""
    run = prepared(
        route, tmp_path, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    path = tmp_path / "run.npz"
    run.add_callback(RecordingCallback(statistics_of(run), Recorder(slots=8), path))
    model, rows = llama(), batch()
    run.train()
    found = Recording.load(path)
    step, nll, _ = found.over_time("nll")
    assert step.tolist() == [0, 1, 2] and found.gate_of == "the loss"
    assert nll == pytest.approx(losses(run, "nll"), rel=1e-5)
    for name in ("alpha", "gate"):
        assert found.over_time(name)[1] == pytest.approx(losses(run, f"mean_{name}"), rel=1e-5)
    counted = sum(int((row["labels"][1:] != -100).sum()) for row in examples(24))
    assert found.count == counted

    # The first step's tokens are those of the model before it.
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    expected = row_statistics(logits[:, :-1], rows["labels"][:, 1:])
    first = found.token("step") == 0
    of_labels = expected.logp[rows["labels"][:, 1:] != -100]
    np.testing.assert_allclose(np.sort(found.token("logp")[first]), np.sort(of_labels), rtol=1e-4)
    assert statistics_of(run).watchers == []


def test_saved_with_each_checkpoint_and_trained_again(tmp_path):
    run = prepared("compute_loss_func", tmp_path, save_strategy="steps", save_steps=2)
    path, recorder = tmp_path / "run.npz", Recorder()
    seen = []

    class Look(RecordingCallback):
        def on_save(self, *arguments, **keywords):
            super().on_save(*arguments, **keywords)
            seen.append(Recording.load(path).count)

    run.add_callback(Look(statistics_of(run), recorder, path))
    run.train()
    assert len(seen) >= 2 and 0 < seen[0] < seen[-1]
    whole = seen[-1]
    run.train()
    assert Recording.load(path).count == 2 * whole


def test_what_is_no_recorder_is_refused(tmp_path):
    with pytest.raises(TypeError, match="statistics: expected a RunningStatistics, got dict"):
        RecordingCallback({}, Recorder(), tmp_path / "run.npz")
    with pytest.raises(TypeError, match="recorder: expected a Recorder, got str"):
        RecordingCallback(RunningStatistics(), "run.npz", tmp_path / "run.npz")


def test_the_pages_block(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = trainer(tmp_path, llama())
    execute("docs/diagnostics.md", 2, {"trainer": run, "Recorder": Recorder})
    run.train()
    assert Recording.load("trained.npz").mean("nll") == pytest.approx(np.mean(losses(run, "nll")), rel=0.2)


@pytest.mark.parametrize("route", first_of(ROUTES))
def test_torch_compile(route, tmp_path, pytestconfig):
    """The recorder counts on the host, outside of the graph."""
    settings = {"torch_compile": True, "torch_compile_backend": pytestconfig.getoption("compile_backend")}
    run = prepared(route, tmp_path, llama(num_hidden_layers=1), **settings)
    run.add_callback(RecordingCallback(statistics_of(run), Recorder(), tmp_path / "run.npz"))
    run.train()
    step, nll, _ = Recording.load(tmp_path / "run.npz").over_time("nll")
    assert step.tolist() == [0, 1, 2]
    assert nll == pytest.approx(losses(run, "nll"), rel=1e-5)


def recorded_by_two_ranks():
    rank = str(dist.get_rank())
    os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # not used, the group is there
    folder = [tempfile.mkdtemp()] if dist.get_rank() == 0 else [None]
    dist.broadcast_object_list(folder)
    path = Path(folder[0]) / "run.npz"
    settings = {"per_device_train_batch_size": 4, "ddp_backend": "gloo"}
    run = prepared("compute_loss_func", Path(folder[0]), **settings)
    run.add_callback(RecordingCallback(statistics_of(run), Recorder(), path))
    run.train()
    dist.barrier()
    found = Recording.load(path)
    assert found.over_time("nll")[1] == pytest.approx(losses(run, "nll"), rel=1e-5)
    assert found.count == sum(int((row["labels"][1:] != -100).sum()) for row in examples(24))
    assert len(set(found.token("id"))) == found.count


def test_two_ranks():
    outcomes = ranks.run([recorded_by_two_ranks], ranks=2, gpus=False)
    assert outcomes["recorded_by_two_ranks"] == ["passed"] * 2, "\n".join(outcomes["recorded_by_two_ranks"])


def test_a_path_that_cannot_be_written_is_found_before_training(tmp_path):
    run = prepared("compute_loss_func", tmp_path, max_steps=1)
    path = tmp_path / "not" / "there" / "run.npz"
    run.add_callback(RecordingCallback(statistics_of(run), Recorder(), path))
    run.train()
    assert Recording.load(path).count > 0
    with pytest.raises(ValueError, match="^path: .* is a folder"):
        RecordingCallback(statistics_of(run), Recorder(), tmp_path)
    with pytest.raises(ValueError, match="^seed: "):
        Recorder(seed=2**70)


def test_a_resumed_run_does_not_overwrite_what_was_recorded(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
    path = tmp_path / "run.npz"

    def start(where: Path):
        run = prepared("compute_loss_func", tmp_path, **settings)
        run.add_callback(RecordingCallback(statistics_of(run), Recorder(), where))
        return run

    start(path).train()
    before, checkpoint = path.read_bytes(), str(tmp_path / "checkpoint-1")
    with pytest.raises(ValueError, match=r"^path: .*run\.npz has what was recorded before"):
        start(path).train(resume_from_checkpoint=checkpoint)
    assert path.read_bytes() == before
    start(tmp_path / "rest.npz").train(resume_from_checkpoint=checkpoint)
    assert Recording.load(tmp_path / "rest.npz").over_time("nll")[0].tolist() == [1]
