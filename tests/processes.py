"""Processes that tests start: forks of one that has imported PyTorch already, as that takes seconds."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch

# What the processes come to import; Dynamo with the first registered operator that is called.
IMPORTED = ["pytest", "torch.distributed.tensor", "torch.testing", "torch._dynamo", "deft_kernels"]


def start_method() -> str:
    """As multiprocessing names it. The parent is a process that has done nothing but import: the tests' own
    has threads and kernels. With GPUs a process decides how its kernels run before it imports Triton."""
    if torch.cuda.is_available() or "forkserver" not in multiprocessing.get_all_start_methods():
        return "spawn"
    multiprocessing.get_context("forkserver").set_forkserver_preload(IMPORTED)
    return "forkserver"


def _collect(arguments: list[str], folder: Path, printed: str) -> None:
    import pytest

    # What a worker of xdist tells of itself is not true of this process.
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        del os.environ[name]
    os.chdir(folder)
    with Path(printed).open("w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        outcome = pytest.main(["-q", "--collect-only", *arguments])
    os._exit(int(outcome))


def collected(arguments: list[str], folder: Path) -> tuple[int, str]:
    """What pytest's command line selects there: its exit code, and what it printed."""
    with tempfile.NamedTemporaryFile("r") as printed:
        context = multiprocessing.get_context(start_method())
        process = context.Process(target=_collect, args=(arguments, folder, printed.name))
        process.start()
        process.join()
        return process.exitcode, printed.read()
