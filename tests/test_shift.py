"""Labels that lie n positions ahead, in one process and in pieces of a sequence that ranks share."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from sampling import first_of

from deft_kernels import deft_loss, fused_linear_deft_loss, row_statistics
from deft_kernels.parallel import shifted_labels

B, T, V = 2, 12, 17


def problem(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, V, (B, T), generator=generator)
    labels[0, 3] = labels[1, 6] = -100
    return torch.randn(B, T, V, generator=generator).to(device), labels.to(device)


@pytest.mark.parametrize("shift", [0, 1, 2, 5, T - 1, T, T + 3, True, np.int64(3)])
def test_against_slices(shift, backend, device):
    logits, labels = problem(device)
    n = int(shift)
    whole, part = (logits.clone().requires_grad_() for _ in range(2))
    loss = deft_loss(whole, labels, shift=shift, reduction="sum", backend=backend)
    loss.backward()
    expected = deft_loss(
        part[:, : T - n] if n < T else part[:, :0], labels[:, n:], reduction="sum", backend=backend
    )
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(whole.grad, part.grad, rtol=1e-6, atol=1e-7)
    stats = row_statistics(logits, labels, shift=shift, backend=backend)
    assert not stats.logp[:, T - n if n < T else 0 :].any() or n == 0
    head = torch.eye(V, device=device)
    linear = fused_linear_deft_loss(logits, head, labels, shift=shift, reduction="sum", backend=backend)
    torch.testing.assert_close(linear, loss.detach(), rtol=2e-6, atol=1e-6)


def test_labels_without_positions():
    assert deft_loss(torch.randn(2, 0, V), torch.zeros(2, 0, dtype=torch.int64), shift=3) == 0.0


@pytest.mark.parametrize("ignore_index", [2**63 - 1, 2**53 + 1, -(2**63), -(2**53) - 1])
def test_an_ignore_index_that_no_double_holds(ignore_index, backend, device):
    logits, labels = problem(device)
    expected = deft_loss(logits, labels, shift=2, backend=backend)
    labels = labels.masked_fill(labels == -100, ignore_index)
    loss = deft_loss(logits, labels, shift=2, ignore_index=ignore_index, backend=backend)
    assert torch.equal(loss, expected)


def pieces(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """This rank's piece along dimension 1."""
    count, rank = dist.get_world_size(), dist.get_rank()
    if layout == "contiguous":
        return tensor.chunk(count, 1)[rank]
    stretches = tensor.chunk(2 * count, 1)
    return torch.cat([stretches[rank], stretches[2 * count - 1 - rank]], 1)


def sequence_in_pieces() -> None:
    """The sum of the ranks' losses and gradients is the uncut sequence's."""
    logits, labels = problem(ranks.device())
    group = dist.group.WORLD
    for layout in ("contiguous", "zigzag"):
        for shift in (0, 1, 2):
            whole = logits.clone().requires_grad_()
            expected = deft_loss(whole, labels, shift=shift, reduction="sum")
            expected.backward()
            mine = pieces(logits, layout).clone().requires_grad_()
            own = shifted_labels(pieces(labels, layout), group, shift=shift, layout=layout)
            loss = deft_loss(mine, own, reduction="sum")
            loss.backward()
            total = loss.detach().clone()
            dist.all_reduce(total)
            torch.testing.assert_close(total, expected.detach())
            torch.testing.assert_close(mine.grad, pieces(whole.grad, layout))


def an_ignore_index_that_no_double_holds() -> None:
    """What the last positions of the whole sequence get, to the bit."""
    _, labels = problem(ranks.device())
    for ignore_index in (2**63 - 1, 2**53 + 1):
        own = shifted_labels(
            pieces(labels, "contiguous"), dist.group.WORLD, shift=2, ignore_index=ignore_index
        )
        if dist.get_rank() == dist.get_world_size() - 1:
            assert own[:, -2:].tolist() == [[ignore_index] * 2] * B


def refusals() -> None:
    _, labels = problem(ranks.device())
    group, own = dist.group.WORLD, pieces(labels, "contiguous")
    for arguments, keywords, error in [
        ((own.float(), group), {}, "^labels: expected a Tensor of integers"),
        ((own[0, 0], group), {}, "^labels: expected a time dimension"),
        ((own, "ranks"), {}, "^group: expected a torch.distributed.ProcessGroup"),
        ((own, group), {"shift": -1}, "^shift: expected a number of positions"),
        ((own, group), {"shift": own.shape[1] + 1}, "^shift: .* reaches past the next stretch"),
        ((own, group), {"layout": "striped"}, "^layout: expected one of contiguous, zigzag"),
        ((own[:, :3], group), {"layout": "zigzag"}, "^labels: a zigzag piece has two stretches"),
        ((own.to(torch.uint8), group), {}, "^labels: torch.uint8 holds"),
    ]:
        with pytest.raises((TypeError, ValueError), match=error):
            shifted_labels(*arguments, **keywords)


CASES = [sequence_in_pieces, an_ignore_index_that_no_double_holds, refusals]


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run(CASES, count)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
@pytest.mark.parametrize("count", first_of([3, 2]))
def test_in_processes(count, case):
    for rank, outcome in enumerate(outcomes(count)[case]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
