"""DTensor logits where a local tensor says too little: versions, shapes, positions, numbers of the batch.

Four real processes, a mesh of two by two. What is refused is refused on every rank; a call that is right
follows, which would meet whatever message were left over.
"""

from __future__ import annotations

import os
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from deft_kernels import deft_loss, fused_linear_deft_loss, row_statistics

RANKS = 4
B, T, V = 5, 2, 13  # nothing divides by two
LAYOUTS = {
    "batch by vocabulary": ([Shard(0), Shard(2)], [Shard(0), Replicate()]),
    "vocabulary by batch": ([Shard(-1), Shard(0)], [Replicate(), Shard(0)]),
    "vocabulary": ([Replicate(), Shard(2)], [Replicate(), Replicate()]),
    "batch and time": ([Shard(0), Shard(1)], [Shard(0), Shard(1)]),
    "batch twice": ([Shard(0), Shard(0)], [Shard(0), Shard(0)]),
    "replicated": ([Replicate(), Replicate()], [Replicate(), Replicate()]),
}


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh(ranks.device(), (2, 2), mesh_dim_names=("data", "tensor"))


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=generator, dtype=torch.float64).to(dtype) * 3
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 0] = labels[2, 1] = -100
    return logits.to(ranks.device()), labels.to(ranks.device())


def lying(layout: str, logits: Tensor, labels: Tensor) -> tuple:
    placements, rows = LAYOUTS[layout]
    return distribute_tensor(logits, mesh(), placements), distribute_tensor(labels, mesh(), rows)


def still_in_step() -> None:
    logits, labels = batch()
    x, y = lying("batch by vocabulary", logits, labels)
    torch.testing.assert_close(deft_loss(x, y).full_tensor(), deft_loss(logits, labels))


def a_later_use_of_overwritten_logits_raises() -> None:
    """q is overwritten with its gradient in one backward, and read by the other."""
    logits, labels = batch()
    for layout in LAYOUTS:
        leaf, y = lying(layout, logits, labels)
        for in_forward in (False, True):
            leaf.requires_grad_()
            q = leaf * 1.0
            square = q * q
            loss = deft_loss(q, y, inplace=True, grad_in_forward=in_forward)
            if not in_forward:
                loss.backward(retain_graph=True)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                square.sum().backward()


def overwritten_logits_have_the_gradient() -> None:
    """In place and nothing later: as out of place, and no logits are kept alive by the loss."""
    logits, labels = batch()
    for layout in LAYOUTS:
        gradients = []
        for keywords in ({}, {"inplace": True}, {"inplace": True, "grad_in_forward": True}):
            leaf, y = lying(layout, logits, labels)
            leaf.requires_grad_()
            deft_loss(leaf * 1.0, y, **keywords).backward()
            gradients.append(leaf.grad.full_tensor())
        torch.testing.assert_close(gradients[1], gradients[0])
        torch.testing.assert_close(gradients[2], gradients[0])


def inference_mode_has_no_versions() -> None:
    logits, labels = batch()
    wanted = deft_loss(logits, labels)
    made = lying("vocabulary by batch", logits, labels)
    with torch.inference_mode():
        inside = lying("batch by vocabulary", logits.clone(), labels.clone())
        for x, y in (made, inside):
            for keywords in ({}, {"inplace": True}, {"inplace": True, "grad_in_forward": True}):
                torch.testing.assert_close(deft_loss(x, y, **keywords).full_tensor(), wanted)
            row_statistics(x, y)


