"""verl's external_lib import and loss call; its trainers are run in test_verl_trainer.py."""

from __future__ import annotations

import importlib
import pickle
import sys
from functools import partial
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
import torch
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.utils.import_utils import import_external_libs
from verl.workers.engine.base import BaseEngine
from verl.workers.engine_workers import TrainingWorker
from verl.workers.utils import losses

from deft_kernels import objectives, reference

D, V, LENGTHS = 16, 61, (5, 9, 7, 4, 8, 6, 3, 9)


def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(V, (n,), generator=generator) for n in LENGTHS]
    hidden = [2 * torch.randn(n, D, generator=generator) for n in LENGTHS]
    masks = [(torch.arange(n) >= 1 + i % 2).long() for i, n in enumerate(LENGTHS)]
    return ids, hidden, masks, torch.randn(V, D, generator=generator)


def call(rows, head, tokens, weight=1):
    """The loss of some samples as an engine calls it, from log-probabilities made by verl's own function."""
    ids, hidden, masks, _ = data()
    masks = [mask * weight for mask in masks]
    nested = [torch.nested.as_nested_tensor([x[i] for i in rows], layout=torch.jagged) for x in (ids, masks)]
    logits = torch.cat([hidden[i] for i in rows]) @ head.t()
    logp = torch_functional.logprobs_from_logits(logits, torch.roll(nested[0].values(), -1, 0))
    collision = integration_module().collision_of_logits(logits)
    offsets = nested[0].offsets()
    output = {
        "log_probs": torch.nested.nested_tensor_from_jagged(logp, offsets),
        "sum_pi_squared": torch.nested.nested_tensor_from_jagged(collision, offsets),
    }
    batch = tu.get_tensordict(
        {"input_ids": nested[0], "loss_mask": nested[1]}, non_tensor_dict={"dp_size": 1}
    )
    tu.assign_non_tensor(batch, batch_num_tokens=tokens)
    return losses.sft_loss(config=None, model_output=output, data=batch)[0]


def integration_module():
    return importlib.import_module("deft_kernels.integrations.verl")


@pytest.fixture
def integration():
    import_external_libs("deft_kernels.integrations.verl")
    integration = integration_module()
    integration.install()
    yield integration
    integration.uninstall()


def test_the_loss_is_the_oracles_and_8_is_4_times_2(integration):
    ids, hidden, masks, weight = data()
    tokens = int(sum(mask.sum() for mask in masks))
    head, other = (weight.clone().requires_grad_() for _ in range(2))
    whole = call(range(8), head, tokens)
    whole.backward()
    parts = [call(range(i, i + 2), other, tokens) for i in (0, 2, 4, 6)]
    sum(parts).backward()
    logits = torch.cat([h[:-1] for h in hidden]).double() @ weight.double().t()
    labels = torch.cat([i[1:].masked_fill(m[1:] == 0, -100) for i, m in zip(ids, masks, strict=True)])
    expected, _ = reference.loss(logits, labels, objective=objectives.resolve("deft"))
    assert whole.item() == pytest.approx(float(expected), rel=1e-5)
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)
    torch.testing.assert_close(head.grad, other.grad)


def test_weights_in_the_mask_weigh(integration):
    weight = data()[3]
    assert float(call(range(8), weight, 10, 0.5)) == pytest.approx(0.5 * float(call(range(8), weight, 10)))


def test_a_batch_without_tokens_is_0(integration):
    head = data()[3].clone().requires_grad_()
    loss = call(range(8), head, 0, 0)
    loss.backward()
    assert loss.item() == 0 and (head.grad == 0).all()


def test_what_is_missing_or_cannot_be_honoured_raises(integration):
    integration.install("eaft")
    with pytest.raises(KeyError, match="entropy"):
        call(range(8), data()[3], 10)
    refused = ("cayley", objectives.deft(detach=False), objectives.deft(order=float("inf")))
    for objective in refused:
        with pytest.raises(ValueError, match="objective"):
            integration.install(objective)
    # p alone: verl's log-probability carries its gradient.
    integration.install(objectives.dft(detach=False))


class Engine(BaseEngine):
    """An engine that only notes what it was asked for, and what its entropy was."""

    model_config = SimpleNamespace(mtp=SimpleNamespace(enable=False, enable_train=False))
    optimizer_zero_grad = optimizer_step = is_mp_src_rank_with_outputs = lambda self: None

    def __init__(self):
        self.asked = None

    def forward_backward_batch(self, data, loss_function, forward_only=False):
        self.asked = tu.get(data, "calculate_sum_pi_squared"), tu.get(data, "calculate_entropy")
        logits = torch.randn(3, 5, dtype=torch.bfloat16, requires_grad=True)
        self.entropy = torch_functional.entropy_from_logits(logits)
        self.collision = torch_functional.calculate_sum_pi_squared_from_logits(logits)
        return {"metrics": {}}


def test_an_engine_is_asked_for_what_the_objective_needs_and_others_keep_verls_statistics(integration):
    batch = {"x": torch.zeros(1)}
    engine = Engine()
    for objective, asked in (("deft", (True, None)), ("eaft", (None, True)), ("dft", (None, None))):
        integration.install(objective)
        loss = pickle.loads(pickle.dumps(partial(losses.sft_loss, config=None)))
        engine.train_batch(tu.get_tensordict(batch, {}), loss_function=loss)
        assert engine.asked == asked
        for statistic in (engine.entropy, engine.collision):
            assert statistic.dtype == torch.float32 and not statistic.requires_grad
    engine.train_batch(tu.get_tensordict(batch, {}), loss_function=partial(losses.ppo_loss, config=None))
    assert engine.asked == (None, None)
    assert engine.entropy.requires_grad and engine.collision.dtype == torch.bfloat16


def test_a_loss_that_was_bound_before_raises(integration):
    integration.uninstall()
    plain = partial(losses.sft_loss, config=None)
    integration.install()
    for call in (Engine().train_batch, Engine().infer_batch):
        with pytest.raises(RuntimeError, match="import deft_kernels.integrations.verl first"):
            call(tu.get_tensordict({"x": torch.zeros(1)}, {}), loss_function=plain)


def test_a_version_with_a_trainer_that_makes_its_own_loss_raises(integration, monkeypatch):
    old = ModuleType("verl.trainer.fsdp_sft_trainer")
    old.__spec__ = ModuleSpec(old.__name__, None)
    monkeypatch.setitem(sys.modules, old.__name__, old)
    with pytest.raises(RuntimeError, match="fsdp_sft_trainer.*verl 0.9"):
        integration.install()


def test_uninstall_gives_everything_back(integration):
    places = (losses, "sft_loss"), (BaseEngine, "train_batch"), (BaseEngine, "infer_batch")
    places += ((TrainingWorker, "_postprocess_output"),)
    replaced = [getattr(owner, name) for owner, name in places]
    integration.uninstall()
    for (owner, name), function in zip(places, replaced, strict=True):
        own = getattr(owner, name)
        assert own is not function and own.__module__.startswith("verl.")
    with pytest.raises(RuntimeError, match="no gated loss"):
        integration.uninstall()
    integration.install()
