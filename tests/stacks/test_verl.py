"""verl's external_lib import and loss call; its engines and trainer want a GPU and are not run here."""

from __future__ import annotations

import importlib

import pytest
import torch
from verl.utils import tensordict_utils as tu
from verl.utils import torch_functional
from verl.utils.import_utils import import_external_libs
from verl.workers import engine_workers
from verl.workers.utils import losses

from deft_kernels import objectives, reference

D, V, LENGTHS = 16, 61, (5, 9, 7, 4, 8, 6, 3, 9)


def data():
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(V, (n,), generator=generator) for n in LENGTHS]
    hidden = [2 * torch.randn(n, D, generator=generator) for n in LENGTHS]
    masks = [(torch.arange(n) >= 1 + i % 2).long() for i, n in enumerate(LENGTHS)]
    return ids, hidden, masks, torch.randn(V, D, generator=generator)


def call(rows, head, tokens):
    """The loss of some samples as an engine calls it, from statistics made by verl's own functions."""
    ids, hidden, masks, _ = data()
    nested = [torch.nested.as_nested_tensor([x[i] for i in rows], layout=torch.jagged) for x in (ids, masks)]
    logits = torch.cat([hidden[i] for i in rows]) @ head.t()
    logp = torch_functional.logprobs_from_logits(logits, torch.roll(nested[0].values(), -1, 0))
    collision = torch_functional.calculate_sum_pi_squared_from_logits(logits)
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


@pytest.fixture
def integration():
    import_external_libs("deft_kernels.integrations.verl")
    integration = importlib.import_module("deft_kernels.integrations.verl")
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
    assert float(whole) == pytest.approx(float(expected), rel=1e-5)
    assert float(sum(parts)) == pytest.approx(float(whole), rel=1e-5)
    torch.testing.assert_close(head.grad, other.grad)


def test_what_is_missing_or_cannot_be_honoured_raises(integration):
    integration.install("eaft")
    with pytest.raises(KeyError, match="entropy"):
        call(range(8), data()[3], 10)
    for objective in ("cayley", objectives.deft(detach=False)):
        with pytest.raises(ValueError, match="objective"):
            integration.install(objective)


def test_uninstall_gives_everything_back(integration):
    replaced = losses.sft_loss, engine_workers.TrainingWorker.train_batch
    integration.uninstall()
    assert losses.sft_loss is not replaced[0]
    assert engine_workers.TrainingWorker.train_batch is not replaced[1]
    integration.install()
