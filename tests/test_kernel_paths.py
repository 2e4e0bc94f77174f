"""Paths of the kernels that the other tests, whose problems are small, leave out."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from rows import gradient_excess, loss_excess, make
from torch import Tensor

from deft_kernels import deft_loss, objectives
from deft_kernels.backends.triton import launch, tuning
from deft_kernels.backends.triton.records import Strides
from deft_kernels.backends.triton.tuning import Launch
from deft_kernels.objectives import Objective


def check(
    z: Tensor, y: Tensor, objective: Objective | str = "deft", upstream: float = 1.0, **keywords: Any
) -> None:
    """Loss and gradient against the float64 oracle, within the stated bounds."""
    exact = z.detach().double().cpu().requires_grad_()
    shared = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    expected, stats = deft_loss(
        exact, y.cpu(), objective=objective, backend="reference", return_stats=True, **shared
    )
    (expected.sum() * upstream).backward()
    x = z.detach().requires_grad_()
    loss = deft_loss(x, y, objective=objective, backend="triton", **keywords)
    value = loss.detach().cpu().double()
    (loss.sum() * upstream).backward()
    slope = stats.gate if expected.dim() else stats.gate.max()
    assert loss_excess(value, expected.detach(), slope) <= 1.0
    assert x.grad is not None and exact.grad is not None
    assert gradient_excess(x.grad.cpu(), exact.grad) <= 1.0


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["plain", "conflict", "masked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["deft", "eaft"])
@pytest.mark.parametrize("splits", [2, 3])
def test_split_rows_reach_the_main_loop(
    splits: int, name: str, dtype: torch.dtype, kind: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slices of a head tile, turns of four, and a tail: five tiles at least, with one warp."""
    monkeypatch.setattr(tuning, "splits", lambda *_: splits)
    monkeypatch.setattr(tuning, "statistics", lambda _, itemsize, *rest: Launch(1, 16 // itemsize, rest[-1]))
    tile = 32 * 16 // dtype.itemsize
    z, y = make(kind, 2, splits * 10 * tile + 13, dtype)
    check(z.to(device), y.to(device), name, reduction="none")


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:.*rounds the gradient to float16")
@pytest.mark.parametrize("rest", [0, 1, 2.5, 4, 6.5])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("name", ["deft", "eaft"])
def test_eight_tiles_in_flight(
    name: str, dtype: torch.dtype, inplace: bool, rest: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head tile, two turns of eight, and what is left: nothing, less than four tiles, and more.

    Rows of an odd length begin off a boundary; in place their beginnings and ends are peeled off.
    """
    deep = {"tail": True, "near": True, "deep": True}
    monkeypatch.setattr(tuning, "fused", lambda _, size, *more: Launch(1, 16 // size, more[-1], **deep))
    tile = 32 * 16 // dtype.itemsize
    z, y = make("masked", 3, int((17 + rest) * tile) + 3 * inplace, dtype)
    check(z.to(device), y.to(device), name, reduction="mean", inplace=inplace, grad_in_forward=True)


@pytest.mark.sampled
@pytest.mark.filterwarnings("ignore:.*rounds the gradient to float16")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("vocabulary", [256, 2 * 256 + 3, 3333])
def test_scaled_gradient_of_several_tiles(vocabulary: int, dtype: torch.dtype, device: str) -> None:
    """The gradient in the forward overwrote the logits: another upstream scales it, tile by tile. By a
    power of two, which rounds nothing again."""
    z, y = make("plain", 3, vocabulary, dtype)
    check(z.to(device), y.to(device), upstream=4.0, reduction="sum", inplace=True, grad_in_forward=True)


EXACT = {
    "deft": objectives.deft(detach=False),
    "shannon": objectives.deft(1, detach=False),
    "max": objectives.deft(math.inf, detach=False),
    "eaft": objectives.eaft(detach=False),
    "cayley": objectives.cayley(detach=False, mean_prob=0.4),
}


HALF_EXACT = [(name, torch.bfloat16) for name in EXACT] + [
    ("shannon", torch.float16),
    ("eaft", torch.float16),
]


@pytest.mark.sampled
@pytest.mark.parametrize("kind", ["plain", "masked", "conflict"])
@pytest.mark.parametrize(("name", "dtype"), HALF_EXACT, ids=str)
def test_exact_gradients_in_half_precision(name: str, dtype: torch.dtype, kind: str, device: str) -> None:
    """Two columns in one register: which half is which matters to a gradient, not to a sum."""
    z, y = make(kind, 2, 1531, dtype, seed=4)
    check(z.to(device), y.to(device), EXACT[name], reduction="none")
    check(z.to(device), y.to(device), EXACT[name], reduction="sum", grad_in_forward=True)


@pytest.mark.sampled
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=lambda d: str(d)[6:])
@pytest.mark.parametrize("warps", [1, 4])
def test_softcap_in_place(
    warps: int, dtype: torch.dtype, in_forward: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's logit is needed at the end, when its column was overwritten."""
    for name in ("statistics", "gradient", "fused"):
        monkeypatch.setattr(tuning, name, lambda _, itemsize, *rest: Launch(warps, 16 // itemsize, rest[-1]))
    z, y = make("plain", 3, 1531, dtype)
    check(z.to(device), y.to(device), softcap=9.0, inplace=True, grad_in_forward=in_forward)


@pytest.mark.sampled
@pytest.mark.parametrize("lead", [1, 2, 4, 7])
@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_logits_that_begin_off_a_boundary(lead: int, in_forward: bool, inplace: bool, device: str) -> None:
    """Rows that lie alike to one another and not to a 16-byte boundary: no hint of alignment is true."""
    z, y = make("plain", 3, 1281, torch.bfloat16)
    # A stride of 1,289 is 1 modulo 8; the first row is `lead` elements off.
    storage = torch.zeros(lead + 3 * 1289, dtype=torch.bfloat16, device=device)
    view = storage[lead:].as_strided((3, 1281), (1289, 1), lead)
    view.copy_(z)
    check(view, y.to(device), reduction="sum", inplace=inplace, grad_in_forward=in_forward)


def test_no_peeling_where_the_base_is_off_a_boundary() -> None:
    """Rows that lie alike, the first of them off: peeling would gain nothing, as no load gets wide."""
    storage = torch.zeros(4 + 3 * 1289, dtype=torch.bfloat16)
    strides = Strides(1, 1289, 0)
    on, off = (storage, strides), (storage[4:], strides)
    assert launch.peel(8, on, on)
    assert not launch.peel(8, off, off)
    assert not launch.peel(8, on, off)


@pytest.mark.parametrize("in_forward", [False, True])
@pytest.mark.parametrize("vocabulary", [1, 7, 1281])
def test_ignored_rows_are_zero(vocabulary: int, in_forward: bool, device: str) -> None:
    """Their gradient is written although their logits, NaN here, are not read; a head off a boundary too."""
    z, y = make("plain", 4, vocabulary, torch.bfloat16)
    z[1], y[1] = math.nan, -100
    z[3], y[3] = math.inf, -100
    x = z.to(device).clone().requires_grad_()
    deft_loss(x, y.to(device), grad_in_forward=in_forward, backend="triton").backward()
    assert x.grad is not None
    assert (x.grad[[1, 3]] == 0).all()
    assert x.grad[[0, 2]].isfinite().all()
