"""The linear call with its head split between ranks, in real processes, against the whole head in one.

FSDP2, DDP and DTensor heads without a group are in `test_linear_data_parallel`.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from torch import Tensor

from deft_kernels import FusedLinearDEFTLoss, VocabShard, fused_linear_deft_loss, objectives

N, D, V = 11, 8, 37
# Uneven; with three ranks one has nothing at all.
WIDTHS = {2: (20, 17), 3: (20, 0, 17)}
CHUNKS = 3


def head() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels), the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    made = (torch.randn(*shape, generator=generator) for shape in ((N, D), (V, D), (V,)))
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[2] = labels[7] = -100
    return tuple(x.to(ranks.device()) for x in (*made, labels))


def own(tensor: Tensor) -> Tensor:
    """This rank's rows of the head."""
    return tensor.split(WIDTHS[dist.get_world_size()])[dist.get_rank()]


def budget(dtype: torch.dtype = torch.float32) -> int:
    """For CHUNKS chunks of the rows that count, whatever the rank's width."""
    return -(-V // dist.get_world_size()) * dtype.itemsize * -(-(N - 2) // CHUNKS)


def compare(wanted: tuple[bool, bool, bool] = (True, True, True), **keywords) -> None:
    """Loss and gradients; the whole head in one process is the linear call without a group."""
    hidden, weight, bias, labels = head()
    labels = keywords.pop("labels", labels)
    dtype = keywords.pop("dtype", torch.float32)
    backend = keywords.pop("backend", "torch")
    inputs = [x.to(dtype) for x in (hidden, weight, bias)]
    mine = [inputs[0].clone(), own(inputs[1]).clone(), own(inputs[2]).clone()]
    alone = [x.clone() for x in inputs]
    for parts in (mine, alone):
        for x, want in zip(parts, wanted, strict=True):
            x.requires_grad_(want)
    loss, stats = fused_linear_deft_loss(
        mine[0], mine[1], labels, mine[2], return_stats=True, chunk_bytes=budget(dtype), backend=backend,
        group=dist.group.WORLD, **keywords,
    )  # fmt: skip
    whole, whole_stats = fused_linear_deft_loss(
        alone[0], alone[1], labels, alone[2], return_stats=True, **keywords
    )
    torch.testing.assert_close(loss, whole, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(stats, whole_stats, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    if not any(wanted):
        return
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss.device)
    loss.backward(upstream)
    whole.backward(upstream)
    # bf16: products of either way are rounded to it, and so are the parts of dhidden.
    close = {"rtol": 1e-5, "atol": 2e-6} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    if wanted[0]:
        torch.testing.assert_close(mine[0].grad, alone[0].grad, **close)
    for i in (1, 2):
        if wanted[i]:
            torch.testing.assert_close(mine[i].grad, own(alone[i].grad), **close)


def focal(r):
    return -((1 - r.logp.exp()) ** 2) * r.logp * (1 + r.max_prob)


def objectives_and_reductions() -> None:
    weight = torch.linspace(0.5, 2.0, V, device=ranks.device())
    token_weight = torch.linspace(0.1, 1.0, N, device=ranks.device())
    all_of_it = {"class_weight": weight, "token_weight": token_weight, "label_smoothing": 0.1}
    all_of_it |= {"z_loss": 1e-3, "softcap": 9.0, "logit_scale": 0.7}
    exact = objectives.deft(math.inf, detach=False)
    for reduction in ("mean", "sum", "none"):
        for objective in ("nll", "deft", "cayley", "eaft", exact, focal, objectives.deft().within("p>=0.02")):
            compare(objective=objective, reduction=reduction)
        compare(reduction=reduction, **all_of_it)
    compare(num_items=4.0, shift=True)


def frozen_parts() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, False), (True, True, False)):
        for reduction in ("mean", "none"):
            compare(wanted, reduction=reduction)


def kernels() -> None:
    _, _, _, labels = head()
    labels[:8] = -100
    compare(backend="triton", labels=labels)
    compare(backend="triton", labels=labels, reduction="none", objective="eaft")


def ignored_rows() -> None:
    _, _, _, labels = head()
    compare(labels=labels.clamp(min=0))
    for objective in ("deft", "cayley"):
        compare(labels=torch.full_like(labels, -100), objective=objective)
        compare(labels=torch.full_like(labels, -100), objective=objective, reduction="none")


def half_precision() -> None:
    compare(dtype=torch.bfloat16)
    compare(dtype=torch.bfloat16, reduction="none")


