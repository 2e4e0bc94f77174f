"""What only all ranks together can see: columns that overlap, move or are missing, and calls that differ.

With DEFT_KERNELS_VALIDATE=1 one digest is compared before anything else is sent; without it a row that goes
with the states tells of columns, labels and settings. Every rank raises, and none waits for another.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
from rows import make
from sampling import first_of
from torch import Tensor

from deft_kernels import VocabShard, deft_loss, fused_linear_deft_loss, objectives, row_statistics
from deft_kernels.core import agreement

N, D = 5, 4
# Columns of each rank, one after another over the same group. First those that one rank sees and another does
# not: 20 columns, 22 and 21 over two ranks; then one that holds more than it did, less, none, and as before.
WIDTHS = {
    2: [(10, 10), (11, 11), (11, 10), (10, 10), (10, 14), (8, 12), (24, 0), (0, 24), (10, 10)],
    3: [(10, 0, 10), (11, 0, 11), (11, 0, 10), (7, 7, 7), (10, 0, 10), (0, 0, 5), (0, 5, 0)],
}


def world() -> dist.ProcessGroup:
    return dist.group.WORLD


def split(whole: Tensor, widths: tuple[int, ...], dim: int = -1) -> Tensor:
    return whole.split(widths, dim)[dist.get_rank()]


def rows(size: int, n: int = N) -> tuple[Tensor, Tensor]:
    """Logits and labels; the last label is the last column."""
    logits, labels = make("plain", n, size, torch.float32, seed=size)
    labels[-1] = size - 1
    return logits.to(ranks.device()), labels.to(ranks.device())


def fresh() -> dist.ProcessGroup:
    """A group that knows of no columns yet."""
    return dist.new_group(list(range(dist.get_world_size())))


@contextmanager
def validation() -> Iterator[None]:
    os.environ["DEFT_KERNELS_VALIDATE"] = "1"
    try:
        yield
    finally:
        del os.environ["DEFT_KERNELS_VALIDATE"]


@contextmanager
def as_on_a_device() -> Iterator[None]:
    """The host does not look at what it would have to wait for."""
    before = agreement._on_host
    agreement._on_host = lambda device: False
    try:
        yield
    finally:
        agreement._on_host = before


def raises_everywhere(call: Callable[[], object], match: str) -> None:
    """The same error on every rank; then a call that is right, to show that no message is left over."""
    with pytest.raises((ValueError, RuntimeError), match=match):
        call()
    still_in_step()


def still_in_step() -> None:
    whole, labels = rows(20)
    widths = WIDTHS[dist.get_world_size()][0]
    place = VocabShard(world(), sum(widths[: dist.get_rank()]), 20)
    torch.testing.assert_close(deft_loss(split(whole, widths), labels, group=place), deft_loss(whole, labels))


def check_loss(widths: tuple[int, ...], group: dist.ProcessGroup, **keywords) -> None:
    size = sum(widths)
    whole, labels = rows(size)
    weight = torch.linspace(0.5, 2.0, size, device=whole.device) if keywords.pop("weighted", False) else None
    mine, alone = split(whole, widths).clone().requires_grad_(), whole.clone().requires_grad_()
    loss = deft_loss(mine, labels, group=group, weight=weight, **keywords)
    wanted = deft_loss(alone, labels, weight=weight, **keywords)
    torch.testing.assert_close(loss, wanted)
    loss.sum().backward()
    wanted.sum().backward()
    torch.testing.assert_close(mine.grad, split(alone.grad, widths))


def vocabularies_of_several_sizes() -> None:
    for keywords in (
        {},
        {"weighted": True, "label_smoothing": 0.1},
        {"reduction": "none", "objective": "eaft"},
        {"objective": lambda r: -r.logp * r.collision},
    ):
        group = fresh()
        for widths in WIDTHS[dist.get_world_size()]:
            check_loss(widths, group, **keywords)
    group = fresh()
    for widths in WIDTHS[dist.get_world_size()][:3]:  # what differs is common to both backends
        check_loss(widths, group, backend="triton")


def vocabularies_of_several_sizes_under_validation() -> None:
    with validation():
        vocabularies_of_several_sizes()


def heads_of_several_sizes() -> None:
    for reduction in ("mean", "none"):
        group = fresh()
        for widths in WIDTHS[dist.get_world_size()]:
            size = sum(widths)
            generator = torch.Generator().manual_seed(size)
            hidden = torch.randn(N, D, generator=generator).to(ranks.device())
            head = torch.randn(size, D, generator=generator).to(hidden.device)
            labels = torch.randint(0, size, (N,), generator=generator).to(hidden.device)
            leaf, mine = hidden.clone().requires_grad_(), split(head, widths, 0).clone().requires_grad_()
            alone, whole = hidden.clone().requires_grad_(), head.clone().requires_grad_()
            keywords = {"reduction": reduction, "chunk_bytes": 2 * size * 4}
            loss = fused_linear_deft_loss(leaf, mine, labels, group=group, **keywords)
            wanted = fused_linear_deft_loss(alone, whole, labels, **keywords)
            torch.testing.assert_close(loss, wanted)
            loss.sum().backward()
            wanted.sum().backward()
            torch.testing.assert_close(leaf.grad, alone.grad)
            torch.testing.assert_close(mine.grad, split(whole.grad, widths, 0))


def statistics_of_several_sizes() -> None:
    group = fresh()
    for widths in WIDTHS[dist.get_world_size()]:
        whole, labels = rows(sum(widths))
        found = row_statistics(split(whole, widths), labels, group=group)
        torch.testing.assert_close(found.logp, row_statistics(whole, labels).logp)


def no_message_more() -> None:
    """Another size is found out by the message that is sent anyway, and then the call is made again."""
    widths = WIDTHS[dist.get_world_size()]
    group = fresh()
    check_loss(widths[0], group)
    for size, count in ((widths[0], 1), (widths[1], 2), (widths[1], 1)):
        whole, labels = rows(sum(size))
        labels.clamp_(max=19)  # a label that the known columns do not have tells beforehand
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
            deft_loss(split(whole, size), labels, group=group)
        assert sum(event.name.startswith(("gloo:", "nccl:")) for event in seen.events()) == count


def columns_that_do_not_fit_together() -> None:
    """Overlapping, missing, of another V; each rank's own place is possible."""
    whole, labels = rows(20)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    for start, width, size in ((8, 10, 20), (12, 8, 20), (10, 10, 21), (0, 10, 20)):
        place = VocabShard(world(), start, size) if rank == last else VocabShard(world(), 0, 20)
        local = whole[:, : width if rank == last else 10 if rank == 0 else 0]
        for keywords in ({}, {"reduction": "none"}, {"backend": "triton"}):

            def call(place=place, local=local, keywords=keywords):
                return deft_loss(local, labels % 10, group=place, **keywords)

            raises_everywhere(call, "group: the ranks' columns overlap or leave some out: rank 0 has")
            with validation():
                raises_everywhere(call, "group: the ranks' columns overlap or leave some out: rank 0 has")
            with as_on_a_device():
                assert call().isnan().all()


