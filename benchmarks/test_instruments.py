"""The instruments themselves: what reads machine code, computes bounds, takes turns and counts bytes."""

from __future__ import annotations

from dataclasses import replace

import model
import pytest
import torch
from gpus import GPUS, occupancy, programs, rates
from measure import Case, Inputs, compare, peak
from peers import CONTESTANTS, Contestant, Missing
from torch import Tensor

sass = pytest.importorskip("sass", reason="triton is not installed")

DEVICE = torch.device("cpu")
# An outer loop around a main loop of two 16-byte loads and a masked tail of one, both with an exponential a
# logit (8 to a load in bf16), and a loop of zeros that reads nothing.
LOAD = "/*0010*/ LDG.E.128 R4, desc[UR4][R2.64] ;"
MASKED = "/*0010*/ @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;"
EXPONENTIAL = "/*0020*/ MUFU.EX2 R0, R0 ;"
LISTING = "\n".join([
    ".L_x_0:",
    ".L_x_1:", *[LOAD] * 2, *[EXPONENTIAL] * 16, *["/*0030*/ FADD R1, R1, R0 ;"] * 13,
    "/*0040*/ @P1 BRA `(.L_x_1) ;",
    ".L_x_2:", MASKED, *[EXPONENTIAL] * 8, "/*0050*/ BAR.SYNC 0x0 ;", "/*0060*/ @P1 BRA `(.L_x_2) ;",
    ".L_x_3:", "/*0070*/ STG.E.128 desc[UR4][R2.64], RZ ;", "/*0080*/ @P2 BRA `(.L_x_3) ;",
    "/*0090*/ STL.64 [R1], R2 ;", "/*00a0*/ @P3 BRA `(.L_x_0) ;",
])  # fmt: skip


def test_loops_of_a_listing() -> None:
    inner = [sass.count(body, 2) for body in sass.innermost(LISTING)]
    assert [loop.logits for loop in inner] == [16, 8, 0]
    assert [loop.barriers for loop in inner] == [0, 1, 0]
    (main,) = sass.main_loops(LISTING, 2)
    assert (main.kind, main.instructions, main.mufu, main.load_bits) == ("statistics", 32, 16, 128)


@pytest.mark.parametrize(
    ("text", "bits"),
    [("LDG.E R0", 32), ("LDG.E.U16 R0", 16), ("@P0 LDG.E.64 R0", 64), ("LDG.E.ENL2.256 R0", 256)],
)
def test_width_of_a_load(text: str, bits: int) -> None:
    assert sass.count([text + ", desc[UR4][R2.64]"], 2).load_bits == bits


# Registers are the limit, then warps, programs, shared memory.
@pytest.mark.parametrize(
    ("registers", "shared", "num_warps", "held"),
    [(88, 64, 8, 2), (32, 0, 4, 16), (32, 0, 1, 32), (32, 100 * 1024, 4, 2)],
)
def test_programs_that_a_multiprocessor_holds(registers: int, shared: int, num_warps: int, held: int) -> None:
    assert programs("90", registers, shared, num_warps) == held
    assert occupancy("90", registers, shared, num_warps) == held * num_warps / 64


def test_rates_by_hand() -> None:
    """132 processors, 128 lanes, 1.98 GHz: 33.45e12 instructions; a bf16 read of 4.3 TB/s: 2.15e12 logits."""
    found = rates(GPUS["H200"], instructions=10, mufu=1, bytes_moved=2)
    assert found.issue == pytest.approx(3.345, abs=1e-3)
    assert found.special == pytest.approx(4.182, abs=1e-3)
    assert found.bandwidth == pytest.approx(2.15)
    assert found.bound == "bandwidth"


def test_peak_counts_what_is_alive_at_once() -> None:
    def run() -> None:
        for _ in range(3):  # freed between: the peak is of one pass
            first = torch.ones(100_000)
            second = first + 1
            del first
            second.mul_(2)
            del second

    assert 800_000 <= peak(DEVICE, run) < 900_000


def test_contestants_take_turns_and_failures_are_results() -> None:
    calls: list[str] = []

    def fine(name: str):
        def loss(logits: Tensor, labels: Tensor) -> Tensor:
            calls.append(name)
            return logits.sum()

        return loss

    def broken(logits: Tensor, labels: Tensor) -> Tensor:
        raise RuntimeError("cannot do this")

    def exhausted(logits: Tensor, labels: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("no more")

    case = Case("both", 2, 8, torch.float32)
    losses = {"a": fine("a"), "broken": broken, "b": fine("b"), "exhausted": exhausted}
    found = compare(losses, case, DEVICE, (4, 4), 0.0, tolerated=["broken"], memory=False)
    assert calls[-8:] == ["a", "b", "b", "a"] * 2
    assert len(found["a"].seconds) == len(found["a"].copy) == 4
    assert found["broken"].failure == "RuntimeError: cannot do this"
    assert found["exhausted"].failure == "out of memory"
    assert found["broken"].record(case, 3)["failure"]
    with pytest.raises(RuntimeError, match="cannot do this"):
        compare(losses, case, DEVICE, (1, 1), 0.0, memory=False)


def test_inputs_are_restored_after_an_inplace_gradient() -> None:
    inputs = Inputs(Case("both", 2, 8, torch.bfloat16), DEVICE)
    logits = inputs.next()
    assert inputs.next() is not logits  # small ones rotate
    logits.grad = torch.ones_like(logits)
    logits.detach().zero_()
    inputs.restored(logits)
    assert torch.equal(logits, inputs.pristine) and logits.grad is None


@pytest.mark.parametrize("contestant", CONTESTANTS, ids=lambda c: c.name)
def test_every_contestant_runs_here_or_says_why(contestant: Contestant) -> None:
    if "compiled" in contestant.name:
        return  # by test_losses, which takes seconds
    try:
        loss = contestant.make(DEVICE)
    except Missing as reason:
        assert str(reason)
        return
    logits = torch.randn(3, 50, requires_grad=True)
    loss(logits, torch.tensor([1, -100, 49])).backward()
    assert logits.grad is not None and not logits.grad[1].any() and logits.grad[0].any()


def test_tables_by_the_number_of_rows() -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    from report import groups

    shapes = [(32000, 4096), (50257, 4096), (32000, 512), (50257, 333)]
    assert groups(shapes) == [[(32000, 4096), (50257, 4096)], [(32000, 512), (50257, 333)]]


def test_predictions_follow_the_records() -> None:
    """docs/predictions.md is what the command writes; a bound falls when what it consists of falls."""
    assert (model.ROOT / "docs" / "predictions.md").read_text() == model.page()
    gpu, code = GPUS["H100"], model.counted()["fused deft"]
    whole = model.two_visits(gpu, 8192, 128256, code).copies
    assert model.two_visits(gpu, 8192, 128256, replace(code, fixed=code.fixed // 2)).copies < whole
    assert model.two_visits(gpu, 8192, 128256, replace(code, blocks=32768)).copies > whole
    # Twice as many rows in flight as L2 keeps: half of them are read again.
    crowded = model.two_visits(gpu, 8192, 128256, replace(code, programs=2, fixed=0))
    assert crowded.copies == pytest.approx(1.25, rel=0.03)
    narrow = model.counted()["statistics deft narrow"]
    few = model.one_visit(gpu, 4096, 32000, replace(narrow, in_flight=narrow.in_flight / 8), 1)
    assert few.copies > 1.5 * model.one_visit(gpu, 4096, 32000, narrow, 1).copies
