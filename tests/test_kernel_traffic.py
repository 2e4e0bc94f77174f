"""Memory traffic of the kernels, counted by the emulator: the documented streams, and how wide the main
loops read.

Vocabularies: 32,001 is odd, so that rows take every position to a 16-byte boundary; 128,256 is Llama 3's.
"""

from __future__ import annotations

from itertools import product

import emulation
import pytest
import torch
from rows import make
from torch import Tensor

from deft_kernels import deft_loss

pytestmark = pytest.mark.skipif(emulation.emulator() is None, reason="only the emulator counts sectors")

ROWS = 3
# Three per cent: a row's ends, and the second visit to the lane that holds the largest logit.
STREAM = pytest.approx(1.0, rel=0.03)
LAYOUTS = ("dense", "rows apart", "base off")


def logits_of(layout: str, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Dense rows; rows whose stride is odd; the same with a first row off a 16-byte boundary."""
    z, y = make("plain", ROWS, vocabulary, dtype)
    if layout == "dense":
        return z, y
    off = 3 if layout == "base off" else 0
    stride = vocabulary + 5
    view = torch.zeros(off + ROWS * stride, dtype=dtype).as_strided((ROWS, vocabulary), (stride, 1), off)
    view.copy_(z)
    return view, y


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("dtype", "vocabulary", "layout"),
    [
        # fp32 has the same loops with half as many columns a load.
        (torch.float32, 32_001, "dense"),
        *product([torch.bfloat16], [32_001, 128_256], LAYOUTS),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_streams(dtype: torch.dtype, vocabulary: int, layout: str) -> None:
    """Statistics: one read. Gradient: one read and one write. Fused: two reads, of which the second is of
    what the same program has just read, and one write."""
    emulator = emulation.emulator()
    assert emulator is not None
    z, y = logits_of(layout, vocabulary, dtype)
    stream = ROWS * vocabulary * dtype.itemsize

    x = z.detach().requires_grad_()
    with emulator.counting() as forward:
        loss = deft_loss(x, y, backend="triton")
    assert forward.asked(z, False) / stream == STREAM
    assert forward.touched(z, False) / stream == STREAM
    assert forward.asked(z, True) == 0

    with emulator.counting() as backward:
        loss.backward()
    assert x.grad is not None
    for traffic, tensor, write in ((backward, z, False), (backward, x.grad, True)):
        assert traffic.asked(tensor, write) / stream == STREAM
        assert traffic.touched(tensor, write) / stream == STREAM

    x = z.detach().requires_grad_()
    with emulator.counting() as fused:
        loss = deft_loss(x, y, backend="triton", grad_in_forward=True)
    loss.backward()
    assert x.grad is not None
    assert fused.asked(z, False) / stream / 2 == STREAM
    assert fused.touched(z, False) / stream == STREAM
    assert fused.asked(x.grad, True) / stream == STREAM


@pytest.mark.parametrize("layout", ["dense", "rows apart"])
def test_main_loops_are_wide(layout: str) -> None:
    """Every load and store without a mask: 16 bytes a lane, all lanes, one run. They move most of a row.

    In place where rows are apart: a gradient of its own lies otherwise than such logits, and where rows lie
    otherwise to a boundary both are read and written two bytes at a time.
    """
    emulator = emulation.emulator()
    assert emulator is not None
    y = logits_of(layout, 128_256, torch.bfloat16)[1]
    inplace = layout != "dense"
    for in_forward in (False, True):
        x = logits_of(layout, 128_256, torch.bfloat16)[0].requires_grad_()
        with emulator.counting() as traffic:
            deft_loss(x, y, backend="triton", inplace=inplace, grad_in_forward=in_forward).backward()
        assert x.grad is not None
        # In place: autograd may have copied such a gradient into dense rows since.
        for tensor, write in ((x, False), (x if inplace else x.grad, True)):
            accesses = traffic.of(tensor, write)
            # A target's logit is one number, which every thread of a program reads alike, or one writes.
            loops = [a for a in accesses if a.instruction.guard is None and a.warp_sectors > a.warps]
            for access in loops:
                assert access.full_width and access.coalesced, access
            moved = sum(a.sectors for a in loops) / sum(a.sectors for a in accesses)
            # The widest program reads three turns of 3.9 in full.
            assert moved > 0.75