def columns_in_another_order() -> None:
    """The ranks of a group in any order, and zero columns anywhere."""
    whole, labels = rows(20)
    rank, last = dist.get_rank(), dist.get_world_size() - 1
    start, end = {0: (13, 20), last: (0, 13)}.get(rank, (5, 5))
    for context in (validation, as_on_a_device, fresh):
        with validation() if context is validation else as_on_a_device():
            loss = deft_loss(whole[:, start:end], labels, group=VocabShard(world(), start, 20))
            torch.testing.assert_close(loss, deft_loss(whole, labels))


def what_differs() -> dict[str, tuple[dict, dict]]:
    """Keywords on rank 0 and on the others, by the name of what differs."""
    weight = torch.linspace(0.5, 2.0, 20, device=ranks.device())
    rows = torch.linspace(0.1, 0.9, N, device=ranks.device())
    alpha, other = ({"objective": objectives.tsallis(x)} for x in (rows, rows + 0.1))
    logp, near = ({"anchor": 0.5, "reference_logp": x} for x in (-rows, -rows - 0.1))
    what = "objective, its row inputs or reference_logp"
    return {
        what: ({"objective": "deft"}, {"objective": "eaft"}),
        f"{what} ": ({}, {"objective": objectives.deft().within("p>=0.1")}),
        f"{what}  ": ({"objective": "nll"}, alpha),
        f"{what}   ": (alpha, other),
        f"{what}    ": (logp, near),
        "softcap, temperature, z_loss, label_smoothing or anchor": ({"temperature": 1.5}, {}),
        "softcap, temperature, z_loss, label_smoothing or anchor ": ({"label_smoothing": 0.1}, {}),
        "ignore_index": ({"ignore_index": -1}, {}),
        "weight (class weights)": ({"weight": weight}, {"weight": weight * 2}),
        "weight (class weights) ": ({"weight": weight}, {}),
        "return_stats": ({"return_stats": True}, {}),
        "reduction, token_weight or num_items": ({"reduction": "sum"}, {}),
        "reduction, token_weight or num_items ": ({"num_items": 3}, {"num_items": 4}),
    }


