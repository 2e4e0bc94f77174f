"""The host must not wait for the device: what a GPU says about it itself."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def refusing_waits() -> Iterator[None]:
    """Whatever makes the host wait raises. For a GPU."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        # As an error it would leave the mode on, and every later test of the process would fail.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
