"""Logits that are DTensors, in four real processes: a mesh of two by two, data by tensor parallel."""

from __future__ import annotations

import math
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from deft_kernels import deft_loss, objectives, row_statistics

RANKS = 4
# Rows and vocabulary that do not divide by two.
B, T, V = 3, 2, 13
# Placements on the two mesh dimensions, and those of what has one number a row.
LAYOUTS = {
    "batch by vocabulary": ([Shard(0), Shard(2)], [Shard(0), Replicate()]),
    "vocabulary by batch": ([Shard(-1), Shard(0)], [Replicate(), Shard(0)]),
    "vocabulary": ([Replicate(), Shard(2)], [Replicate(), Replicate()]),
    "batch": ([Shard(0), Replicate()], [Shard(0), Replicate()]),
    "batch and time": ([Shard(0), Shard(1)], [Shard(0), Shard(1)]),
    "replicated": ([Replicate(), Replicate()], [Replicate(), Replicate()]),
}


@cache
def mesh() -> DeviceMesh:
    return init_device_mesh(ranks.device(), (2, 2), mesh_dim_names=("data", "tensor"))


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(B, T, V, generator=generator) * 3
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 0] = labels[2, 1] = -100  # ranks of the data dimension count different numbers of rows
    return logits.to(ranks.device()), labels.to(ranks.device())


def compare(layout: str, per_row: dict[str, Tensor] | None = None, **keywords) -> None:
    """Against the same call on the whole tensors in this process."""
    logits, labels = batch()
    placements, rows = LAYOUTS[layout]
    mine = distribute_tensor(logits, mesh(), placements).requires_grad_()
    alone = logits.clone().requires_grad_()
    plain = all(p.is_replicate() for p in rows)
    for labels_given in [distribute_tensor(labels, mesh(), rows)] + [labels] * plain:
        mine.grad = alone.grad = None
        lying = {k: v if plain else distribute_tensor(v, mesh(), rows) for k, v in (per_row or {}).items()}
        # Not a leaf, as logits are not: torch 2.11 replicates what it accumulates into an uneven one.
        between, seen = mine * 1.0, []
        between.register_hook(lambda gradient, seen=seen: seen.append(gradient.placements))
        loss, stats = deft_loss(between, labels_given, return_stats=True, **keywords, **lying)
        wanted, wanted_stats = deft_loss(alone, labels, return_stats=True, **keywords, **(per_row or {}))
        assert isinstance(loss, DTensor) and loss.shape == wanted.shape
        per_row_loss = keywords.get("reduction") == "none"
        assert loss.placements == tuple(rows if per_row_loss else [Replicate()] * 2)
        torch.testing.assert_close(loss.full_tensor(), wanted)
        for ours, theirs in zip(stats, wanted_stats, strict=True):
            if theirs is not None:  # an objective of the user's own has no alpha and no gate
                torch.testing.assert_close(ours.full_tensor(), theirs)
        loss.sum().backward()
        wanted.sum().backward()
        assert seen == [between.placements]
        torch.testing.assert_close(mine.grad.full_tensor(), alone.grad)


def every_layout() -> None:
    weight = torch.linspace(0.5, 2.0, V, device=ranks.device())
    token_weight = torch.linspace(0.1, 1.0, B * T, device=ranks.device()).reshape(B, T)
    for layout in LAYOUTS:
        compare(layout)
        compare(layout, reduction="sum", label_smoothing=0.1)
        compare(layout, reduction="none", objective="eaft")
        compare(layout, {"token_weight": token_weight}, weight=weight, z_loss=1e-3)
        compare(layout, num_items=2.5)
        compare(layout, objective=lambda r: -r.logp * r.entropy)
        if layout != "batch and time":
            compare(layout, objective="cayley")
            compare(layout, shift=True)


def statistics() -> None:
    logits, labels = batch()
    for placements, rows in LAYOUTS.values():
        mine = distribute_tensor(logits, mesh(), placements).requires_grad_()
        alone = logits.clone().requires_grad_()
        stats = row_statistics(mine, distribute_tensor(labels, mesh(), rows))
        wanted = row_statistics(alone, labels)
        assert stats.logp.placements == tuple(rows)
        (stats.logp * stats.entropy + stats.max_prob).sum().backward()
        (wanted.logp * wanted.entropy + wanted.max_prob).sum().backward()
        torch.testing.assert_close(mine.grad.full_tensor(), alone.grad)


