"""How the tests run the compiled kernels: the switch between a GPU, the emulator and Triton's interpreter.

The environment carries the choice, so that processes which a test starts make the same one:

    PTX_ARCH=90 PTX_ORDER=lockstep PTX_SEED=0 PTX_NOISE=exact
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ptx.driver import Emulator

INTERPRETER = "interpreter"
ARCHITECTURES = ("80", "90", "100")
CHOICES = (*ARCHITECTURES, INTERPRETER)

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

    from deft_kernels import backends

    settings = Settings(
        order=os.environ["PTX_ORDER"], seed=int(os.environ["PTX_SEED"]), noise=os.environ["PTX_NOISE"]
    )
    _emulator = Emulator(int(arch), settings)
    _emulator.install()
    obstacle = backends._device_obstacle

    def emulated(kind: str, index: int | None) -> str | None:
        """The emulator is a device for which the package has no name; a test that says 0 means without it."""
        return None if "TRITON_INTERPRET" not in os.environ else obstacle(kind, index)

    backends._device_obstacle = emulated


def emulator() -> Emulator | None:
    """The one that runs this process's kernels; None on a GPU and in the interpreter."""
    return _emulator


def fail_on_reports(when: str) -> None:
    """What the emulator has found since it was last asked fails the test that caused it."""
    found = _emulator.reports.take() if _emulator else []
    if found:
        raise AssertionError("\n".join([f"the emulator reports {when}:", *map(str, found)]))
