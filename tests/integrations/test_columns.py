"""Columns of the data set on their way through transformers' trainers: channels are logged, weights train."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from routes import ROUTES
from sampling import first_of
from test_trl import trained_tokenizer
from tiny import T, arguments, batch, examples, llama, losses, oracle, parameters, trainer
from torch import Tensor
from transformers import DataCollatorForSeq2Seq, Trainer

from deft_kernels import objectives, reference
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import RecordingCallback, StatisticsCallback
from deft_kernels.integrations.columns import Columns
from deft_kernels.integrations.running import RunningStatistics

NAMES = ("code", "mathematics")


def both() -> Columns:
    return Columns(channel="domain", channels=NAMES, token_weight="trust")


def rows(n: int = 32, of_tokens: bool = True) -> list[dict]:
    """The examples, each third of them mathematics; by tokens, the other channel for its odd ones."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for i, row in enumerate(examples(n)):
        own = int(i % 3 == 0)
        channel = [(own + t) % 2 for t in range(T)] if of_tokens else NAMES[own]
        trust = torch.rand(T, generator=generator) + 0.5
        found.append({**row, "domain": channel, "trust": trust if of_tokens else float(trust[0])})
    return found


def stacked(found: list[dict]) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """(batch, channel, weight) of the rows, by tokens."""
    plain = {
        name: torch.stack([row[name] for row in found]) for name in ("input_ids", "attention_mask", "labels")
    }
    channels, weights = [], []
    for row in found:
        domain = row["domain"] if isinstance(row["domain"], list) else [NAMES.index(row["domain"])] * T
        channels.append(torch.tensor(domain))
        weights.append(torch.as_tensor(row["trust"]).expand(T))
    return plain, torch.stack(channels), torch.stack(weights)


def expected(model, found, objective="deft") -> tuple[float, dict[str, float]]:
    """The oracle's weighted loss on the model's own logits, and the means by channel."""
    plain, channel, weight = stacked(found)
    model.eval()
    with torch.no_grad():
        inputs = {name: plain[name] for name in ("input_ids", "attention_mask")}
        logits = model(**inputs).logits[:, :-1].double()
        labels = plain["labels"][:, 1:]
        described = objectives.resolve(objective)
        loss, stats = reference.loss(logits, labels, objective=described, token_weight=weight[:, 1:].double())
    means = {}
    for number, name in enumerate(NAMES):
        own = (labels != -100) & (channel[:, 1:] == number)
        means[f"nll/{name}"] = float(-stats["logp"][own].mean())
        means[f"mean_alpha/{name}"] = float(stats["alpha"][own].mean())
        means[f"mean_gate/{name}"] = float(stats["gate"][own].mean())
        means[f"mean_entropy/{name}"] = float(stats["entropy"][own].mean())
        top1 = logits.argmax(-1) == labels
        means[f"top1/{name}"] = float(top1[own].double().mean())
    return float(loss), means


def prepared(route, folder, columns, found, model=None, collator=None, evaluated=None, **settings):
    model = llama() if model is None else model
    statistics = RunningStatistics(columns.channels)
    if route == "loss_function":
        integration.set_loss_function(model, statistics=statistics, columns=columns)
    elif route == "patch_model":
        integration.patch_model(model, statistics=statistics, columns=columns)
    run = Trainer(
        model=model,
        args=arguments(folder, **settings),
        train_dataset=found,
        eval_dataset=found[:8] if evaluated is None else evaluated,
        data_collator=collator,
    )
    if route == "compute_loss_func":
        integration.apply(run, columns=columns)
    else:
        columns.attach(run)
        StatisticsCallback(statistics).add_to(run)
    return run


@pytest.mark.parametrize("of_tokens", [True, False], ids=["tokens", "samples"])
@pytest.mark.parametrize("route", ROUTES)
def test_the_first_loss_is_the_oracles(route, of_tokens, tmp_path):
    loss, means = expected(llama(), rows(of_tokens=of_tokens)[:8])
    run = prepared(route, tmp_path, both(), rows(of_tokens=of_tokens))
    run.train()
    assert losses(run)[0] == pytest.approx(loss, rel=1e-5)
    logged = next(entry for entry in run.state.log_history if "loss" in entry)
    assert {name: logged[name] for name in means} == pytest.approx(means, rel=1e-5)
    assert logged["nll"] == pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)
    assert loss != pytest.approx(oracle(llama(), batch()), rel=1e-3), "the weights would change nothing"