def calls_that_differ_are_named() -> None:
    whole, labels = rows(20)
    widths = WIDTHS[dist.get_world_size()][0]
    local = split(whole, widths).requires_grad_()
    first = dist.get_rank() == 0
    with validation():
        for group in (world(), VocabShard(world(), sum(widths[: dist.get_rank()]), 20)):
            for name, given in what_differs().items():
                keywords = given[0] if first else given[1]
                raises_everywhere(
                    lambda group=group, keywords=keywords: deft_loss(local, labels, group=group, **keywords),
                    rf"^group: the ranks differ in {name.strip()}$".replace("(", r"\(")
                    .replace("$", "")
                    .replace("s)", r"s\)"),
                )
            other = labels if first else labels.flip(0)
            raises_everywhere(lambda group=group: deft_loss(local, other, group=group), "differ in labels$")  # noqa: B023
            count = N if first else N - 1
            raises_everywhere(
                lambda group=group, count=count: deft_loss(local[:count], labels[:count], group=group),
                r"differ in the number of rows \(5, 4.*\); labels",
            )
            dtype = torch.float32 if first else torch.float64
            raises_everywhere(
                lambda group=group, dtype=dtype: deft_loss(local.to(dtype), labels, group=group),
                r"differ in the dtype \(torch.float32, torch.float64",
            )


def linear_calls_that_differ_are_named() -> None:
    size, widths = 20, WIDTHS[dist.get_world_size()][0]
    first = dist.get_rank() == 0
    hidden = torch.randn(N, D, device=ranks.device())
    weight = split(torch.randn(size, D, device=hidden.device), widths, 0).requires_grad_()
    labels = torch.arange(N, device=hidden.device)
    with validation():

        def differ(hidden, keywords, match, group=None):
            raises_everywhere(
                lambda: fused_linear_deft_loss(hidden, weight, labels, group=group or world(), **keywords),
                match,
            )

        differ(hidden, {"chunk_bytes": 100 if first else 200}, r"chunk_bytes \(100, 200")
        differ(
            hidden, {"reduction": "mean" if first else "none"}, "the call .hidden, gradient in the forward"
        )
        leaf = hidden.clone().requires_grad_(first)
        differ(leaf, {}, "which gradients are wanted")
        logits = torch.randn(N, widths[dist.get_rank()], device=hidden.device)

        def mixed():
            if first:
                return deft_loss(logits, labels, group=world())
            return fused_linear_deft_loss(hidden, weight, labels, group=world())

        raises_everywhere(mixed, r"differ in the call \(logits, hidden, gradient in the forward")


