"""Defects planted into the kernels: each has to be caught by the emulator's checks or by a comparison with
the oracle.

A mutant of the source is a copy of the kernels with one text changed, which the launchers then run; a
mutant of the compiled code is PTX without one barrier."""

from __future__ import annotations

import importlib
import itertools
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import emulation
import pytest
import torch
from ptx.reports import Fault
from rows import gradient_excess, make

from deft_kernels import deft_loss, objectives
from deft_kernels.backends.triton import backend as triton_backend
from deft_kernels.backends.triton import tuning
from deft_kernels.backends.triton.tuning import Launch

MODULES = ("kernels", "gradient_kernels")
SOURCE = Path(triton_backend.__file__).parent
NUMBER = itertools.count()

pytestmark = pytest.mark.skipif(emulation.emulator() is None, reason="a mutant on a GPU may do harm")


@pytest.fixture(autouse=True)
def _not_counted() -> Iterator[None]:
    """What a mutant runs says nothing about the coverage of the kernels."""
    emulator = emulation.emulator()
    assert emulator is not None
    kept, emulator.kernels = emulator.kernels, {}
    yield
    emulator.kernels = kept


@pytest.fixture
def plant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, str], None]:
    """plant(file, old, new): launch kernels in which `old`, which occurs in the file, is `new`."""

    def planted(file: str, old: str, new: str) -> None:
        package = f"mutant_{next(NUMBER)}"
        (tmp_path / package).mkdir()
        for path in SOURCE.glob("*.py"):
            text = path.read_text()
            if path.name == file:
                assert old in text, f"{old!r} is no longer in {file}"
                text = text.replace(old, new)
            # A package of its own has no `core` above it.
            text = text.replace("from ...", "from deft_kernels.")
            (tmp_path / package / path.name).write_text(text)
        monkeypatch.syspath_prepend(str(tmp_path))
        for module in MODULES:
            for name, kernel in vars(importlib.import_module(f"{package}.{module}")).items():
                if name.endswith("_kernel"):
                    monkeypatch.setattr(triton_backend, name, kernel)
        for name in [n for n in sys.modules if n.startswith(package)]:
            monkeypatch.delitem(sys.modules, name)

    return planted


def run(
    objective: Any = "deft", vocabulary: int = 1801, dtype: torch.dtype = torch.bfloat16, **keywords: Any
) -> float:
    """How much of what its gradient may err it errs."""
    z, y = make("plain", 3, vocabulary, dtype)
    exact, x = z.double().requires_grad_(), z.requires_grad_()
    shared = {k: v for k, v in keywords.items() if k not in ("inplace", "grad_in_forward")}
    deft_loss(exact, y, objective=objective, reduction="sum", backend="reference", **shared).backward()
    deft_loss(x, y, objective=objective, reduction="sum", backend="triton", **keywords).backward()
    assert x.grad is not None and exact.grad is not None
    return gradient_excess(x.grad, exact.grad)


def reports() -> str:
    """What the emulator has found, and forgets."""
    emulator = emulation.emulator()
    assert emulator is not None
    return "\n".join(map(str, emulator.reports.take()))


def test_without_a_mutant_all_is_well() -> None:
    for keywords in ({}, {"inplace": True}, {"inplace": True, "grad_in_forward": True}):
        assert run(objectives.deft(1, detach=False), **keywords) <= 1.0
        assert not reports()


# Rows of 1,801 columns: edges off a boundary, a turn of four tiles of 256, three masked tiles, nine columns.
MASKS = [
    ("gradient.py", "    inside = columns < stop", "    inside = columns <= stop"),
    ("gradient.py", "while first + 2 * TILE <= last:", "while first + TILE <= last:"),
    (
        "lanes.py",
        "(columns >= row.start) & (columns < row.stop)",
        "(columns >= row.start) & (columns <= row.stop)",
    ),
    ("state.py", "while first + TURN * TILE <= last:", "while first + (TURN - 1) * TILE <= last:"),
    ("edges.py", "tl.where(row.start + lane < first,", "tl.where(row.start + lane <= first,"),
    ("edges.py", "tl.where(lane < 2 * WIDTH, tail,", "tl.where(lane < WIDTH + 1, tail,"),
    ("edges.py", "(row.start + WIDTH - 1) // WIDTH", "row.start // WIDTH"),
]


@pytest.mark.sampled
@pytest.mark.parametrize("mask", MASKS, ids=lambda mask: f"{mask[0]}: {mask[2]}")
@pytest.mark.parametrize("in_forward", [False, True])
def test_a_mask_off_by_one(mask: tuple[str, str, str], in_forward: bool, plant: Callable[..., None]) -> None:
    """Columns of the next row, or of the one before, that two programs then read and write; outside of the
    tensor in the last row."""
    plant(*mask)
    try:
        excess = run(grad_in_forward=in_forward, inplace=True)
    except Fault:
        excess = 0.0
    assert reports() or excess > 1.0


