"""NeMo AutoModel's recipe for next-token prediction, on a CPU, from YAML with the page's `loss_fn` block."""

from __future__ import annotations

import json
import logging

import automodel
import files
import pytest
import torch
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from nemo_automodel.recipes.llm import train_ft
from pages import two_ranks
from tiny import llama

from deft_kernels import objectives, reference
from deft_kernels.integrations.nemo import DEFTLoss

LORA = {
    "_target_": "nemo_automodel.components._peft.lora.PeftConfig",
    "match_all_linear": True,
    "dim": 4,
    "alpha": 8,
}
# A model whose forward takes no logits_to_keep, in front of which the recipe replaces losses.
GPT2 = {
    "_target_": "nemo_automodel.components.models.gpt2.build_gpt2_model",
    "vocab_size": 61,
    "n_positions": 32,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("nemo")
    files.save(folder)
    llama(num_key_value_heads=2).save_pretrained(folder / "model")  # as many as ranks of tensor parallelism
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return automodel.run(folder)


def first(trainer, objective="deft"):
    """The float64 reference on the logits of the recipe's own model and batch."""
    (batch,) = trainer.dataloader
    labels = batch.pop("labels")
    batch.pop("padding_mask", None)
    with torch.no_grad():
        out = trainer.model_parts[0](**batch)
    logits = getattr(out, "logits", out).double()
    loss, _ = reference.loss(logits, labels, objective=objectives.resolve(objective))
    return float(loss)


def close(run, whole):
    """In fp32 other portions of the batch differ by the order of sums: measured over three steps, on one rank
    and on two, at most 2e-7 of a loss and 1.2e-7 of a parameter."""
    losses, validation, parameters = run
    assert losses == pytest.approx(whole[0], rel=2e-6)
    assert validation == pytest.approx(whole[1], rel=2e-6)
    assert parameters.keys() == whole[2].keys()
    for name, p in whole[2].items():
        torch.testing.assert_close(parameters[name], p, rtol=1e-6, atol=1e-6)


def test_the_first_loss_is_the_oracles(folder, whole):
    trainer = automodel.recipe(folder, {})
    assert type(trainer.loss_fn) is DEFTLoss
    expected, plain = first(trainer), first(trainer, "nll")
    losses, _, _ = automodel.finished(trainer, folder)
    assert losses[0] == pytest.approx(expected, rel=1e-6)
    assert abs(losses[0] - plain) > 0.1
    assert losses == whole[0]


def test_validation_is_gated_too(whole):
    """Each step trains and validates on the same eight examples."""
    assert whole[1][:2] == pytest.approx(whole[0][1:], rel=2e-6)


def test_8_is_4_times_2(folder, whole):
    close(automodel.run(folder, **{"step_scheduler.local_batch_size": 2}), whole)


def test_the_pages_objective_is_the_one_that_trains(folder, whole):
    losses, _, parameters = automodel.run(folder, **{"loss_fn.objective": "nll"})
    assert abs(losses[0] - whole[0][0]) > 0.1
    assert any(not torch.allclose(p, whole[2][name], atol=1e-4) for name, p in parameters.items())


def test_lora(folder, whole):
    """Adapters start as nothing, so the first loss is the whole model's; only they are trained."""
    losses, _, parameters = automodel.run(folder, peft=LORA)
    assert losses[0] == pytest.approx(whole[0][0], rel=1e-6)
    assert losses[2] != losses[0]
    original = files.model_in(folder).state_dict()
    frozen = {name: p for name, p in parameters.items() if "lora" not in name}
    assert len(frozen) < len(parameters)
    for name, p in frozen.items():
        assert torch.equal(p, original[name])
    assert all(p.any() for name, p in parameters.items() if "lora_B" in name)


def test_two_ranks(folder, whole):
    """FSDP2, also with accumulation, tensor parallelism, and two stages of a pipeline."""
    pipeline = {"pp_schedule": "1f1b", "pp_microbatch_size": 4}
    runs = [
        {"step_scheduler.local_batch_size": 4},
        {"step_scheduler.local_batch_size": 2},
        {"distributed.tp_size": 2},
        {"distributed.pp_size": 2, "distributed.pipeline": pipeline},
    ]
    two_ranks(automodel.__file__, folder, *map(json.dumps, runs))
    results = torch.load(folder / "ranks.pt")
    assert len(results) == len(runs)
    for run in results[:3]:
        close(run, whole)
    losses, validation, parameters = results[3]
    assert 0 < len(parameters) < len(whole[2])  # of the first stage
    close((losses, validation, {**whole[2], **parameters}), whole)


def test_the_recipes_fallback_leaves_it_alone(folder, caplog):
    tokenizer = {"pretrained_model_name_or_path": str(folder / "model")}
    changes = {"model": GPT2, "dataset.tokenizer": tokenizer, "validation_dataset": None}
    trainer = automodel.recipe(folder, changes)
    assert type(trainer.loss_fn) is DEFTLoss
    assert not any("MaskedCrossEntropy" in record.getMessage() for record in caplog.records)
    for module in trainer.model_parts[0].modules():  # two passes are to give the same logits
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attn_dropout"):
            module.attn_dropout = 0.0
    expected = first(trainer)
    # What would have happened to any other loss.
    with caplog.at_level(logging.WARNING):
        other = train_ft._maybe_downgrade_loss_fn(torch.nn.CrossEntropyLoss(), trainer.model_parts[0], False)
    assert type(other) is MaskedCrossEntropy
    losses, _, _ = automodel.finished(trainer, folder)
    assert losses[0] == pytest.approx(expected, rel=1e-6)


def test_what_cannot_be_honoured_raises_in_the_recipe(folder):
    for changes, message in (
        ({"loss_fn.reduction": "mean"}, "num_label_tokens"),
        ({"loss_fn.objective": "cayley"}, "mean_prob"),
        ({"loss_fn.objective": "def"}, "objective"),
        ({"loss_fn.gate": 1}, "gate"),
    ):
        with pytest.raises((ValueError, TypeError), match=message):
            automodel.run(folder, **changes)
        torch.distributed.destroy_process_group()
    assert train_ft._supports_loss_weights(DEFTLoss())  # its per-domain weights
