"""TRITON_INTERPRET decides while Triton is imported; a value that came too late says so."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="asks for kernels on a CPU")

CALL = """
from deft_kernels import deft_loss
try:
    deft_loss(torch.randn(2, 5), torch.tensor([1, 2]), backend="triton")
    print("ran")
except RuntimeError as error:
    print(error)
"""


def said(before: str, inside: str | None) -> str:
    """What a new process prints; inside: the variable as the process starts with it."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if inside is not None:
        environment["TRITON_INTERPRET"] = inside
    program = f"import os, torch\n{before}\n{CALL}"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True
    )
    return done.stdout.strip()


SET = 'os.environ["TRITON_INTERPRET"] = "1"'
LATE = 'backend: "triton" cannot run here: TRITON_INTERPRET was set after Triton was imported'


@pytest.mark.parametrize(
    ("before", "inside", "expected"),
    [
        (f"import deft_kernels\n{SET}", None, "ran"),
        (f"import triton\n{SET}", None, LATE),
        (f"import deft_kernels.backends.triton.backend\n{SET}", None, LATE),
        ('import triton\nos.environ.pop("TRITON_INTERPRET")', "1", 'backend: "triton" cannot run here'),
    ],
    ids=["after the package", "after Triton", "after the kernels", "taken away"],
)
def test_when_it_was_set(before, inside, expected):
    assert said(before, inside).startswith(expected)
