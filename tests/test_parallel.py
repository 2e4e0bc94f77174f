"""The loss over a vocabulary split between ranks, in real processes, against the whole vocabulary at once.

Every rank knows the whole logits, passes its columns, and compares with the float64 oracle on the whole.
"""

from __future__ import annotations

import math
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from rows import KINDS, gradient_excess, make
from torch import Tensor

from deft_kernels import DEFTLoss, VocabShard, deft_loss, objectives

N, V = 7, 37
# Uneven; with three ranks one has nothing at all, as DTensor's chunks may leave it.
WIDTHS = {2: (20, 17), 3: (20, 0, 17)}
BACKENDS = ("torch", "triton")
OBJECTIVES = {
    "nll": "nll",
    "neg_prob": "neg_prob",
    "tsallis": objectives.tsallis(0.5),
    "deft": "deft",
    "shannon": objectives.deft(1),
    "max": objectives.deft(math.inf),
    "exact": objectives.deft(detach=False),
    "exact shannon": objectives.deft(1, detach=False),
    "exact max": objectives.deft(math.inf, detach=False),
    "cayley": "cayley",
    "rational": "rational",
    "dft": "dft",
    "eaft": "eaft",
    "exact eaft": objectives.eaft(detach=False),
    "band": objectives.deft().within("p>=0.05"),
}


def columns(whole: Tensor) -> Tensor:
    """This rank's columns."""
    widths = WIDTHS[dist.get_world_size()]
    return whole.split(widths, dim=-1)[dist.get_rank()]


def shard() -> VocabShard:
    widths, rank = WIDTHS[dist.get_world_size()], dist.get_rank()
    return VocabShard(dist.group.WORLD, sum(widths[:rank]), V)


def rows(kind: str, dtype: torch.dtype = torch.float32, n: int = N) -> tuple[Tensor, Tensor]:
    logits, labels = make(kind, n, V, dtype)
    return logits.to(ranks.device()), labels.to(ranks.device())


def compare(whole: Tensor, labels: Tensor, backend: str, oracle: Tensor | None = None, **keywords) -> None:
    """Loss, statistics and gradient against the oracle for a random upstream; the loss alike on all ranks."""
    with_grad = columns(whole).clone().requires_grad_()
    given = {**keywords, "backend": backend, "group": dist.group.WORLD}
    loss, stats = deft_loss(with_grad, labels, return_stats=True, **given)
    exact = (whole if oracle is None else oracle).double().requires_grad_()
    known = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    wanted, wanted_stats = deft_loss(exact, labels, return_stats=True, backend="reference", **known)
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3)).to(loss.device)
    same_everywhere(loss.detach())
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), wanted, rtol=3e-5, atol=2e-7, equal_nan=True)
    for name, value in wanted_stats._asdict().items():
        if name == "alpha" and keywords.get("objective") in ("dft", "eaft"):
            continue  # the oracle's convention for a weighted NLL differs, as in the single process
        mine = getattr(stats, name)
        torch.testing.assert_close(mine.double(), value.double(), rtol=3e-5, atol=1e-6, equal_nan=True,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
    loss.backward(upstream)
    wanted.backward(upstream.double())
    assert with_grad.grad.shape == columns(whole).shape
    excess = gradient_excess(with_grad.grad, columns(exact.grad))
    assert excess <= 1.0, f"gradient: {excess}"


def same_everywhere(tensor: Tensor) -> None:
    """Bit for bit."""
    parts = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, tensor.contiguous())
    for part in parts:
        assert torch.equal(part, parts[0]) or part.isnan().equal(parts[0].isnan())


def every_objective() -> None:
    for name, objective in OBJECTIVES.items():
        whole, labels = rows("peaked" if name == "band" else "plain")
        compare(whole, labels, "torch", objective=objective)


def every_kind_of_row() -> None:
    for kind in KINDS:
        compare(*rows(kind), "torch", objective="eaft", reduction="none")
        compare(*rows(kind), "torch", objective="nll", reduction="none")


def kernels() -> None:
    """What the kernels do differently for different objectives; few rows, as the interpreter is slow."""
    for name in ("deft", "exact", "exact shannon", "exact max", "cayley"):
        compare(*rows("plain", n=2), "triton", objective=OBJECTIVES[name])
    for kind in ("confident", "masked", "shifted"):
        compare(*rows(kind, n=2), "triton", objective="eaft", reduction="none")
    everything("triton", n=2)