def nothing_to_count() -> None:
    logits, labels = batch()
    labels[:] = -100
    for placements, rows in LAYOUTS.values():
        mine = distribute_tensor(logits, mesh(), placements).requires_grad_()
        loss = deft_loss(mine, distribute_tensor(labels, mesh(), rows))
        loss.backward()
        assert loss.full_tensor().item() == 0.0 and not mine.grad.full_tensor().any()


def all_rows_are_one_batch() -> None:
    """Where ranks count different numbers of rows, F.cross_entropy averages their means; we count rows, as
    both do for the whole tensor."""
    logits, labels = batch()
    logits, labels = logits[:2], labels[:2]
    lying = [Shard(0), Replicate()]
    x, y = distribute_tensor(logits, mesh(), lying), distribute_tensor(labels, mesh(), lying)
    whole = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(deft_loss(x, y, objective="nll").full_tensor(), whole)
    labels = labels.clamp(min=0)
    y = distribute_tensor(labels, mesh(), lying)
    theirs = F.cross_entropy(x.movedim(-1, 1), y).full_tensor()
    torch.testing.assert_close(deft_loss(x, y, objective="nll").full_tensor(), theirs)


def what_is_refused() -> None:
    logits, labels = batch()
    rows = distribute_tensor(labels, mesh(), [Shard(0), Shard(1)])
    both = distribute_tensor(logits, mesh(), [Shard(0), Shard(1)])
    with pytest.raises(ValueError, match="shift: the time dimension is sharded"):
        deft_loss(both, rows, shift=True)
    with pytest.raises(ValueError, match="shift: the time dimension is sharded"):
        row_statistics(both, rows, shift=True)
    with pytest.raises(ValueError, match="cayley's mean p over rows that two mesh dimensions shard"):
        deft_loss(both, rows, objective="cayley")
    with pytest.raises(ValueError, match="a band on p with a mean over rows that are sharded"):
        deft_loss(both, rows, objective=objectives.deft().within("p>=0.1"))
    with pytest.raises(TypeError, match="labels: the logits are a DTensor with sharded rows"):
        deft_loss(both, labels)
    with pytest.raises(TypeError, match="token_weight: the logits are a DTensor with sharded rows"):
        deft_loss(both, rows, token_weight=torch.ones(B, T))
    with pytest.raises(ValueError, match="group: the logits are a DTensor"):
        deft_loss(both, rows, group=dist.group.WORLD)
    with pytest.raises(ValueError, match="the vocabulary is sharded over the mesh dimensions"):
        deft_loss(distribute_tensor(logits, mesh(), [Shard(2), Shard(2)]), labels)
    partial = DTensor.from_local(logits, mesh(), [Partial(), Replicate()])
    with pytest.raises(ValueError, match="logits: expected Shard or Replicate placements"):
        deft_loss(partial, labels)


def messages_of_a_sharded_vocabulary() -> None:
    """The states' all-gather and no other: the mesh says where the columns lie."""
    logits, labels = batch()
    mine = distribute_tensor(logits, mesh(), [Replicate(), Shard(2)])
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        deft_loss(mine, labels)
    kind = "nccl:" if ranks.device() == "cuda" else "gloo:"
    events = [event for event in seen.events() if event.name.startswith(kind)]
    assert [math.prod(event.input_shapes[0]) for event in events] == [(B * T + 1) * 5]


def compiled() -> None:
    """The graph breaks where the layout is read; the result does not."""
    logits, labels = batch()
    placements, rows = LAYOUTS["vocabulary"]
    mine = distribute_tensor(logits, mesh(), placements).requires_grad_()
    alone = logits.clone().requires_grad_()
    loss = torch.compile(deft_loss, backend="aot_eager")(mine, distribute_tensor(labels, mesh(), rows))
    wanted = deft_loss(alone, labels)
    torch.testing.assert_close(loss.full_tensor(), wanted)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad.full_tensor(), alone.grad)


CASES = [
    every_layout,
    statistics,
    nothing_to_count,
    all_rows_are_one_batch,
    what_is_refused,
    messages_of_a_sharded_vocabulary,
    compiled,
]


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_in_four_processes(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
