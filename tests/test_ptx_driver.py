"""The emulator under a kernel of its own: what Triton compiles, specialises and hands over, without this
package."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import emulation
import pytest
import torch

if emulation.emulator() is None:
    pytest.skip("Triton's interpreter, or a GPU, was chosen for this session", allow_module_level=True)

import triton
import triton.language as tl
from ptx.coverage import Coverage
from ptx.driver import Emulator
from ptx.host import Idle
from ptx.machine import Settings


class Scale(NamedTuple):
    factor: float
    shift: int


@triton.jit
def affine(x, y, n, scale, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + at, mask=at < n, other=0.0) * scale.factor + scale.shift
    tl.store(y + at, value, mask=at < n)


@triton.jit
def total(x, y, n, BLOCK: tl.constexpr):
    """Several warps: a reduction by way of shared memory."""
    at = tl.arange(0, BLOCK)
    tl.store(y, tl.sum(tl.load(x + at, mask=at < n, other=0.0), 0))


@triton.jit
def positive(x):
    if tl.load(x) > 0.0:
        tl.store(x, 2.0)
    else:
        tl.debug_barrier()
        tl.store(x, 3.0)


@pytest.fixture(params=[80, 90, 100])
def emulator(request: pytest.FixtureRequest) -> Iterator[Emulator]:
    with Emulator(request.param).active() as active:
        yield active


def test_runs_a_kernel(emulator: Emulator) -> None:
    """Arguments in a tuple; an n of 1, which Triton makes a constant."""
    for n in (1, 77, 1000):
        x, y = torch.randn(n), torch.full((n,), torch.nan)
        affine[(triton.cdiv(n, 128),)](x, y, n, Scale(2.0, 3), BLOCK=128, enable_fp_fusion=True)
        assert torch.equal(y, x * 2 + 3)
    assert not emulator.reports.take()
    assert emulator.statistics.launches == 3


@pytest.mark.parametrize("order", ["lockstep", "warps", "ctas"])
def test_shared_memory_in_every_order(order: str) -> None:
    with Emulator(90, Settings(order=order, seed=4)).active() as emulator:
        x, y = torch.randn(1000), torch.zeros(1)
        total[(1,)](x, y, 1000, BLOCK=1024, num_warps=4, enable_fp_fusion=True)
    torch.testing.assert_close(y[0], x.sum())
    assert not emulator.reports.take()


def test_traffic(emulator: Emulator) -> None:
    x, y = torch.randn(1024), torch.zeros(1024)
    with emulator.counting() as traffic:
        affine[(8,)](x, y, 1024, Scale(1.0, 0), BLOCK=128, enable_fp_fusion=True)
    assert traffic.asked(x, False) == traffic.touched(x, False) == x.nbytes
    assert traffic.asked(y, True) == traffic.touched(y, True) == y.nbytes
    assert traffic.asked(y, False) == 0


def test_a_launcher_that_does_nothing() -> None:
    """Compiled and dispatched as ever, and nothing written."""
    x, y = torch.randn(256), torch.zeros(256)
    with Idle(90).active() as idle:
        for _ in range(3):
            affine[(2,)](x, y, 256, Scale(2.0, 1), BLOCK=128, enable_fp_fusion=True)
    assert isinstance(idle, Idle) and idle.launches == 3
    assert (y == 0).all()
    assert not idle.kernels


def test_the_driver_before_is_back() -> None:
    def active() -> Any:
        return triton.runtime.driver.active.emulator

    before = active()
    with Emulator(80).active() as other:
        assert active() is other
    assert active() is before


def test_reports_fail_the_test_that_caused_them() -> None:
    session = emulation.emulator()
    assert session is not None
    session.reports.add(
        "race (write-write) within a CTA, global", "kernel", "file.py:1 [st] / file.py:2 [st]"
    )
    with pytest.raises(AssertionError, match=r"race \(write-write\).* in kernel at file.py:1"):
        emulation.fail_on_reports("in this test")
    emulation.fail_on_reports("in the next one")


def test_coverage() -> None:
    """A branch that is not taken, then taken in another session: hits add up."""
    found = []
    for sign in (1.0, -1.0):
        with Emulator(90).active() as emulator:
            x = torch.full((1,), sign)
            positive[(1,)](x, enable_fp_fusion=True)
            found.append(Coverage.of(emulator.kernels.values()))
    (ran, known), (blocks, all_blocks) = found[0].lines(), found[0].blocks()
    assert ran < known and blocks < all_blocks
    ((kernel, place),) = found[0].one_way()
    assert kernel == "positive" and place not in found[0].both_ways()
    found[0].merge(found[1].specialisations)
    assert found[0].lines()[0] == known and found[0].blocks() == (all_blocks, all_blocks)
    assert not found[0].places()[1] - found[0].places()[0]
    assert not found[0].one_way() and place in found[0].both_ways()
