"""What leads past the gated loss in Axolotl raises, from YAML and before a parameter changes."""

from __future__ import annotations

import importlib

import pytest
import torch
from axolotl.core.trainers.base import AxolotlTrainer
from axolotl_runs import PLUGIN, configuration, trained
from files import Observer, model_in, save

from deft_kernels.integrations import axolotl as integration


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@pytest.mark.parametrize(
    "settings",
    [
        {"deft_objectiv": "eaft"},
        {"deft_objective": "def"},
        {"deft_objective": "tsallis", "deft_objective_args": {"beta": 1}},
    ],
    ids=str,
)
def test_a_wrong_key_raises(folder, tmp_path, settings):
    with pytest.raises(ValueError, match="deft_objectiv|objective"):
        configuration(folder, tmp_path, **settings)


VALUES = {"rl": "dpo", "orpo_alpha": 0.1, "label_smoothing_factor": 0.1}


@pytest.mark.parametrize("key", [*integration.REFUSED, *integration.PARALLEL])
def test_another_loss_raises_when_the_yaml_is_read(folder, tmp_path, key):
    value = 2 if key in integration.PARALLEL else VALUES.get(key, True)
    with pytest.raises(ValueError, match=f"{key}: (not together with the gated loss|the loss would see)"):
        configuration(folder, tmp_path, **{key: value})


def test_tensor_parallelism_without_logits_raises(folder, tmp_path):
    with pytest.raises(ValueError, match="tensor_parallel_size: .*deft_without_logits to false"):
        configuration(folder, tmp_path, tensor_parallel_size=2, deft_without_logits=True)


def test_a_plugin_with_a_trainer_of_its_own_raises(folder, tmp_path):
    diffusion = "axolotl.integrations.diffusion.DiffusionPlugin"
    with pytest.raises(ValueError, match="DiffusionTrainer makes a loss of its own"):
        trained(folder, tmp_path, plugins=[PLUGIN, diffusion])


@pytest.mark.parametrize(
    "name",
    [
        "core.trainers.mamba.AxolotlMambaTrainer",
        "core.trainers.trl.AxolotlRewardTrainer",
        "integrations.kd.trainer.AxolotlKDTrainer",
        "integrations.hatchery.trainer.HatcheryTrainer",
    ],
)
def test_axolotls_trainers_with_a_loss_of_their_own_are_known(name):
    """Of the classes alone, as their models, data or servers are not here."""
    module, _, name = f"axolotl.{name}".rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    with pytest.raises(ValueError, match="makes a loss of its own"):
        integration.check_class(kind.__new__(kind))
    integration.check_class(AxolotlTrainer.__new__(integration.DeftTrainer))


class Plain(AxolotlTrainer):
    """A trainer_cls that leaves the trainer's loss out."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(input_ids=inputs["input_ids"], labels=inputs["labels"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].mT, inputs["labels"][:, 1:])
        return (loss, logits) if return_outputs else loss


class MeanOfMeans(AxolotlTrainer):
    """A trainer_cls in which the number of items ends."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


@pytest.mark.parametrize("log", [True, False], ids=["logged", "not logged"])
@pytest.mark.parametrize("without_logits", [False, True], ids=["logits", "hidden"])
def test_a_trainer_class_that_leaves_the_loss_out_raises(folder, tmp_path, monkeypatch, log, without_logits):
    seen = []
    monkeypatch.setattr(Observer, "on_train_begin", lambda self, *_, model, **others: seen.append(model))
    settings = {"deft_log_statistics": log, "deft_without_logits": without_logits}
    # From hidden states there are no logits to make another loss of, which is an error of its own.
    error = (RuntimeError, TypeError, AttributeError)
    with pytest.raises(error, match="never called" if not without_logits else "NoneType"):
        trained(folder, tmp_path / "plain", trainer_cls=f"{__name__}.Plain", **settings)
    sizes = {"micro_batch_size": 2, "gradient_accumulation_steps": 4}
    with pytest.raises(RuntimeError, match="mean of their means"):
        trained(folder, tmp_path / "means", trainer_cls=f"{__name__}.MeanOfMeans", **settings, **sizes)
    for model in seen:
        before = model_in(folder).state_dict()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_without_the_statistics_it_trains_the_same(folder, tmp_path):
    runs = [
        trained(folder, tmp_path / f"{route}{log}", deft_log_statistics=log, deft_without_logits=route)
        for route, log in ((False, True), (False, False), (True, False))
    ]
    losses = [[entry["loss"] for entry in run.logs] for run in runs]
    # rel: fp32 in another order, see test_axolotl.py.
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert losses[2] == pytest.approx(losses[0], rel=1e-6)
    assert ["nll" in run.logs[0] for run in runs] == [True, False, False]


@pytest.mark.parametrize(
    "plugins", [None, [PLUGIN.replace("axolotl", "axolot")]], ids=["forgotten", "misspelt"]
)
def test_a_plugin_that_axolotl_goes_on_without_raises(folder, tmp_path, plugins):
    """Axolotl drops the deft_ keys then; the trainer class on the page is what notices."""
    with pytest.raises(ValueError, match=r"plugins: has no .*DeftPlugin"):
        trained(folder, tmp_path, plugins=plugins)


def test_a_package_that_is_not_there_raises(folder, tmp_path):
    """As where deft_kernels is not installed: Axolotl stops at the trainer class, not at the plugin."""
    absent = {"plugins": ["absent.of.DeftPlugin"], "trainer_cls": "absent.of.DeftTrainer"}
    with pytest.raises(ValueError, match="Failed to load custom trainer class"):
        trained(folder, tmp_path, **absent)