def a_rank_that_raises_alone() -> None:
    """An argument that is wrong on one rank only: the others do not wait for it."""
    whole, labels = rows(20)
    widths = WIDTHS[dist.get_world_size()][0]
    local, first = split(whole, widths), dist.get_rank() == 0
    place = VocabShard(world(), sum(widths[: dist.get_rank()]), 20)
    wrong = VocabShard(world(), 15, 20)
    weight = torch.ones(20 + first, device=local.device)
    elsewhere = "group: rank 0 raised an error in this call"
    with validation():
        for group, call, own in (
            (place, lambda g: deft_loss(local, labels[: N - first], group=g), "labels: expected shape"),
            (world(), lambda g: deft_loss(local, labels[: N - first], group=g), "labels: expected shape"),
            (
                world(),
                lambda g: deft_loss(local, labels, weight=weight, group=g),
                "weight: expected one weight",
            ),
            (wrong if first else place, lambda g: deft_loss(local, labels, group=g), "has no place for"),
            (place, lambda g: row_statistics(local, labels[: N - first], group=g), "labels: expected shape"),
        ):
            raises_everywhere(lambda call=call, group=group: call(group), own if first else elsewhere)
        raises_everywhere(
            lambda: deft_loss(local, labels, group=world() if first else place),
            "some ranks give a ProcessGroup, others a VocabShard" if first else "differ in the call|columns",
        )


def noticed_without_a_message() -> None:
    """Not by name, but by all; what changes the size of the messages is left to validation."""
    whole, labels = rows(20)
    widths = WIDTHS[dist.get_world_size()][0]
    local, first = split(whole, widths), dist.get_rank() == 0
    place = VocabShard(world(), sum(widths[: dist.get_rank()]), 20)
    match = "the ranks differ in labels, ignore_index, objective or settings"
    for backend in ("torch", "triton"):
        for keywords in ({"objective": "eaft"}, {"temperature": 2.0}, {"z_loss": 0.1}, {"ignore_index": 3}):
            given = {"backend": backend, "group": place} | (keywords if first else {})
            raises_everywhere(lambda given=given: deft_loss(local, labels, **given), match)
            with as_on_a_device():
                assert deft_loss(local, labels, **given).isnan()
        other = labels if first else labels.flip(0)
        raises_everywhere(
            lambda b=backend, other=other: deft_loss(local, other, group=place, backend=b), match
        )
    alpha = torch.linspace(0.1, 0.9, N, device=local.device)
    formulas = ({"objective": "nll"}, {"objective": objectives.tsallis(alpha)})
    for pair in (formulas, ({"anchor": 0.5, "reference_logp": -alpha}, {})):
        raises_everywhere(lambda p=pair: deft_loss(local, labels, group=place, **p[not first]), match)
    # What may differ: where a rank makes its gradient. (Not return_stats, which others have to send for.)
    keywords = {} if first else {"grad_in_forward": False}
    loss = deft_loss(local.clone().requires_grad_(), labels, group=place, **keywords)
    torch.testing.assert_close(loss, deft_loss(whole, labels))


def on_a_device_nobody_waits() -> None:
    """Columns that moved on all ranks are found out, on some: an error there, NaN on the others, no rest."""
    with as_on_a_device():
        count = dist.get_world_size()
        group = fresh()
        first, second = (10, 10, 10)[:count], (12, 11, 13)[:count]
        for widths in (first, second, first):
            check_loss(widths, group)
        third = (10, 11, 10)[:count]
        whole, labels = rows(sum(third))
        labels.clamp_(max=19)
        for backend in ("torch", "triton"):
            if dist.get_rank() == 1:
                with pytest.raises(
                    ValueError, match="this rank holds 11 columns, 10 when.* others hold as many as then"
                ):
                    deft_loss(split(whole, third), labels, group=group, backend=backend)
            else:
                mine = split(whole, third).clone().requires_grad_()
                loss = deft_loss(mine, labels, group=group, backend=backend)
                loss.backward()
                assert loss.isnan() and mine.grad.isnan().all()
    still_in_step()


CASES = [
    vocabularies_of_several_sizes,
    vocabularies_of_several_sizes_under_validation,
    heads_of_several_sizes,
    statistics_of_several_sizes,
    no_message_more,
    columns_that_do_not_fit_together,
    columns_in_another_order,
    calls_that_differ_are_named,
    linear_calls_that_differ_are_named,
    a_rank_that_raises_alone,
    noticed_without_a_message,
    on_a_device_nobody_waits,
]


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run(CASES, count, gpus=False)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("count", first_of([3, 2]))
def test_in_processes(count, case):
    for rank, outcome in enumerate(outcomes(count)[case.__name__]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
