"""`python -m deft_kernels`, and what importing the package costs."""

from __future__ import annotations

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
        return genuine(logits, labels, **keywords) * (1.001 if not keywords else 1.0)

    monkeypatch.setattr(doctor, "deft_loss", broken)
    assert doctor.main() == 1
    assert "WRONG" in capsys.readouterr().out
