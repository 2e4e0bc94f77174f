"""docs/objectives.md followed to the letter, in a copy: its changes, then its command."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

import pytest
from documents import fenced
from following import changes, copied, follow, run

PAGE = "docs/objectives.md"

# The limits that the page names: a label of probability 0, and one of probability 1.
LIMITS = """
import torch
from deft_kernels import deft_loss, objectives

z = torch.tensor([[0.0, -torch.inf, 1.0], [0.0, 200.0, 1.0], [0.0, 1.0, 2.0]])
y = torch.tensor([1, 1, 1])
for gamma in (0.5, 1.0, 2.0):
    expected = torch.tensor([torch.inf, 0.0])
    x = z.clone().requires_grad_()
    objective = objectives.focal(gamma)
    loss, stats = deft_loss(x, y, objective=objective, reduction="none", return_stats=True, backend="torch")
    loss.sum().backward()
    assert torch.equal(loss[:2], expected), loss
    assert torch.equal(stats.gate[:2], torch.tensor([1.0, 0.0])), stats.gate
    assert x.grad.isfinite().all() and torch.equal(x.grad[0].sum(), torch.zeros(())), x.grad
    assert deft_loss(x, y, objective=objective, reduction="sum", grad_in_forward=True).isinf()
assert objectives.focal(0).family == "deformed"
"""


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(tmp_path_factory.mktemp("copy"))
    follow(PAGE, folder)
    return folder


def test_the_page_changes_both_backends_and_the_reference() -> None:
    changed = {change.path for change in changes(PAGE)}
    backends = {f"deft_kernels/backends/{name}/objectives.py" for name in ("pytorch", "triton")}
    assert {"deft_kernels/objectives.py", "deft_kernels/reference.py", *backends} <= changed


def test_the_page_to_the_letter(followed: Path) -> None:
    """Loss and gradient of both backends against the reference, as the page's own command runs them."""
    (block,) = fenced(PAGE, "sh")
    python, *arguments = shlex.split(block)
    assert python == ".venv/bin/python"
    outcome = run(followed, sys.executable, *arguments)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    assert "skipped" not in outcome.stdout.splitlines()[-1], outcome.stdout[-500:]


def test_the_limits_that_the_page_names(followed: Path) -> None:
    outcome = run(followed, sys.executable, "-c", LIMITS)
    assert outcome.returncode == 0, outcome.stderr[-3000:]