def everything(backend: str, n: int = N) -> None:
    """All weights, transformations and extra terms at once, with some rows ignored."""
    whole, labels = rows("peaked", n=n)
    labels[0] = -100
    weight = torch.rand(V, generator=torch.Generator().manual_seed(4)).to(whole.device)
    weight[3] = 0.0
    token_weight = torch.linspace(0.5, 2.0, n, device=whole.device)
    common = {"softcap": 9.0, "temperature": 1.3, "z_loss": 1e-2, "label_smoothing": 0.1}
    common |= {"weight": weight, "token_weight": token_weight}
    compare(whole, labels, backend, objective="deft", **common)
    if backend == "torch":
        for objective in ("nll", OBJECTIVES["exact max"], OBJECTIVES["exact eaft"]):
            for reduction in ("mean", "sum", "none"):
                compare(whole, labels, backend, objective=objective, reduction=reduction, **common)
        compare(whole, labels, backend, num_items=3.0, **common)


def everything_at_once() -> None:
    everything("torch")


def gradient_by_token_weight() -> None:
    whole, labels = rows("plain")
    token_weight = torch.rand(N, device=whole.device).requires_grad_()
    deft_loss(columns(whole), labels, token_weight=token_weight, group=dist.group.WORLD).backward()
    ours, token_weight.grad = token_weight.grad, None
    deft_loss(whole, labels, token_weight=token_weight).backward()
    torch.testing.assert_close(ours, token_weight.grad)


def gradient_made_in_either_pass() -> None:
    """And in place, with half-precision logits; an upstream that is not a power of two."""
    for backend in BACKENDS:
        whole, labels = rows("confident", torch.bfloat16, n=2)
        for in_forward in (True, False):
            for inplace in (True, False):
                leaf = columns(whole).clone().requires_grad_()
                keywords = {"grad_in_forward": in_forward, "inplace": inplace, "backend": backend}
                logits = leaf * 1.0
                (3.0 * deft_loss(logits, labels, group=dist.group.WORLD, **keywords)).backward()
                exact = whole.double().requires_grad_()
                (3.0 * deft_loss(exact, labels, backend="reference")).backward()
                # A gradient made in the forward, in place, is scaled: a second rounding.
                most = 2.0 if in_forward and inplace else 1.0
                assert gradient_excess(leaf.grad, columns(exact.grad)) <= most


def double_precision() -> None:
    whole, labels = rows("plain", torch.float64)
    mine, alone = columns(whole).clone().requires_grad_(), whole.clone().requires_grad_()
    loss = deft_loss(mine, labels, objective="eaft", group=dist.group.WORLD)
    wanted = deft_loss(alone, labels, objective="eaft", backend="reference")
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0.0)
    loss.backward()
    wanted.backward()
    torch.testing.assert_close(mine.grad, columns(alone.grad), rtol=1e-11, atol=1e-15)


def confident_digits() -> None:
    """p = 1 - 1e-7, the largest logit on one rank and the remainder on the others."""
    for backend in BACKENDS:
        whole, labels = rows("confident", n=4)
        exact = whole.double()
        keywords = {"objective": "nll", "reduction": "none"}
        loss = deft_loss(columns(whole), labels, backend=backend, group=dist.group.WORLD, **keywords)
        wanted = deft_loss(exact, labels, backend="reference", **keywords)
        assert wanted.min() < 1e-6
        torch.testing.assert_close(loss.double(), wanted, rtol=1e-5, atol=0.0)


def ignored_rows() -> None:
    whole, labels = rows("plain", n=3)
    for ignored in ([0], [0, 1, 2]):
        some = labels.clone()
        some[ignored] = -100
        for backend in BACKENDS:
            compare(whole, some, backend)
    # A class of the vocabulary as ignore_index, and one that a label counted from a shard's start becomes.
    compare(whole, labels, "torch", ignore_index=int(labels[1]))
    compare(whole, labels, "torch", ignore_index=int(labels[1]) - WIDTHS[dist.get_world_size()][0])


def no_rows() -> None:
    for backend in BACKENDS:
        for objective in ("deft", "cayley", objectives.cayley(batch_group=dist.group.WORLD)):
            logits = columns(torch.zeros(2, 0, V, device=ranks.device())).clone().requires_grad_()
            labels = torch.zeros(2, 0, dtype=torch.int64, device=logits.device)
            loss = deft_loss(logits, labels, objective=objective, backend=backend, group=dist.group.WORLD)
            loss.backward()
            assert loss.item() == 0.0 and logits.grad.shape == logits.shape


