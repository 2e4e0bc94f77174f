"""The kernels under launch parameters of every kind: split rows, many turns, heads off a 16-byte boundary.

The plans are forced, because the table would give small problems one warp and one program a row.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from rows import gradient_excess, loss_excess, make
from torch import Tensor

from deft_kernels import deft_loss, objectives, row_statistics
from deft_kernels.backends.triton import gradient_kernels, kernels, launch, tuning
from deft_kernels.backends.triton.tuning import Launch

# With one warp of bf16 a tile is 256 columns and a turn of the statistics loop 1,024: 3,333 columns are a few
# at the edges, three turns, and a tail of two tiles.
VOCABULARY = 3333


def check(z: Tensor, y: Tensor, objective: objectives.Objective | str = "deft", **keywords: object) -> None:
    mine = z.detach().requires_grad_()
    loss, stats = deft_loss(mine, y, objective=objective, backend="triton", return_stats=True, **keywords)
    loss.sum().backward()
    exact = z.detach().double().requires_grad_()
    keywords.pop("grad_in_forward", None)
    expected, oracle = deft_loss(
        exact, y, objective=objective, backend="reference", return_stats=True, **keywords
    )
    expected.sum().backward()
    slope = oracle.gate if expected.dim() else oracle.gate.max()
    assert loss_excess(loss.double(), expected.detach(), slope) <= 1.0
    assert mine.grad is not None
    assert exact.grad is not None
    assert gradient_excess(mine.grad, exact.grad) <= 1.0
    assert torch.equal(stats.correct, oracle.correct)
    for name in ("logp", "lse", "collision", "entropy", "max_prob", "alpha"):
        torch.testing.assert_close(
            getattr(stats, name).double(), getattr(oracle, name), rtol=3e-5, atol=3e-7, msg=name
        )


@pytest.mark.sampled
@pytest.mark.parametrize("splits", [2, 3, 8])
@pytest.mark.parametrize("kind", ["plain", "confident", "conflict", "masked"])
@pytest.mark.parametrize("name", ["deft", "eaft", "cayley"])
def test_split_rows(name: str, kind: str, splits: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of a row reduced by programs of their own and combined; 8 asks for more than there are."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    z, y = make(kind, 3, VOCABULARY, torch.bfloat16)
    check(z.to(device), y.to(device), name, reduction="none")


def test_splits_fill_the_device() -> None:
    """Enough programs for few rows, one a row for many, never a slice without work."""
    for rows in (1, 7, 64, 263, 264, 5000):
        for vocabulary in (1, 1000, 32000, 262144):
            tile = tuning.statistics(vocabulary, 2, entropy=False).tile
            splits = tuning.splits(rows, vocabulary, tile, processors=132)
            assert splits >= 1
            assert splits == 1 or vocabulary // splits >= tile
            if rows >= 264:
                assert splits == 1
    assert tuning.splits(8, 262144, tuning.statistics(262144, 2, entropy=False).tile, 132) > 1


@pytest.mark.sampled
@pytest.mark.parametrize("warps", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_forward", [False, True])
def test_every_width_of_program(
    in_forward: bool, dtype: torch.dtype, warps: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One to four warps over the same rows: many turns, few turns, none."""
    for name in ("statistics", "gradient", "fused"):
        monkeypatch.setattr(tuning, name, lambda _, itemsize, *rest: Launch(warps, 16 // itemsize, rest[-1]))
    z, y = make("plain", 3, VOCABULARY, dtype)
    check(z.to(device), y.to(device), grad_in_forward=in_forward)


@pytest.mark.sampled
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("lead", range(8))
def test_rows_off_a_boundary(lead: int, inplace: bool, in_forward: bool, device: str) -> None:
    """Row strides of every residue modulo the eight bf16 of a load; the neighbours stay untouched."""
    n, vocabulary = 4, 1281
    z, y = make("plain", n, vocabulary, torch.bfloat16)
    storage = torch.full((n, vocabulary + 7 + lead), 7.0, dtype=torch.bfloat16, device=device)
    view = storage[:, :vocabulary]
    view.copy_(z)
    leaf = view.detach().requires_grad_()
    y = y.to(device)
    deft_loss(leaf, y, backend="triton", inplace=inplace, grad_in_forward=in_forward).backward()
    exact = z.double().requires_grad_()
    deft_loss(exact, y.cpu(), backend="reference").backward()
    assert leaf.grad is not None
    assert exact.grad is not None
    assert gradient_excess(leaf.grad.cpu(), exact.grad) <= 1.0
    assert (storage[:, vocabulary:] == 7.0).all()
    written = torch.equal(view, leaf.grad)
    assert written == inplace


@pytest.mark.parametrize("slicing", ["time", "batch", "heads"])
def test_two_row_strides(slicing: str, device: str) -> None:
    """Sliced [B, T, V] logits, whose rows no single stride reaches, with an output that lies otherwise."""
    z, y = make("plain", 24, 515, torch.bfloat16)
    if slicing == "time":
        z, y = z.reshape(4, 6, 515)[:, :-1], y.reshape(4, 6)[:, :-1]
    elif slicing == "batch":
        z, y = z.reshape(4, 6, 515).transpose(0, 1), y.reshape(4, 6).T
    else:
        z, y = z.reshape(2, 3, 4, 515)[:, :2], y.reshape(2, 3, 4)[:, :2]
    check(z.to(device), y.to(device), reduction="none")
    check(z.to(device), y.to(device), grad_in_forward=True)


def test_peeling_needs_rows_that_lie_alike() -> None:
    """A hint of alignment that is wrong for one of two tensors would fault on a GPU."""

    def peel(logits: Tensor, out: Tensor) -> bool:
        own = launch.strides_of(logits)
        return launch.peel(8, (logits, own), (out, launch.out_strides_of(out, own.inner)))

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16)

    assert not peel(empty(4, 128), empty(4, 128))  # whole loads anyway
    assert peel(empty(4, 129), empty(4, 129))
    assert peel(empty(4, 136), empty(4, 136))  # a multiple of a load, but not of Triton's 16 elements
    assert not peel(empty(4, 132)[:, :129], empty(4, 129))
    assert not peel(empty(4, 130)[:, 1:], empty(4, 129))  # the base itself is off
    # Row stride 0 modulo 8 inside, as the output's outside: rows of one and the other do not lie alike.
    sliced = torch.empty_strided((3, 2, 129), (8 * 40 + 1, 136, 1), dtype=torch.bfloat16)
    assert not peel(sliced, empty(3, 2, 129))


def test_a_vocabulary_beyond_the_largest_in_use(device: str) -> None:
    """V = 262,147: past Gemma's 262,144 and off every block size."""
    z, y = make("peaked", 1, 262147, torch.bfloat16)
    check(z.to(device), y.to(device), reduction="none")


def test_fields_and_kernels_agree_on_their_order(device: str) -> None:
    """The packed buffer is written by position: each statistic has to come back under its own name."""
    z, y = make("plain", 3, 700, torch.float32)
    ours = row_statistics(z.to(device), y.to(device), backend="triton")
    theirs = row_statistics(z, y, backend="reference")
    for name in ("logp", "lse", "collision", "entropy", "max_prob"):
        torch.testing.assert_close(getattr(ours, name).cpu(), getattr(theirs, name), rtol=1e-5, atol=1e-6)


def forgotten(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had never launched it."""
    if launch.mode() == "interpreted":
        pytest.skip("the interpreter compiles nothing")
    monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))


def programs(kernel: Any) -> list[int]:
    """How many were compiled, by device."""
    return [len(found) for found, *_ in kernel.device_caches.values()]


def test_one_program_for_any_number_of_rows(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever label is ignored, and however the upstream lies."""
    # Of the gradient one more, which scales what is there already.
    wanted = {kernels.statistics_kernel: 1, kernels.fused_kernel: 1, gradient_kernels.gradient_kernel: 2}
    for kernel in wanted:
        forgotten(kernel, monkeypatch)
    for rows, ignore_index in ((3, -100), (16, 0), (1, 1)):
        z, y = make("plain", rows, 515, torch.bfloat16)
        z, y = z.to(device).requires_grad_(), y.to(device)
        deft_loss(z, y, backend="triton", ignore_index=ignore_index, grad_in_forward=True).backward()
        loss = deft_loss(z, y, backend="triton", ignore_index=ignore_index, reduction="none")
        loss.sum().backward(retain_graph=True)
        loss.backward(torch.full((rows,), 0.5, device=device))
    for kernel, count in wanted.items():
        assert programs(kernel) == [count], kernel.fn


def test_one_finish_for_any_logits(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads states alone: one program for the batch's statistics and one for the loss."""
    forgotten(kernels.finish_kernel, monkeypatch)
    shapes = ((3, 515, torch.float32), (16, 512, torch.bfloat16), (1, 37, torch.float16))
    for rows, vocabulary, dtype in shapes:
        z, y = make("plain", rows, vocabulary, dtype)
        deft_loss(z.to(device), y.to(device), objective="cayley", backend="triton")
    assert programs(kernels.finish_kernel) == [2]
