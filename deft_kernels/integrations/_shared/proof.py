"""`Calls`: whether a trainer trains a loss, and over whose items, for the callback that insists on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def when_used(loss: Tensor, then: Callable[[], None]) -> None:
    """Do it when a gradient comes to the loss; at once where that cannot be waited for, as while compiling.

    A loss that was only called may have been left aside for another one.
    """
    if loss.requires_grad and not torch.compiler.is_compiling():
        loss.register_hook(lambda _gradient: then())
    else:
        then()


class Calls:
    """What a loss was trained with since the last look.

    Flags, not counts: a compiled forward writes them without being compiled again when they change.
    """

    def __init__(self) -> None:
        self.called = False
        self.own_mean = False

    def note(self, loss: Tensor, own_mean: bool = False) -> None:
        """Of every call's loss. own_mean: it got no number of items and divides by its batch's own."""
        if torch.is_grad_enabled():
            when_used(loss, self.note_used)
            if own_mean:
                self.own_mean = True

    def note_used(self) -> None:
        self.called = True

    def look(self) -> tuple[bool, bool]:
        """(called, own_mean) since the last look, which they forget."""
        seen = self.called, self.own_mean
        self.called = self.own_mean = False
        return seen