def empty_shards_in_place() -> None:
    """Ranks without a row, and without a column of a vocabulary of one: they go along with the others."""
    # Of the last, [2, 0, 1] times 1.0 has the strides (0, 1, 0).
    for b, t, v in ((1, T, V), (1, T, 1), (B, T, 1), (0, T, 1), (4, 1, 1)):
        logits = torch.randn(b, t, v, device=ranks.device())
        labels = torch.zeros(b, t, dtype=torch.int64, device=logits.device)
        for layout in LAYOUTS:
            for view in (logits, logits.transpose(0, 1).contiguous().transpose(0, 1)):
                leaf, y = lying(layout, view, labels)
                leaf.requires_grad_()
                loss = deft_loss(leaf * 1.0, y, inplace=True, reduction="sum", objective="nll")
                loss.backward()
                torch.testing.assert_close(loss.full_tensor(), deft_loss(logits, labels, reduction="sum",
                                                                         objective="nll"))  # fmt: skip
    # A local tensor without elements whose strides say nothing.
    width = V if dist.get_rank() == 0 else 0
    local = torch.randn(B, 1, device=ranks.device()).expand(B, width) if width == 0 else torch.randn(B, V)
    labels = torch.zeros(B, dtype=torch.int64, device=ranks.device())
    deft_loss(local.to(labels.device).requires_grad_() * 1.0, labels, inplace=True, group=dist.group.WORLD)


