"""NeMo AutoModel's loss call, in the arguments of its recipes; test_nemo_recipe.py runs a recipe."""

from __future__ import annotations

import pytest
import torch
from nemo_automodel.components.loss.masked_ce import MaskedCrossEntropy
from pages import blocks

from deft_kernels import deft_loss, objectives, reference
from deft_kernels.integrations.nemo import DEFTLoss

B, T, D, V = 8, 12, 16, 61


def data():
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    for i in range(B):
        labels[i, :i] = -100
    return hidden, weight, labels


def trained(accumulate, steps=3):
    hidden, weight, labels = data()
    head, loss_fn, losses = weight.clone().requires_grad_(), DEFTLoss(), []
    tokens = int((labels != -100).sum())
    for _ in range(steps):
        total = 0.0
        for rows, targets in zip(hidden.chunk(accumulate), labels.chunk(accumulate), strict=True):
            loss = loss_fn(rows @ head.t(), targets, num_label_tokens=tokens)
            loss.backward()
            total += float(loss.detach())
        with torch.no_grad():
            head -= 0.5 * head.grad
            head.grad = None
        losses.append(total)
    return losses, head.detach()


def test_the_first_loss_is_the_oracles_and_8_is_4_times_2():
    hidden, weight, labels = data()
    logits = hidden.double() @ weight.double().t()
    expected, _ = reference.loss(logits, labels, objective=objectives.resolve("deft"))
    (whole, end), (parts, same) = trained(1), trained(4)
    assert whole[0] == pytest.approx(float(expected), rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(same, end)


@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("ignore_index", [-100, 0])
def test_for_nll_every_argument_means_what_it_means_there(reduction, ignore_index):
    hidden, weight, labels = data()
    logits = hidden @ weight.t()
    mask = (torch.rand(B, T) < 0.7).long()
    calls = [{}, {"mask": mask}]
    if reduction == "sum":
        calls += [{"num_label_tokens": 50, "mask": mask}, {"num_label_tokens": 0}]
        calls += [{"loss_weights": torch.rand(B, T), "num_label_tokens": 50}]
    ours = DEFTLoss("nll", ignore_index=ignore_index, reduction=reduction)
    theirs = MaskedCrossEntropy(ignore_index=ignore_index, reduction=reduction)
    for call in calls:
        before = labels.clone()
        loss = ours(logits, before, **call)
        assert torch.equal(before, labels), "the labels were changed"
        torch.testing.assert_close(loss, theirs(logits, labels.clone(), **call))


@pytest.mark.parametrize(
    "gradient", [{}, {"inplace": True}, {"grad_in_forward": True}, {"grad_in_forward": False}]
)
def test_keywords_are_those_of_deft_loss(gradient):
    hidden, weight, labels = data()
    keywords = {"temperature": 0.7, "z_loss": 0.1, "label_smoothing": 0.2}
    made = []
    for loss in (
        lambda z: DEFTLoss(**keywords, **gradient)(z, labels, num_label_tokens=50),
        lambda z: deft_loss(z, labels, reduction="sum", **keywords) / 50,
    ):
        logits = (hidden @ weight.t()).requires_grad_()
        value = loss(logits * 1.0)
        made.append((value, *torch.autograd.grad(value, logits)))
    for ours, expected in zip(*made, strict=True):
        torch.testing.assert_close(ours, expected)


def test_what_cannot_be_honoured_raises():
    hidden, weight, labels = data()
    logits = hidden @ weight.t()
    with pytest.raises(ValueError, match="num_label_tokens"):
        DEFTLoss(reduction="mean")(logits, labels, num_label_tokens=3)
    with pytest.raises(ValueError, match="loss_weights"):
        DEFTLoss()(logits, labels, loss_weights=torch.rand(T))
    with pytest.raises(ValueError, match="mean_prob"):
        DEFTLoss("cayley")
    DEFTLoss(objectives.cayley(mean_prob=0.3))(logits, labels)
    for name in ("fp32_upcast", "weight"):
        with pytest.raises(TypeError, match=f"^{name}: not a keyword of DEFTLoss; .*known: "):
            DEFTLoss(**{name: True})


def test_the_page_names_the_class_and_the_recipes_keep_it():
    """The recipes replace a loss that is no MaskedCrossEntropy in front of some models."""
    (yaml,) = blocks("nemo", "yaml")
    target = next(line.split(":")[1].strip() for line in yaml.splitlines() if "_target_" in line)
    assert target == f"{DEFTLoss.__module__}.{DEFTLoss.__name__}"
    assert isinstance(DEFTLoss(objective="deft"), MaskedCrossEntropy)


def test_logits_as_a_dtensor_give_a_plain_loss(tmp_path):
    from torch.distributed.tensor import Shard, distribute_tensor

    hidden, weight, labels = data()
    logits = (hidden @ weight.t()).requires_grad_()
    expected = deft_loss(logits, labels, reduction="sum")
    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        split = distribute_tensor(logits.detach(), mesh, [Shard(2)]).requires_grad_()
        loss = DEFTLoss()(split, labels)
        assert type(loss) is torch.Tensor
        loss.backward(), expected.backward()
        torch.testing.assert_close(split.grad.full_tensor(), logits.grad)
        torch.testing.assert_close(loss, expected)
    finally:
        torch.distributed.destroy_process_group()
