"""What is read from a trainer's frame is still there in the real trainers, and what is missing is refused."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from sampling import first_of
from test_refusals import bart
from test_trl import FUSED_HEAD, prepared, tokenizer  # noqa: F401  # the fixture
from tiny import arguments, batch, examples, llama, losses, oracle, parameters, trainer
from transformers import BartForConditionalGeneration, Trainer
from trl import SFTTrainer

import deft_kernels
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations import trl as integration_of_trl
from deft_kernels.integrations._shared import caller

# Frames, and private names asked for with a default: when the name goes, the guard goes without a word.
FAIL_OPEN = re.compile(r"_getframe|currentframe|\bf_(back|locals)\b|\b(has|get)attr\([^\"'()]+, [\"']_")


def test_frames_are_read_in_one_file_and_private_names_not_guessed():
    package = Path(deft_kernels.__file__).parent
    sources = [path for path in package.rglob("*.py") if FAIL_OPEN.search(path.read_text())]
    assert [path.name for path in sources] == ["caller.py"]


class Direct(Trainer):
    """Makes its loss in a method of its own, further from compute_loss than transformers does."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return self.own(model, inputs, num_items_in_batch)

    def own(self, model, rows, num_items):
        labels = rows["labels"]
        outputs = model(**{name: x for name, x in rows.items() if name != "labels"})
        return self.compute_loss_func(outputs, labels, num_items)


class Stepping(Trainer):
    """Has no compute_loss: its training step calls the loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = Direct.own(self, model.train(), inputs, num_items_in_batch)
        loss.backward()
        return loss.detach()


@pytest.mark.parametrize("kind", [Trainer, Direct, Stepping])
def test_a_trainer_that_calls_a_bare_loss_is_seen(kind, tmp_path):
    run = kind(model=llama(), args=arguments(tmp_path), train_dataset=examples())
    run.compute_loss_func = integration.ComputeLoss()
    run.train()
    assert losses(run)[0] == pytest.approx(oracle(llama(), batch()), rel=1e-5)
    run = kind(model=llama(), args=arguments(tmp_path, label_smoothing_factor=0.1), train_dataset=examples())
    run.compute_loss_func = integration.ComputeLoss()
    before = parameters(run.model)
    with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_the_trainer_of_another_loss_is_not_taken_for_ones_own(tmp_path):
    """A loss that is called inside a trainer whose compute_loss_func is another one."""
    run = trainer(tmp_path, llama())
    own, other = integration.ComputeLoss(), integration.ComputeLoss()
    seen = []

    def called(outputs, labels, num_items_in_batch=None):
        seen.append(caller.calling_trainer(own))
        return other(outputs, labels, num_items_in_batch)

    run.compute_loss_func = called
    run.train()
    assert seen and all(found == (None, None) for found in seen)


def test_a_loop_of_ones_own_has_no_trainer():
    logits, labels = torch.zeros(1, 3, 5, requires_grad=True), torch.zeros(1, 3).long()
    integration.ComputeLoss()({"logits": logits}, labels).backward()
    assert caller.calling_trainer(integration.compute_loss_func) == (None, None)


def test_a_compiled_call_is_one_graph():
    """Nothing is looked up there, and dynamo would break at the look."""
    logits, labels = torch.randn(2, 3, 5, requires_grad=True), torch.ones(2, 3).long()
    loss = integration.ComputeLoss()
    step = torch.compile(lambda z: loss({"logits": z}, labels), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(logits), loss({"logits": logits}, labels))


def test_an_encoder_decoder_whose_batch_cannot_be_seen(tmp_path):
    class Renamed(Trainer):
        def compute_loss(self, model, rows, return_outputs=False, num_items_in_batch=None):
            return Direct.own(self, model, dict(rows), num_items_in_batch)

        def training_step(self, model, rows, num_items_in_batch=None):
            loss = self.compute_loss(model, self._prepare_inputs(rows), num_items_in_batch=num_items_in_batch)
            loss.backward()
            return loss.detach()

    model = bart(BartForConditionalGeneration)
    run = Renamed(model=model, args=arguments(tmp_path), train_dataset=examples())
    integration.apply(run, shift=False)
    with pytest.raises(RuntimeError, match="inputs: .*name it inputs"):
        run.train()


def test_a_method_that_lost_its_argument():
    def compute_loss(self, model, inputs, return_outputs=False, **others):
        raise AssertionError

    with pytest.raises(RuntimeError, match="num_items_in_batch: this version's .*compute_loss"):
        caller.Argument(compute_loss, "num_items_in_batch")


def test_an_argument_of_the_innermost_call():
    def outer(x, otherwise):
        return asked.value(otherwise) if x is None else outer(x - 1 if x else None, otherwise)

    @functools.wraps(outer)
    def decorated(*args):
        return outer(*args)

    asked = caller.Argument(decorated, "x")
    assert asked.value(7) == 7
    assert decorated(3, 7) is None


class Forgetful(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **others):
        return super().compute_loss(model, inputs, return_outputs)


class Passing(SFTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, **others):
        return super().compute_loss(model, inputs, return_outputs, **others)


def sft(kind, tmp_path, tokenizer, **settings):  # noqa: F811
    accumulated = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, "max_steps": 1}
    like = prepared(tmp_path, tokenizer, **accumulated, **settings)
    model = llama(num_hidden_layers=1)
    run = kind(model=model, args=like.args, train_dataset=like.train_dataset, processing_class=tokenizer)
    integration_of_trl.apply(run)
    return run


COMPILED = {"torch_compile": True, "torch_compile_backend": "aot_eager"}


@pytest.mark.skipif(not FUSED_HEAD, reason="compute_loss_func is told the number of items")
@pytest.mark.parametrize("settings", first_of([{}, COMPILED]), ids=["eager", "compiled"])
def test_trl_with_and_without_the_number_of_items(settings, tmp_path, tokenizer):  # noqa: F811
    run = sft(Forgetful, tmp_path, tokenizer, **settings)
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match="num_items_in_batch: the trainer did not pass it on"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())
    passing, plain = (sft(kind, tmp_path, tokenizer, **settings) for kind in (Passing, SFTTrainer))
    passing.train(), plain.train()
    assert losses(passing) == pytest.approx(losses(plain), rel=1e-6)


@pytest.mark.skipif(not FUSED_HEAD, reason="compute_loss_func is told the number of items")
def test_a_version_of_trl_whose_compute_loss_is_another(tmp_path, tokenizer, monkeypatch):  # noqa: F811
    run = prepared(tmp_path, tokenizer)
    monkeypatch.setattr(SFTTrainer, "compute_loss", lambda self, model, inputs, **others: None)
    with pytest.raises(RuntimeError, match="num_items_in_batch: this version's"):
        integration_of_trl.apply(run)