@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_of_8_is_4_of_2_accumulated(route, tmp_path):
    whole = prepared(route, tmp_path, both(), rows())
    whole.train()
    parts = prepared(
        route, tmp_path, both(), rows(), per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    parts.train()
    for name in ("loss", "nll/code", "mean_gate/mathematics", "top1/code"):
        assert losses(whole, name) == pytest.approx(losses(parts, name), rel=1e-5), name
    end = parameters(parts.model)
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, end[name])


@pytest.mark.parametrize("route", ROUTES)
def test_evaluation(route, tmp_path):
    loss, means = expected(llama(), rows()[:8])
    run = prepared(route, tmp_path, both(), rows())
    metrics = run.evaluate()
    if route == "patch_model":  # evaluates by the model's own loss
        assert metrics["eval_loss"] == pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)
        return
    assert metrics["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert {name: metrics[f"eval_{name}"] for name in means} == pytest.approx(means, rel=1e-5)


@pytest.mark.parametrize("route", first_of(ROUTES))
def test_torch_compile(route, tmp_path, pytestconfig):
    settings = {"torch_compile": True, "torch_compile_backend": pytestconfig.getoption("compile_backend")}
    eager = prepared(route, tmp_path, both(), rows(), llama(num_hidden_layers=1))
    compiled = prepared(route, tmp_path, both(), rows(), llama(num_hidden_layers=1), **settings)
    eager.train(), compiled.train()
    for name in ("loss", "nll/code", "mean_gate/mathematics"):
        assert losses(compiled, name) == pytest.approx(losses(eager, name), rel=1e-5), name


def test_lora_and_workers(tmp_path):
    """The adapter's wrapper has a forward of its own, and batches are made in another process."""
    import peft

    config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    loss, means = expected(model, rows()[:8])
    run = prepared("patch_model", tmp_path, both(), rows(), model, dataloader_num_workers=1)
    run.train()
    assert losses(run)[0] == pytest.approx(loss, rel=1e-5)
    assert losses(run, "nll/code")[0] == pytest.approx(means["nll/code"], rel=1e-5)


def test_a_dataset_of_hugging_face(tmp_path):
    """Its other columns are removed as before; numbers of channels, and numpy's."""
    from datasets import Dataset

    found = [
        {**{k: v.tolist() if isinstance(v, Tensor) else v for k, v in row.items()}, "note": "text"}
        for row in rows()
    ]
    run = prepared("compute_loss_func", tmp_path, both(), Dataset.from_list(found))
    run.train()
    assert losses(run)[0] == pytest.approx(expected(llama(), rows()[:8])[0], rel=1e-5)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("of_tokens", [True, False], ids=["tokens", "samples"])
def test_rows_that_a_collator_pads(side, of_tokens, tmp_path):
    short = []
    for i, row in enumerate(rows(of_tokens=of_tokens)):
        n = T - i % 3
        short.append({k: v[:n] if isinstance(v, (Tensor, list)) else v for k, v in row.items()})
    tokenizer = trained_tokenizer()
    tokenizer.padding_side = side
    collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=8)
    run = prepared("patch_model", tmp_path, both(), short, collator=collator)
    made = next(iter(run.get_train_dataloader()))
    assert made["labels"].shape == (8, 16)
    channel, weight = made["deft_kernels_channel"], made["deft_kernels_token_weight"]
    for i, row in enumerate(short[:8]):
        own = made["attention_mask"][i] != 0
        _, wanted, trust = stacked([{**rows(of_tokens=of_tokens)[i], "input_ids": torch.zeros(T)}])
        n = len(row["input_ids"])
        assert channel[i][own].tolist() == wanted[0, :n].tolist()
        torch.testing.assert_close(weight[i][own], trust[0, :n])
    run.train()
    assert all(np.isfinite(losses(run)))


def test_rows_one_after_another():
    """Padding-free collators make one row of all."""
    from deft_kernels.integrations._shared.columns import _Collator

    def flatten(found):
        labels = torch.cat([torch.as_tensor(row["labels"]) for row in found]).unsqueeze(0)
        return {"labels": torch.nn.functional.pad(labels, (0, 3), value=-100)}

    found = [
        {"labels": [1, 2, 3], "domain": "code", "trust": [1.0, 2.0, 3.0]},
        {"labels": [4, 5], "domain": "mathematics", "trust": 0.5},
    ]
    made = _Collator(flatten, both())(found)
    assert made["deft_kernels_channel"].tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]
    assert made["deft_kernels_token_weight"].tolist() == [[1.0, 2.0, 3.0, 0.5, 0.5, 1.0, 1.0, 1.0]]


