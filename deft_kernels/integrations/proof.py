"""`Calls`: whether a trainer has called a loss, and over whose items, for the callback that insists on it."""

from __future__ import annotations

import torch


class Calls:
    """What a loss was called with in training since the last look.

    Flags, not counts: a compiled forward writes them without being compiled again when they change.
    """

    def __init__(self) -> None:
        self.called = False
        self.own_mean = False

    def note(self, own_mean: bool = False) -> None:
        """Of every call of the loss. own_mean: it got no number of items and divides by its batch's own."""
        if torch.is_grad_enabled():
            self.called = True
            if own_mean:
                self.own_mean = True

    def look(self) -> tuple[bool, bool]:
        """(called, own_mean) since the last look, which they forget."""
        seen = self.called, self.own_mean
        self.called = self.own_mean = False
        return seen