def wrong_shapes_raise_everywhere() -> None:
    """In global shapes, before any rank sends: a local shape can be right on one rank only."""
    logits, labels = batch()
    for layout, (placements, rows) in LAYOUTS.items():
        x, y = lying(layout, logits, labels)
        short = distribute_tensor(labels[: B - 1], mesh(), rows)
        flat = distribute_tensor(
            labels.flatten(), mesh(), [p if p == Shard(0) else Replicate() for p in rows]
        )
        for wrong in (short, flat):
            shape = rf"\({', '.join(map(str, wrong.shape))},?\)"
            with pytest.raises(ValueError, match=rf"labels: expected shape \({B}, {T}\).*got {shape}"):
                deft_loss(x, wrong)
            with pytest.raises(ValueError, match=rf"labels: expected shape \({B}, {T}\)"):
                row_statistics(x, wrong)
            with pytest.raises(ValueError, match=r"token_weight: expected the labels' shape"):
                deft_loss(x, y, token_weight=wrong.float())
        with pytest.raises(ValueError, match=rf"weight: expected one weight a class, shape \({V},\)"):
            deft_loss(x, y, weight=torch.ones(V // 2, device=logits.device))
        with pytest.raises(TypeError, match="labels: expected an integer dtype"):
            deft_loss(x, y.float())
        with pytest.raises(ValueError, match="reduction: expected one of"):
            deft_loss(x, y, reduction="median")
        with pytest.raises(ValueError, match="num_items: replaces the denominator"):
            deft_loss(x, y, num_items=3, reduction="sum")
        assert placements
    still_in_step()


def wrong_labels_have_a_global_position() -> None:
    if ranks.device() != "cpu":
        return
    logits, labels = batch()
    for layout in LAYOUTS:
        for row in (1, 4, 7, 9):
            wrong = labels.clone()
            wrong.view(-1)[row] = V
            x, y = lying(layout, logits, wrong)
            has_it = bool((y.to_local() == V).any())
            match = rf"labels: 13 at flat position {row} (of all rows )?is outside \[0, 13\)"
            with pytest.raises(IndexError, match=match if has_it else "another rank's rows hold a label"):
                deft_loss(x, y)
            os.environ["DEFT_KERNELS_VALIDATE"] = "1"
            try:
                for call in (lambda x, y: deft_loss(x, y, reduction="none"), row_statistics):
                    with pytest.raises(IndexError, match=match if has_it else "another rank's rows hold"):
                        call(x, y)
            finally:
                del os.environ["DEFT_KERNELS_VALIDATE"]
    # Shifted, the label of the next position counts, and the first of all never does.
    first, second = labels.clone(), labels.clone()
    first[3, 0], second[3, 1] = V, V
    x, y = lying("batch by vocabulary", logits, first)
    deft_loss(x, y, shift=True)
    x, y = lying("batch by vocabulary", logits, second)
    has_it = bool((y.to_local() == V).any())
    with pytest.raises(IndexError, match="flat position 6 of all rows" if has_it else "another rank's rows"):
        deft_loss(x, y, shift=True)
    still_in_step()


def num_items_has_the_gradient_of_all_rows() -> None:
    logits, labels = batch()
    for layout in LAYOUTS:
        alone = torch.tensor(7.0, device=logits.device, requires_grad=True)
        deft_loss(logits, labels, num_items=alone).backward()
        x, y = lying(layout, logits, labels)
        plain = torch.tensor(7.0, device=logits.device, requires_grad=True)
        deft_loss(x, y, num_items=plain).backward()
        torch.testing.assert_close(plain.grad, alone.grad)
        whole = distribute_tensor(torch.tensor(7.0, device=logits.device), mesh(), [Replicate(), Replicate()])
        whole.requires_grad_()
        deft_loss(x, y, num_items=whole).backward()
        torch.testing.assert_close(whole.grad.full_tensor(), alone.grad)


def class_weights_are_counted_in_double() -> None:
    logits, labels = batch(torch.float64)
    generator = torch.Generator().manual_seed(4)
    weight = torch.rand(V, generator=generator, dtype=torch.float64).to(logits.device)
    wanted = deft_loss(logits, labels, weight=weight)
    for layout in LAYOUTS:
        x, y = lying(layout, logits, labels)
        found = deft_loss(x, y, weight=weight).full_tensor()
        torch.testing.assert_close(found, wanted, rtol=1e-14, atol=0.0)


def plain_beside_dtensor() -> None:
    logits, labels = batch()
    replicated = [Replicate(), Replicate()]
    given = {
        "labels": distribute_tensor(labels, mesh(), replicated),
        "token_weight": distribute_tensor(torch.ones(B, T, device=logits.device), mesh(), replicated),
        "weight": distribute_tensor(torch.ones(V, device=logits.device), mesh(), replicated),
        "num_items": distribute_tensor(torch.tensor(3.0, device=logits.device), mesh(), replicated),
    }
    hidden, head = torch.randn(B, T, 3, device=logits.device), torch.randn(V, 3, device=logits.device)
    for name, tensor in given.items():
        with pytest.raises(TypeError, match=f"^{name}: is a DTensor, logits is a plain tensor"):
            deft_loss(logits, **{"labels": labels, name: tensor})
        name = "class_weight" if name == "weight" else name
        with pytest.raises(TypeError, match=f"^{name}: is a DTensor, hidden is a plain tensor"):
            fused_linear_deft_loss(hidden, head, **{"labels": labels, name: tensor})
    with pytest.raises(TypeError, match="^labels: is a DTensor, logits is a plain tensor"):
        row_statistics(logits, given["labels"])
    # The reverse: plain tensors beside replicated rows are taken, beside sharded ones nothing says which.
    x, y = lying("batch by vocabulary", logits, labels)
    with pytest.raises(TypeError, match="labels: the logits are a DTensor with sharded rows"):
        deft_loss(x, labels)
    other = init_device_mesh(ranks.device(), (4,))
    with pytest.raises(ValueError, match="labels: lies on .*, the logits on"):
        deft_loss(x, distribute_tensor(labels, other, [Replicate()]))
    loss = deft_loss(x, y, weight=given["weight"], num_items=given["num_items"]).full_tensor()
    torch.testing.assert_close(loss, deft_loss(logits, labels, num_items=3))


CASES = [
    a_later_use_of_overwritten_logits_raises,
    overwritten_logits_have_the_gradient,
    inference_mode_has_no_versions,
    empty_shards_in_place,
    wrong_shapes_raise_everywhere,
    wrong_labels_have_a_global_position,
    num_items_has_the_gradient_of_all_rows,
    class_weights_are_counted_in_double,
    plain_beside_dtensor,
]


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_in_four_processes(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