def test_the_recorder_has_the_channels_too(tmp_path):
    columns = both()
    run = prepared("compute_loss_func", tmp_path, columns, rows())
    (callback,) = (c for c in run.callback_handler.callbacks if isinstance(c, StatisticsCallback))
    with pytest.raises(
        ValueError, match="recorder: its channels are law, those of the statistics code, math"
    ):
        RecordingCallback(callback.statistics, Recorder(channels=("law",)), tmp_path / "run.npz")
    path = tmp_path / "run.npz"
    run.add_callback(RecordingCallback(callback.statistics, Recorder(channels=NAMES), path))
    run.train()
    found = Recording.load(path)
    for name in NAMES:
        counts = found.over_time("nll", name)[1]
        assert counts == pytest.approx(losses(run, f"nll/{name}"), rel=1e-5)


class TestRefusals:
    def test_columns_that_say_nothing(self):
        with pytest.raises(ValueError, match="^channel: None, and no token_weight"):
            Columns()
        with pytest.raises(ValueError, match="^channels: expected the names of the channels together"):
            Columns(channel="domain")
        with pytest.raises(ValueError, match="^channels: expected the names of the channels together"):
            Columns(token_weight="trust", channels=NAMES)
        for channels in ("code", ("code", "code"), (0, 1)):
            with pytest.raises(ValueError, match="^channels: expected names that differ"):
                Columns(channel="domain", channels=channels)
        with pytest.raises(TypeError, match="^token_weight: expected the name of a column, got 0.5"):
            Columns(token_weight=0.5)

    @pytest.mark.parametrize(
        ("column", "value", "match"),
        [
            ("domain", "law", "^channel: 'law' in the column 'domain' is none of code, mathematics"),
            ("domain", 2, "^channel: 2 in the column 'domain' is none of"),
            ("domain", -1, "^channel: -1 in the column"),
            ("domain", True, "^channel: True in the column"),
            ("domain", [0] * (T + 1), f"^channel: the column 'domain' has {T + 1} values for a row of {T}"),
            ("trust", float("nan"), "^token_weight: expected finite numbers in the column 'trust', got nan"),
            ("trust", "much", "^token_weight: expected finite numbers"),
            ("trust", [0.5], "^token_weight: the column 'trust' has 1 values for a row"),
        ],
    )
    def test_values(self, column, value, match, tmp_path):
        found = rows()
        found[3] = {**found[3], column: value}
        run = prepared("compute_loss_func", tmp_path, both(), found)
        before = parameters(run.model)
        with pytest.raises(ValueError, match=match):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    def test_a_data_set_without_the_column(self, tmp_path):
        run = prepared("compute_loss_func", tmp_path, both(), examples(), evaluated=examples())
        for call in (run.train, run.evaluate):
            with pytest.raises(ValueError, match="^channel: the data set has no column 'domain' where"):
                call()

    @pytest.mark.parametrize("route", ROUTES)
    def test_a_loss_whose_columns_were_not_attached(self, route, tmp_path):
        columns, model = both(), llama()
        statistics = RunningStatistics(columns.channels)
        run = trainer(tmp_path, model)
        if route == "compute_loss_func":
            run.compute_loss_func = integration.ComputeLoss(statistics=statistics, columns=columns)
        else:
            hook = {"loss_function": "set_loss_function", "patch_model": "patch_model"}[route]
            getattr(integration, hook)(model, statistics=statistics, columns=columns)
        with pytest.raises(
            RuntimeError, match=r"^columns: no trainer brings them .*columns.attach\(trainer\)"
        ):
            run.train()

    def test_attaching_twice_or_to_something_else(self, tmp_path):
        run = prepared("compute_loss_func", tmp_path, both(), rows())
        with pytest.raises(ValueError, match="^trainer: has columns already"):
            both().attach(run)
        with pytest.raises(TypeError, match="^trainer: expected a transformers Trainer, got dict"):
            both().attach({})

    def test_statistics_of_other_channels(self):
        with pytest.raises(
            ValueError, match="^statistics: its channels are none, those of columns code, math"
        ):
            integration.ComputeLoss(statistics=RunningStatistics(), columns=both())
        with pytest.raises(ValueError, match="^statistics: its channels are code, those of columns none"):
            integration.patch_model(llama(), statistics=RunningStatistics(("code",)))
        with pytest.raises(ValueError, match="^statistics: None, and columns has channels"):
            integration.set_loss_function(llama(), columns=both())
        with pytest.raises(TypeError, match="^columns: expected Columns, got str"):
            integration.ComputeLoss(columns="domain")
        with pytest.raises(TypeError, match=r"^token_weight: .*columns=Columns\(token_weight="):
            integration.ComputeLoss(token_weight=torch.ones(3))

    @pytest.mark.parametrize("route", ["loss_function", "patch_model"])
    def test_labels_that_context_parallelism_cut(self, route):
        columns, model = Columns(token_weight="trust"), llama().train()
        hook = integration.set_loss_function if route == "loss_function" else integration.patch_model
        hook(model, columns=columns)
        inputs = batch()
        with pytest.raises(ValueError, match="^columns: not available with shift_labels"):
            model(**inputs, shift_labels=inputs["labels"])

    def test_a_version_that_removes_columns_by_another_way(self, tmp_path):
        run = trainer(tmp_path, llama())
        run._set_signature_columns_if_needed = lambda: None
        del run._signature_columns
        with pytest.raises(RuntimeError, match="^remove_unused_columns: this version"):
            both().attach(run)
        run.args.remove_unused_columns = False
        both().attach(run)