def masked_shards() -> None:
    """All of one rank's columns masked, by -inf or by the finite masks that models use; exact and tied
    gradients, so that every term meets the mask."""
    for mask in (-math.inf, -1e9, torch.finfo(torch.float32).min):
        whole, labels = rows("plain", n=3)
        first = WIDTHS[dist.get_world_size()][0]
        labels = labels % first
        labels[0], whole[0, :2] = 1, 9.0  # two tied maxima, of which one is the target
        whole[:2, first:] = mask
        for name in ("deft", "exact eaft", "exact max"):
            compare(whole, labels, "torch", objective=OBJECTIVES[name])
        compare(whole[:2], labels[:2], "triton", objective=OBJECTIVES["exact max"], reduction="none")
    # The target itself masked, on the other rank.
    whole, labels = rows("plain", n=2)
    labels[:], whole[0, 0] = 0, -math.inf
    for backend in BACKENDS:
        compare(whole, labels, backend)


def tied_maxima_on_several_ranks() -> None:
    whole, labels = rows("plain", n=2)
    whole[:, [1, 19, 20, 36]] = 7.0
    labels[:] = torch.tensor([20, 5])
    for backend in BACKENDS:
        compare(whole, labels, backend, objective=OBJECTIVES["exact max"])


def nan_stays_in_its_row() -> None:
    for backend in BACKENDS:
        whole, labels = rows("plain", n=2)
        whole[0, 30] = math.nan
        logits = columns(whole).clone().requires_grad_()
        loss = deft_loss(logits, labels, reduction="none", backend=backend, group=dist.group.WORLD)
        loss.sum().backward()
        assert loss[0].isnan() and not loss[1].isnan()
        assert logits.grad[0].isnan().all() and not logits.grad[1].isnan().any()


def wrong_label_raises_everywhere() -> None:
    """No rank waits for another: on the CPU all raise."""
    whole, labels = rows("plain")
    for wrong in (V, -1):
        labels[2] = wrong
        if ranks.device() == "cpu":
            with pytest.raises(
                IndexError, match=rf"labels: {wrong} at flat position 2 is outside \[0, {V}\)"
            ):
                deft_loss(columns(whole), labels, group=dist.group.WORLD)
        else:
            loss = deft_loss(columns(whole), labels, group=dist.group.WORLD, reduction="none")
            assert loss[2].isnan() and loss.isnan().sum() == 1


def own_objective() -> None:
    """Every statistic differentiable, by way of the gathered states."""

    def objective(r):
        return -r.logp * r.collision + 0.1 * r.entropy - 0.3 * r.max_prob + 0.01 * r.lse

    for backend in BACKENDS:
        whole, labels = rows("plain", n=3)
        labels[1] = -100
        logits, exact = columns(whole).clone().requires_grad_(), whole.double().requires_grad_()
        loss = deft_loss(logits, labels, objective=objective, backend=backend, group=dist.group.WORLD)
        wanted = deft_loss(exact, labels, objective=objective, backend="reference")
        torch.testing.assert_close(loss.double(), wanted, rtol=3e-5, atol=1e-7)
        loss.backward()
        wanted.backward()
        assert gradient_excess(logits.grad, columns(exact.grad)) <= 1.0


