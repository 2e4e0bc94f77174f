"""`python -m deft_kernels`, and what importing the package costs."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest
import torch

from deft_kernels import __main__ as doctor
from deft_kernels import __version__


def test_says_which_backend_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    assert f"deft-kernels {__version__}" in printed
    assert f"torch {torch.__version__}" in printed
    assert "cpu, float32: backend 'torch' (" in printed
    assert "good" in printed
    assert "WRONG" not in printed


def test_notices_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The check has to be able to fail: a loss that is off by a tenth of a per cent is reported."""
    genuine = doctor.deft_loss

    def broken(logits: torch.Tensor, labels: torch.Tensor, **keywords: object) -> torch.Tensor:
        return genuine(logits, labels, **keywords) * (1.0 if keywords["backend"] == "reference" else 1.001)

    monkeypatch.setattr(doctor, "deft_loss", broken)
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out


@pytest.mark.skipif(platform.system() != "Linux", reason="Triton is for Linux")
def test_runs_the_kernels_in_the_interpreter_on_request() -> None:
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "deft_kernels"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "cpu, bfloat16: backend 'triton' (as asked, in the interpreter)" in run.stdout
    assert run.stdout.count("good") == 4 + 2 * torch.cuda.device_count() and "WRONG" not in run.stdout