class TestRunningStatistics:
    """By itself, in a loop of one's own."""

    def rows(self):
        from deft_kernels import deft_loss

        logits = torch.randn(3, 5, 7)
        labels = torch.randint(0, 7, (3, 5))
        labels[0, :2] = -100
        _, stats = deft_loss(logits, labels, return_stats=True)
        return stats, labels != -100

    def test_one_for_all_rows_and_one_for_each(self):
        stats, valid = self.rows()
        running = RunningStatistics(NAMES)
        running.update(stats, valid, 1)
        means = running.means()
        assert means["nll/mathematics"] == means["nll"] and "nll/code" not in means
        channel = torch.arange(15).reshape(3, 5) % 2
        channel[0, 0] = 99  # of a row that does not count
        running.update(stats, valid, channel.int())
        means = running.means()
        for number, name in enumerate(NAMES):
            own = valid & (channel == number)
            assert means[f"mean_gate/{name}"] == pytest.approx(float(stats.gate[own].mean()), rel=1e-6)
        assert running.means() == {}

    def test_out_of_range_where_the_host_does_not_look(self):
        """In a graph, as on a GPU: such a row is in the means of all rows, and of no channel."""
        stats, valid = self.rows()
        running = RunningStatistics(NAMES)
        channel = torch.zeros(3, 5, dtype=torch.int64)
        channel[1], channel[2] = 7, -1
        torch.compile(running.update, backend="eager", fullgraph=True)(stats, valid, channel)
        means = running.means()
        assert means["nll"] == pytest.approx(float(-stats.logp[valid].mean()), rel=1e-6)
        assert means["nll/code"] == pytest.approx(float(-stats.logp[0][valid[0]].mean()), rel=1e-6)
        assert "nll/mathematics" not in means

    def test_what_is_no_channel(self):
        stats, valid = self.rows()
        running = RunningStatistics(NAMES)
        for channel, match in (
            (None, "^channel: None, and these statistics are kept apart by code, mathematics"),
            (2, r"^channel: 2 is outside \[0, 2\)"),
            (torch.full((3, 5), -1), r"^channel: -1 is outside \[0, 2\)"),
            (torch.zeros(3, 5), "^channel: expected integers, got torch.float32"),
            (torch.zeros(3, 4, dtype=torch.int64), r"^channel: expected the shape of valid, \(3, 5\)"),
        ):
            with pytest.raises(ValueError, match=match):
                running.update(stats, valid, channel)
        with pytest.raises(TypeError, match="^channel: expected an int, got"):
            running.update(stats, valid, "code")
        with pytest.raises(ValueError, match="^channel: this RunningStatistics has none"):
            RunningStatistics().update(stats, valid, 0)
        assert running.means() == {}, "a call that raised counts for nothing"
