"""What a call costs the host: Triton's own dispatch with a launcher that does nothing.

As an `Emulator`, whose `active()` it shares: time calls on CPU tensors inside. Their results are whatever the
memory held.
"""

from __future__ import annotations

from typing import Any

from .driver import Driver, Emulator


class Idle(Emulator):
    """Compiles, specialises and dispatches as ever; launches nothing and counts it."""

    def __init__(self, arch: int = 90):
        super().__init__(arch)
        self.launches = 0

    def driver(self) -> Driver:
        return IdleDriver(self)


class IdleDriver(Driver):
    emulator: Idle

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        emulator = self.emulator

        def launch(*arguments: Any) -> None:
            emulator.launches += 1

        return launch