@pytest.mark.parametrize(
    ("old", "new", "objective"),
    [
        (
            "shl.b32 $0, z, 16; and.b32 $1, z, 0xffff0000;",
            "shl.b32 $1, z, 16; and.b32 $0, z, 0xffff0000;",
            objectives.deft(1, detach=False),
        ),
        (
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
            "shl.b32 $1, $2, 16; and.b32 $0, $2, 0xffff0000;",
            objectives.deft(),
        ),
    ],
    ids=["masked", "plain"],
)
def test_swapped_halves(old: str, new: str, objective: Any, plant: Callable[..., None]) -> None:
    """Inline assembly that takes the two bf16 of a register for one another."""
    plant("arithmetic.py", old, new)
    assert not run(objective) <= 10.0
    reports()


def test_a_wrong_claim_of_alignment(plant: Callable[..., None]) -> None:
    """A column off a boundary, said to lie on one: a load of 16 bytes there would fault."""
    right, wrong = (f"tl.multiple_of(offset - {lead}, PLAN.width), {lead}" for lead in ("lead", "lead // 2"))
    plant("rows.py", right, wrong)
    with pytest.raises(Fault, match="misaligned global access"):
        run()
    assert "misaligned" in reports()


def test_peeling_rows_that_lie_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gradient whose rows lie otherwise than the logits': the hint is true for one of them only."""
    z, y = make("plain", 3, 1281, torch.bfloat16)
    view = torch.zeros(3 * 1290, dtype=torch.bfloat16).as_strided((3, 1281), (1290, 1))
    view.copy_(z)
    monkeypatch.setattr(triton_backend, "peel", lambda *_: True)
    with pytest.raises(Fault, match="misaligned global access"):
        deft_loss(view.requires_grad_(), y, backend="triton").backward()
    assert "misaligned" in reports()


# Barriers


BARRIER = re.compile(r"\b(bar\.sync\s+0|bar\.warp\.sync\s+-1);")

CALLS: dict[str, dict[str, Any]] = {
    "backward": {},
    "in place, softcap": {"inplace": True, "softcap": 20.0},
    "in the forward, in place": {"inplace": True, "grad_in_forward": True},
    "in the forward, in place, softcap": {"inplace": True, "grad_in_forward": True, "softcap": 20.0},
    "in the forward, through max p": {"inplace": True, "grad_in_forward": True,
                                      "objective": objectives.deft(float("inf"), detach=False)},
}  # fmt: skip

# Barriers that nothing misses, by the file that they come from, and how many of them a kernel may have.
SPARE = {
    # Between the read of one reduction's result and the write of the next one's: Triton takes two parts of
    # a buffer for one, and the other part has had a barrier since.
    "standard.py": 2,
    # With several warps the reductions' own barriers come after the last read of the logits. With one warp
    # there are none, and this one is needed.
    "kernels.py": 1,
}


@pytest.mark.sampled
@pytest.mark.parametrize("warps", [1, 4])
@pytest.mark.parametrize("name", CALLS)
def test_barriers_are_missed(name: str, warps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each barrier of each kernel of a call, taken out alone, is reported as a race; but for the spare
    ones."""
    for plan in ("statistics", "gradient", "fused"):
        monkeypatch.setattr(tuning, plan, lambda _, itemsize, *rest: Launch(warps, 16 // itemsize, rest[-1]))
    emulator = emulation.emulator()
    assert emulator is not None
    run(vocabulary=3001, **CALLS[name])
    assert not reports()
    own = {ptx: kernel for ptx, kernel in emulator.kernels.items() if BARRIER.search(ptx)}
    assert own
    for ptx, kernel in own.items():
        places = [i.line for i in kernel.instructions.values() if BARRIER.fullmatch(f"{i.text};")]
        barriers = list(BARRIER.finditer(ptx))
        assert len(places) == len(barriers)
        silent: dict[str, int] = {}
        for barrier, place in zip(barriers, places, strict=True):
            mutant = ptx[: barrier.start()] + ptx[barrier.end() :]
            with emulator.planted(lambda text, ptx=ptx, mutant=mutant: mutant if text == ptx else text):
                run(vocabulary=3001, **CALLS[name])
            if "race" not in reports():
                file = place.split(":")[0]
                silent[file] = silent.get(file, 0) + 1
        allowed = SPARE if warps > 1 else {}
        assert all(count <= allowed.get(file, 0) for file, count in silent.items()), (kernel.name, silent)
