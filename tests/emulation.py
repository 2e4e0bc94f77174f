"""How the tests run the compiled kernels: the switch between a GPU, the emulator and Triton's interpreter.

The environment carries the choice, so that processes which a test starts make the same one:

    PTX_ARCH=90 PTX_ORDER=lockstep PTX_SEED=0 PTX_NOISE=exact
"""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from ptx.coverage import Coverage
    from ptx.driver import Emulator

INTERPRETER = "interpreter"
ARCHITECTURES = ("80", "90", "100")
CHOICES = (*ARCHITECTURES, INTERPRETER)

# What the whole suite has to run of the kernels, of a hundred: source lines; places, which are kernels and
# the lines that their blocks begin with; blocks of all specialisations. Of those that did not run,
# one_way.py has the reasons.
FLOORS = {"lines": 98, "places": 95, "blocks": 75}

# (kind, kernel, place, reason): what the emulator reports and does no harm.
BENIGN = tuple(
    (
        "race (one instruction, several values for an address, a few ulp apart), shared",
        "_kernel",
        reduction,
        "Lanes that hold the same sum write it to one place. Where the compiler contracts the square in "
        "sum(e e) with the first step of the sum over lanes, fma(e0, e0, e1 e1) and fma(e1, e1, e0 e0) "
        "differ in the last bit, and which of the two stays is the hardware's choice.",
    )
    for reduction in ("standard.py", "state.py")
)

# Tests that noise takes beyond the stated bound, by the end of their name, with the reason. All are exact
# gates in fp32 on rows with a probability near 1. Real errors stay within the bound: an H200 passes them.
BEYOND = {
    f"test_every_objective[triton-{name}-conflict]": "differences of nearly equal terms use up the bound, "
    f"and an ex2 that errs by all that the manual allows passes it: {size} times the bound"
    for name, size in (("deft-exact", "1.1"), ("deft-max-exact", "1.4"), ("rational-exact", "1.6"))
}

_emulator: Emulator | None = None


def choose(arch: str, order: str = "lockstep", seed: int = 0, noise: str = "exact") -> None:
    """Before Triton is imported: say how kernels run where there is no GPU."""
    if torch.cuda.is_available():
        return
    chosen = {"PTX_ARCH": arch, "PTX_ORDER": order, "PTX_SEED": str(seed), "PTX_NOISE": noise}
    os.environ.update(chosen)
    start()


def start() -> None:
    """Do as the environment says, in this process."""
    global _emulator
    arch = os.environ.get("PTX_ARCH", INTERPRETER)
    if arch == INTERPRETER:
        os.environ["TRITON_INTERPRET"] = "1"
        return
    if importlib.util.find_spec("triton") is None:
        return
    os.environ.pop("TRITON_INTERPRET", None)
    from ptx.driver import Emulator
    from ptx.machine import Settings
    from ptx.reports import Benign

    from deft_kernels.backends import choice

    settings = Settings(
        order=os.environ["PTX_ORDER"], seed=int(os.environ["PTX_SEED"]), noise=os.environ["PTX_NOISE"]
    )
    _emulator = Emulator(int(arch), settings, tuple(Benign(*known) for known in BENIGN))
    _emulator.install()
    obstacle = choice._device_obstacle

    def emulated(kind: str, index: int | None) -> str | None:
        """The emulator is a device for which the package has no name; a test that says 0 means without it."""
        emulates = kind == "cpu" and "TRITON_INTERPRET" not in os.environ
        return None if emulates else obstacle(kind, index)

    choice._device_obstacle = emulated


def emulator() -> Emulator | None:
    """The one that runs this process's kernels; None on a GPU and in the interpreter."""
    return _emulator


def fail_on_reports(when: str) -> None:
    """What the emulator has found since it was last asked fails the test that caused it."""
    found = _emulator.reports.take() if _emulator else []
    if found:
        raise AssertionError("\n".join([f"the emulator reports {when}:", *map(str, found)]))


def coverage_of(emulator: Emulator, before: dict[str, Any] | None = None) -> Coverage:
    """What an emulator ran, and what is known already."""
    from ptx.coverage import Coverage

    found = Coverage.of(emulator.kernels.values())
    found.merge(before or {})
    return found


def counts(coverage: Coverage) -> dict[str, tuple[int, int]]:
    """(those that ran, all) of lines, places and blocks."""
    (lines, all_lines), (places, all_places) = coverage.lines(), coverage.places()
    return {
        "lines": (len(lines), len(all_lines)),
        "places": (len(places), len(all_places)),
        "blocks": coverage.blocks(),
    }


def below(coverage: Coverage) -> list[str]:
    """Of what the suite ran less than it should."""
    return [kind for kind, (ran, known) in counts(coverage).items() if ran * 100 < known * FLOORS[kind]]


def not_accounted_for(coverage: Coverage) -> list[str]:
    """Branches behind which blocks did not run for no reason that is known."""
    import one_way

    from deft_kernels.backends.triton import kernels

    return list(one_way.not_accounted_for(coverage, Path(kernels.__file__).parent))


def summary(emulator: Emulator, specialisations: dict[str, Any], held: bool) -> list[str]:
    """For the end of a session. held: whether it was the whole suite, of which the floors are."""
    from ptx.coverage import Coverage

    whole, settings = Coverage(specialisations), emulator.settings
    ran = ", ".join(f"{some} of {every} {kind}" for kind, (some, every) in counts(whole).items())
    head = f"sm_{emulator.arch}, {settings.order}, {settings.noise}, {len(specialisations)} kernels"
    found = ["", f"{head}: {ran} ran"]
    if held:
        (lines, all_lines), (places, all_places) = whole.lines(), whole.places()
        found += [f"did not run: {x}" for x in sorted(all_lines - lines)]
        found += [f"did not run: {kernel}, {place}" for kernel, place in sorted(all_places - places)]
        ran, known = whole.blocks()
        branches = len({place for _, place in whole.one_way()})
        found += [f"did not run: {known - ran} blocks, behind {branches} branches that went one way"]
        found += [f"not accounted for: {branch}" for branch in not_accounted_for(whole)]
        found += [f"below the floor of {FLOORS[kind]} %: {kind}" for kind in below(whole)]
    return found
