"""`Calls`: whether a trainer trains a loss, and by which number of items it divides. A callback checks it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def when_used(loss: Tensor, then: Callable[[], None]) -> None:
    """Call `then` when a gradient reaches the loss; at once while compiling, where no hook can wait for it.

    A loss that was called, but gets no gradient, may have been replaced by another one.
    """
    if loss.requires_grad and not torch.compiler.is_compiling():
        loss.register_hook(lambda _gradient: then())
    else:
        then()


class Calls:
    """How a loss was called since the last `look`.

    Flags, not counts: a compiled forward writes them without being compiled again when they change.
    """

    def __init__(self) -> None:
        self.called = False
        self.own_mean = False

    def note(self, loss: Tensor, own_mean: bool = False) -> None:
        """For the loss of each call. own_mean: it got no number of items and divides by its own batch's."""
        if torch.is_grad_enabled():
            when_used(loss, self.note_used)
            if own_mean:
                self.own_mean = True

    def note_used(self) -> None:
        self.called = True

    def look(self) -> tuple[bool, bool]:
        """(called, own_mean) since the last `look`; then both start again."""
        seen = self.called, self.own_mean
        self.called = self.own_mean = False
        return seen
