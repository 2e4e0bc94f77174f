"""Defects planted into the kernels: each has to be caught by the emulator's checks or by a comparison with
the oracle.

A mutant of the source is a copy of the kernels with one text changed, which the launchers then run; a
mutant of the compiled code is PTX without one barrier. """

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
from rows import gradient_excess, make

from deft_kernels import deft_loss, objectives
from deft_kernels.kernels import launch, table
from deft_kernels.kernels.table import Launch

KERNELS = ("statistics", "combine", "finish", "gradient", "fused", "scale")
SOURCE = Path(launch.__file__).parent
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
            (tmp_path / package / path.name).write_text(text.replace("from ..", "from deft_kernels."))
        monkeypatch.syspath_prepend(str(tmp_path))
        module = importlib.import_module(f"{package}.row_kernels")
        for name in KERNELS:
            monkeypatch.setattr(launch, f"{name}_kernel", getattr(module, f"{name}_kernel"))
        for name in [n for n in sys.modules if n.startswith(package)]:
            monkeypatch.delitem(sys.modules, name)

    return planted


def run(
    objective: Any = "deft", vocabulary: int = 1531, dtype: torch.dtype = torch.bfloat16, **keywords: Any
) -> float:
    """How much of what its gradient may err it errs."""
    z, y = make("plain", 2, vocabulary, dtype)
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


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        (
            "sweep.py",
            "inside = (columns >= start) & (columns < stop)",
            "inside = (columns >= start) & (columns <= stop)",
        ),
        ("sweep.py", "inside = (columns >= start) & (columns < stop)", "inside = columns < stop"),
        (
            "state.py",
            "inside = (columns >= start) & (columns < stop)",
            "inside = (columns >= start) & (columns <= stop)",
        ),
        ("sweep.py", "while first + 2 * TILE <= stop:", "while first + TILE <= stop:"),
        ("state.py", "while first + 4 * TILE <= stop:", "while first + 3 * TILE <= stop:"),
    ],
)
@pytest.mark.parametrize("in_forward", [False, True])
def test_a_mask_off_by_one(
    file: str, old: str, new: str, in_forward: bool, plant: Callable[..., None]
) -> None:
    """One column too many is outside of the tensor, in the last row at least."""
    plant(file, old, new)
    with pytest.raises(Exception, match="outside a tensor's elements"):
        run(grad_in_forward=in_forward)
    assert "outside a tensor's elements" in reports()


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
    plant("device.py", old, new)
    assert run(objective) > 10.0
    reports()


def test_a_wrong_claim_of_alignment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peeling is promised where the first row is off a boundary."""
    z, y = make("plain", 3, 1281, torch.bfloat16)
    view = torch.zeros(1 + 3 * 1289, dtype=torch.bfloat16).as_strided((3, 1281), (1289, 1), 1)
    view.copy_(z)
    deft_loss(view.detach().requires_grad_(), y, backend="triton").backward()
    monkeypatch.setattr(launch, "peel", lambda *_: True)
    with pytest.raises(Exception, match="misaligned"):
        deft_loss(view.detach().requires_grad_(), y, backend="triton").backward()
    assert "misaligned" in reports()


# Barriers


def without_barrier(ptx: str, n: int) -> str:
    """PTX without its n-th barrier; none fewer where it has no more."""
    found = list(re.finditer(r"\bbar\.sync\s+0;", ptx))
    return ptx[: found[n].start()] + ptx[found[n].end() :] if n < len(found) else ptx


CALLS: dict[str, dict[str, Any]] = {
    "backward": {},
    "in place": {"inplace": True},
    "in place, softcap": {"inplace": True, "softcap": 20.0},
    "in the forward, in place": {"inplace": True, "grad_in_forward": True},
    "in the forward, in place, softcap": {"inplace": True, "grad_in_forward": True, "softcap": 20.0},
    "in the forward, through max p": {"inplace": True, "grad_in_forward": True,
                                      "objective": objectives.deft(float("inf"), detach=False)},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_every_barrier_is_missed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four warps; each barrier of each kernel of a call taken out alone is reported as a race."""
    for plan in ("statistics", "gradient", "fused"):
        monkeypatch.setattr(table, plan, lambda _, itemsize, warp: Launch(4, 16 // itemsize, warp))
    emulator = emulation.emulator()
    assert emulator is not None
    run(vocabulary=3001, **CALLS[name])
    own = {ptx: kernel for ptx, kernel in emulator.kernels.items() if "bar.sync" in ptx}
    assert own and not reports()
    silent = []
    for ptx, kernel in own.items():
        places = [b.instructions[-1].where for b in kernel.blocks if b.kind == "barrier"]
        for n, place in enumerate(places):
            mutant = without_barrier(ptx, n)
            with emulator.planted(lambda text, ptx=ptx, mutant=mutant: mutant if text == ptx else text):
                run(vocabulary=3001, **CALLS[name])
            if "race" not in reports():
                silent.append(f"{kernel.name}: barrier {n} at {place}")
    assert not silent