def messages(call) -> list[tuple[str, int]]:
    """(operation, bytes that this rank sends) of each collective that PyTorch itself saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    kind = "nccl:" if ranks.device() == "cuda" else "gloo:"
    events = [event for event in seen.events() if event.name.startswith(kind)]
    return [(event.name[5:], 4 * math.prod(event.input_shapes[0])) for event in events]


def communication() -> None:
    """One all-gather a chunk, of 5 floats for each of its rows; dhidden once, in fp32 whatever its dtype."""
    hidden, weight, _, labels = head()
    rank, widths = dist.get_rank(), WIDTHS[dist.get_world_size()]
    place = VocabShard(dist.group.WORLD, sum(widths[:rank]), V)
    states, gradient = [4 * 5 * ((N - 2) // CHUNKS + 1)] * CHUNKS, [4 * N * D]
    for dtype in (torch.float32, torch.bfloat16):
        leaf, local = hidden.to(dtype).requires_grad_(), own(weight).to(dtype).requires_grad_()
        for reduction in ("mean", "none"):
            kept: list[Tensor] = []

            def forward(leaf=leaf, local=local, reduction=reduction, kept=kept, dtype=dtype):
                given = {"reduction": reduction, "chunk_bytes": budget(dtype), "group": place}
                kept.append(fused_linear_deft_loss(leaf, local, labels, **given))

            there = [size for _, size in messages(forward)]
            back = [size for _, size in messages(lambda kept=kept: kept[0].sum().backward())]
            if reduction == "mean":
                assert (there, back) == (states + gradient, [])
            else:
                assert (there, back) == (states, gradient)
        # A frozen trunk has no gradient to add up.
        sent = messages(
            lambda leaf=leaf, local=local, dtype=dtype: fused_linear_deft_loss(
                leaf.detach(), local, labels, chunk_bytes=budget(dtype), group=place
            )
        )
        assert [size for _, size in sent] == states


def compiled() -> None:
    hidden, weight, _, labels = head()
    for reduction in ("mean", "none"):
        eager, traced = (hidden.clone().requires_grad_() for _ in range(2))
        local = own(weight)

        def loss(x, w, y, reduction=reduction):
            return fused_linear_deft_loss(x, w, y, reduction=reduction, group=dist.group.WORLD)

        torch.compiler.reset()
        got = torch.compile(loss, fullgraph=True, backend="aot_eager")(traced, local, labels)
        wanted = loss(eager, local, labels)
        torch.testing.assert_close(got, wanted)
        got.sum().backward()
        wanted.sum().backward()
        torch.testing.assert_close(traced.grad, eager.grad)


def module_and_refusals() -> None:
    hidden, weight, bias, labels = head()
    criterion = FusedLinearDEFTLoss(group=dist.group.WORLD)
    loss = criterion(hidden, own(weight), labels, own(bias))
    torch.testing.assert_close(loss, fused_linear_deft_loss(hidden, weight, labels, bias))
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh(ranks.device(), (dist.get_world_size(),))
    with pytest.raises(ValueError, match="group: weight and bias are to be this rank's own rows"):
        sharded = distribute_tensor(weight, mesh, [Shard(0)])
        fused_linear_deft_loss(hidden, sharded, labels, group=dist.group.WORLD)
    with pytest.raises(ValueError, match=rf"class_weight: expected one weight a class, shape \({V},\)"):
        wrong = torch.ones(len(own(weight)), device=ranks.device())
        fused_linear_deft_loss(hidden, own(weight), labels, class_weight=wrong, group=dist.group.WORLD)
    if ranks.device() == "cpu":
        labels[3] = V
        with pytest.raises(IndexError, match=rf"labels: {V} at flat position 3"):
            fused_linear_deft_loss(hidden, own(weight), labels, group=dist.group.WORLD)


TWO_RANKS = [
    objectives_and_reductions,
    frozen_parts,
    kernels,
    ignored_rows,
    half_precision,
    communication,
    compiled,
    module_and_refusals,
]
# With a rank that has no rows of the head.
THREE_RANKS = [objectives_and_reductions, ignored_rows, communication]
CASES = {2: TWO_RANKS, 3: THREE_RANKS}


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run(CASES[count], count)


@pytest.mark.parametrize(
    ("count", "case"), [(count, case.__name__) for count, cases in CASES.items() for case in cases]
)
def test_in_processes(case, count):
    for rank, outcome in enumerate(outcomes(count)[case]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
