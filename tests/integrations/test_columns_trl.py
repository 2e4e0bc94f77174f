"""Columns of the data set with TRL: of samples that it tokenises, of tokens that are there already."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from test_trl import FUSED_HEAD, TEXTS, prepared, tokenizer  # noqa: F401  # the fixture
from tiny import llama, losses
from trl import SFTTrainer

from deft_kernels import objectives, reference
from deft_kernels.integrations import trl as integration
from deft_kernels.integrations.columns import Columns

NAMES = ("metal", "plant")
# Some weight for each kind, and a third of the rows of one of them.
KINDS = [(NAMES[int("grass" in row["prompt"])], 0.5 + i % 3) for i, row in enumerate(TEXTS)]


def columns():
    return Columns(channel="kind", channels=NAMES, token_weight="trust")


def trainer_of(found, folder, tokenizer, **settings):  # noqa: F811
    like = prepared(folder, tokenizer, **settings)
    return SFTTrainer(
        model=llama(),
        args=like.args,
        train_dataset=Dataset.from_list(found),
        eval_dataset=Dataset.from_list(found[:8]),
        processing_class=tokenizer,
    )


def expected(rows, channel, weight, objective="deft"):
    """(loss, nll by channel) of the oracle; channel and weight [B, T] as the labels."""
    model = llama().eval()
    with torch.no_grad():
        logits = (
            model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits[:, :-1].double()
        )
    labels = rows["labels"][:, 1:]
    described = objectives.resolve(objective)
    loss, stats = reference.loss(logits, labels, objective=described, token_weight=weight[:, 1:].double())
    own = [(labels != -100) & (channel[:, 1:] == number) for number in range(len(NAMES))]
    return float(loss), [float(-stats["logp"][mask].mean()) for mask in own]


@pytest.mark.parametrize("objective", ["deft", "eaft"])
def test_samples(objective, tmp_path, tokenizer):  # noqa: F811
    found = [{**row, "kind": kind, "trust": trust} for row, (kind, trust) in zip(TEXTS, KINDS, strict=True)]
    run = trainer_of(found, tmp_path, tokenizer)
    integration.apply(run, objective, columns=columns())
    rows = next(iter(run.get_train_dataloader()))
    shape = rows["labels"].shape
    channel = torch.tensor([NAMES.index(kind) for kind, _ in KINDS[:8]]).unsqueeze(1).expand(shape)
    weight = torch.tensor([trust for _, trust in KINDS[:8]]).unsqueeze(1).expand(shape)
    loss, nll = expected(rows, channel, weight, objective)
    run.train()
    assert losses(run)[0] == pytest.approx(loss, rel=1e-5)
    assert [losses(run, f"nll/{name}")[0] for name in NAMES] == pytest.approx(nll, rel=1e-5)
    # TRL's own metrics stay.
    assert losses(run, "mean_token_accuracy")[0] == pytest.approx(losses(run, "top1")[0], rel=1e-5)


@pytest.mark.skipif(not FUSED_HEAD, reason="keeps no labels of a tokenised data set")
def test_tokens_of_a_data_set_that_is_tokenised(tmp_path, tokenizer):  # noqa: F811
    like = prepared(tmp_path, tokenizer)
    generator = torch.Generator().manual_seed(2)
    found = []
    for row in like.train_dataset:
        n = len(row["input_ids"])
        kinds = torch.randint(0, 2, (n,), generator=generator).tolist()
        trust = (torch.rand(n, generator=generator) + 0.5).tolist()
        found.append({"input_ids": row["input_ids"], "labels": row["labels"], "kind": kinds, "trust": trust})
    run = trainer_of(found, tmp_path, tokenizer, per_device_train_batch_size=4, gradient_accumulation_steps=2)
    integration.apply(run, columns=columns())
    whole = trainer_of(found, tmp_path, tokenizer)
    rows = next(iter(whole.get_train_dataloader()))
    channel = torch.zeros_like(rows["labels"])
    weight = torch.ones(rows["labels"].shape)
    for i, row in enumerate(found[:8]):
        n = len(row["kind"])
        channel[i, :n], weight[i, :n] = torch.tensor(row["kind"]), torch.tensor(row["trust"])
    loss, nll = expected(rows, channel, weight)
    run.train()
    assert losses(run)[0] == pytest.approx(loss, rel=1e-5)
    assert [losses(run, f"nll/{name}")[0] for name in NAMES] == pytest.approx(nll, rel=1e-5)


def test_packing_drops_the_columns(tmp_path, tokenizer):  # noqa: F811
    plain = prepared(tmp_path, tokenizer)
    plain.args.packing = True
    with pytest.raises(ValueError, match="^columns: not available with packing"):
        integration.apply(plain, columns=columns())


def test_a_data_set_without_them(tmp_path, tokenizer):  # noqa: F811
    run = prepared(tmp_path, tokenizer)
    integration.apply(run, columns=columns())
    with pytest.raises(ValueError, match="^channel: the data set has no column 'kind' where the collator"):
        run.train()
    with pytest.raises(TypeError, match="^columns: expected Columns, got tuple"):
        integration.apply(prepared(tmp_path, tokenizer), columns=("kind",))