def messages(call) -> list[tuple[str, int]]:
    """(operation, bytes that this rank sends) of each collective that PyTorch itself saw."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as seen:
        call()
    kind = "nccl:" if ranks.device() == "cuda" else "gloo:"
    events = [event for event in seen.events() if event.name.startswith(kind)]
    return [(event.name[5:], 4 * math.prod(event.input_shapes[0])) for event in events]


def communication() -> None:
    """[N + 1, 5] floats a rank in the forward, 6 with smoothing or exact max p, 7 with both; nothing else."""
    whole, labels = rows("plain")
    logits, world = columns(whole).clone().requires_grad_(), dist.group.WORLD
    new = dist.new_group(list(range(dist.get_world_size())))
    assert len(messages(lambda: deft_loss(logits, labels, group=new))) == 2  # once asks where the columns lie
    both = {"label_smoothing": 0.1, "objective": OBJECTIVES["exact max"]}
    for keywords, size in (({}, 5), ({"objective": "eaft"}, 5), ({"label_smoothing": 0.1}, 6), (both, 7)):
        for group in (new, shard()):
            kept = []
            sent = messages(lambda: kept.append(deft_loss(logits, labels, group=group, **keywords)))  # noqa: B023
            assert [bytes for _, bytes in sent] == [4 * (N + 1) * size], sent
            assert "all_gather" in sent[0][0] or "allgather" in sent[0][0]
            assert messages(lambda: kept[0].backward()) == []  # noqa: B023
    batch = objectives.cayley(batch_group=world)
    sent = messages(lambda: deft_loss(logits, labels, objective=batch, group=shard()))
    assert sorted(bytes for _, bytes in sent) == [8, 4 * (N + 1) * 5]


def place_is_checked() -> None:
    whole, labels = rows("plain")
    local, world = columns(whole), dist.group.WORLD
    for wrong in (VocabShard(world, -1, V), VocabShard(world, V - local.shape[-1] + 1, V)):
        with pytest.raises(ValueError, match="group: VocabShard.*has no place for"):
            deft_loss(local, labels, group=wrong)
    with pytest.raises(TypeError, match="group: expected a torch.distributed.ProcessGroup, got str"):
        deft_loss(local, labels, group="world")
    with pytest.raises(ValueError, match="group: not available with backend="):
        deft_loss(local, labels, group=world, backend="reference")
    with pytest.raises(ValueError, match=rf"weight: expected one weight a class, shape \({V},\)"):
        deft_loss(local, labels, group=world, weight=torch.ones(local.shape[-1], device=local.device))
    with pytest.raises(ValueError, match='batch_group: not available with backend="reference"'):
        objective = objectives.cayley(batch_group=world)
        deft_loss(whole, labels, objective=objective, backend="reference")


def module() -> None:
    whole, labels = rows("plain")
    loss = DEFTLoss(group=shard())(columns(whole), labels)
    torch.testing.assert_close(loss, deft_loss(whole, labels))


def cayley_over_data_parallel_ranks() -> None:
    """Every rank has rows of its own, a different number of them; then rank 0 has none that counts."""
    rank, world = dist.get_rank(), dist.get_world_size()
    whole, labels = rows("peaked", n=4 * world)
    without = labels.clone()
    without[:4] = -100
    taken = torch.cat([torch.arange(4 * r, 4 * r + 4 - r) for r in range(world)]).to(labels.device)
    mine, first = slice(4 * rank, 4 * rank + 4 - rank), sum(4 - r for r in range(rank))
    for backend in BACKENDS:
        for known in (labels, without):
            keywords = {"reduction": "none", "backend": backend}
            over_all = deft_loss(whole[taken], known[taken], objective="cayley", **keywords)
            objective = objectives.cayley(batch_group=dist.group.WORLD)
            ours = deft_loss(whole[mine], known[mine], objective=objective, **keywords)
            torch.testing.assert_close(ours, over_all[first : first + 4 - rank])
    with pytest.raises(ValueError, match="batch_group: mean_prob is given"):
        objectives.cayley(mean_prob=0.5, batch_group=dist.group.WORLD)


def compiled() -> None:
    """No graph break, with the group itself and with a place that is given."""
    whole, labels = rows("plain")
    for group in (dist.group.WORLD, shard()):
        for keywords in ({}, {"reduction": "none", "objective": "eaft", "label_smoothing": 0.1}):
            eager, traced = (columns(whole).clone().requires_grad_() for _ in range(2))

            def loss(logits, labels, group=group, keywords=keywords):
                return deft_loss(logits, labels, group=group, **keywords)

            torch.compiler.reset()
            got = torch.compile(loss, fullgraph=True, backend="aot_eager")(traced, labels)
            wanted = loss(eager, labels)
            torch.testing.assert_close(got, wanted)
            got.sum().backward()
            wanted.sum().backward()
            torch.testing.assert_close(traced.grad, eager.grad)


TWO_RANKS = [
    every_objective,
    every_kind_of_row,
    kernels,
    everything_at_once,
    gradient_by_token_weight,
    gradient_made_in_either_pass,
    double_precision,
    confident_digits,
    ignored_rows,
    no_rows,
    masked_shards,
    tied_maxima_on_several_ranks,
    nan_stays_in_its_row,
    wrong_label_raises_everywhere,
    own_objective,
    communication,
    place_is_checked,
    module,
    cayley_over_data_parallel_ranks,
    compiled,
]
# With a rank that has no columns.
THREE_RANKS = [
    every_objective,
    everything_at_once,
    gradient_made_in_either_pass,
    ignored_rows,
    no_rows,
    tied_maxima_on_several_ranks,
    wrong_label_raises_everywhere,
    own_objective,
    communication,
    cayley_over_data_parallel_ranks,
]
CASES = {2: TWO_RANKS, 3: THREE_RANKS}


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run(CASES[count], count)


@pytest.mark.parametrize(
    ("count", "case"), [(count, case.__name__) for count, cases in CASES.items() for case in cases]
)
def test_in_processes(count, case):
    for rank, outcome in enumerate(outcomes(count)[case]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
