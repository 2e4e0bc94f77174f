"""The linear call in two real processes: a DTensor head, FSDP2, and DDP with nothing to learn on one rank.

All cases share one pair of processes (gloo, CPU), as starting PyTorch takes seconds; each is reported apart.
"""

from __future__ import annotations

import copy
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor, nn

from deft_kernels import fused_linear_deft_loss

RANKS = 2
B, T, D, V = 4, 3, 8, 21  # V does not divide by the ranks: the shards are uneven


class Model(nn.Module):
    """Embedding, one layer, head; the loss is taken inside, where FSDP2 has gathered the weights."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(V, D), nn.Linear(D, D)
        self.head = nn.Linear(D, V)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor, labels: Tensor, **keywords) -> Tensor:
        hidden = torch.tanh(self.layer(self.embedding(ids)))
        return fused_linear_deft_loss(
            hidden, self.head.weight, labels, self.head.bias, shift=True, chunk_bytes=2 * V * 4, **keywords
        )


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, V, (B, T), generator=generator)
    labels = ids.clone()
    labels[0, 1] = labels[3, 2] = -100
    return ids, labels


def model(tied: bool = False) -> Model:
    torch.manual_seed(0)
    return Model(tied)


def own(x: Tensor) -> Tensor:
    """This rank's part of the batch."""
    return x.chunk(RANKS)[dist.get_rank()]


def expected(whole: Model, ids: Tensor, labels: Tensor, **keywords) -> dict[str, Tensor]:
    """Gradients of one process: the mean over ranks of each rank's loss, as DDP and FSDP2 define it."""
    parts = zip(ids.chunk(RANKS), labels.chunk(RANKS), strict=True)
    (sum(whole(i, y, **keywords).mean() for i, y in parts) / RANKS).backward()
    return {name: p.grad for name, p in whole.named_parameters()}


def same(gradients: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        full = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        torch.testing.assert_close(full, wanted[name], msg=lambda text, name=name: f"{name}: {text}")


def fully_sharded(tied: bool, **keywords) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    ids, labels = batch()
    whole = model(tied)
    sharded = fully_shard(copy.deepcopy(whole), mesh=init_device_mesh("cpu", (RANKS,)))
    sharded(own(ids), own(labels), **keywords).mean().backward()
    gradients = {name: p.grad for name, p in sharded.named_parameters()}
    assert all(hasattr(gradient, "full_tensor") for gradient in gradients.values())
    same(gradients, expected(whole, ids, labels, **keywords))


def fsdp2() -> None:
    fully_sharded(tied=False)


def fsdp2_tied() -> None:
    fully_sharded(tied=True)


def fsdp2_recomputed() -> None:
    fully_sharded(tied=False, reduction="none")


def dtensor_head() -> None:
    """The head alone is a DTensor, sharded over V; the rows differ between the ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    _, labels = batch()
    hidden = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
    for placement in (Shard(0), Shard(1), Replicate()):
        whole = model().head
        weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [placement]))
        bias = nn.Parameter(distribute_tensor(whole.bias.detach(), mesh, [Replicate()]))
        mine = own(hidden).clone().requires_grad_()
        fused_linear_deft_loss(mine, weight, own(labels), bias, chunk_bytes=2 * V * 4).backward()
        assert isinstance(weight.grad, DTensor) and weight.grad.placements == (placement,)
        leaf = hidden.clone().requires_grad_()
        losses = [
            fused_linear_deft_loss(h, whole.weight, y, whole.bias)
            for h, y in zip(leaf.chunk(RANKS), labels.chunk(RANKS), strict=True)
        ]
        (sum(losses) / RANKS).backward()
        same({"w": weight.grad, "b": bias.grad}, {"w": whole.weight.grad, "b": whole.bias.grad})
        torch.testing.assert_close(mine.grad, own(leaf.grad) * RANKS)


def dtensor_head_of_equal_rows() -> None:
    """All ranks hold the same rows, as under tensor parallelism: the gradient is each rank's own."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (RANKS,))
    _, labels = batch()
    hidden = torch.randn(B, T, D, generator=torch.Generator().manual_seed(2))
    whole = model().head
    weight = nn.Parameter(distribute_tensor(whole.weight.detach(), mesh, [Shard(0)]))
    fused_linear_deft_loss(hidden, weight, labels).backward()
    fused_linear_deft_loss(hidden, whole.weight, labels).backward()
    same({"w": weight.grad}, {"w": whole.weight.grad})


def dtensor_hidden_is_refused() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    hidden = distribute_tensor(torch.zeros(2, D), init_device_mesh("cpu", (RANKS,)), [Replicate()])
    with pytest.raises(TypeError, match="hidden: is a DTensor"):
        fused_linear_deft_loss(hidden, torch.zeros(V, D), torch.zeros(2, dtype=torch.int64))


def ddp_without_labels_on_one_rank() -> None:
    """Every label ignored on rank 1: its zero stays connected to the graph, so the all-reduce happens."""
    ids, labels = batch()
    labels[B // RANKS :] = -100
    for keywords in ({}, {"reduction": "sum"}, {"objective": "cayley"}):
        whole = model()
        parallel = nn.parallel.DistributedDataParallel(copy.deepcopy(whole))
        parallel(own(ids), own(labels), **keywords).backward()
        gradients = {name: p.grad for name, p in parallel.module.named_parameters()}
        same(gradients, expected(whole, ids, labels, **keywords))


CASES = (
    fsdp2,
    fsdp2_tied,
    fsdp2_recomputed,
    dtensor_head,
    dtensor_head_of_equal_rows,
    dtensor_hidden_is_refused,
    ddp_without_labels_on_one_rank,
)


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_in_two_processes(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
