"""docs/keyword.md followed to the letter, in a copy: its changes, its new file, its commands."""

from __future__ import annotations

import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from documents import fenced
from following import changes, copied, follow, run

PAGE = "docs/keyword.md"
# What tests/test_release.py reads besides.
MORE = ("CHANGELOG.md", "CITATION.cff", "setup.cfg", ".github", ".ci")


def run_line(folder: Path, line: str) -> subprocess.CompletedProcess[str]:
    python, *arguments = shlex.split(line)
    assert python == ".venv/bin/python"
    return run(folder, sys.executable, *arguments)


def test_the_page_to_the_letter(tmp_path: Path) -> None:
    folder = copied(tmp_path, MORE)
    follow(PAGE, folder)
    (new,) = fenced(PAGE, "python")
    (folder / "tests" / "test_inverse_temperature.py").write_text(new)
    surface, tests = fenced(PAGE, "sh")
    # Without the page of signatures its test says so.
    forgotten = run_line(folder, ".venv/bin/python -m pytest -q tests/test_release.py -k public")
    assert forgotten.returncode == 1 and "docs/surface.py" in forgotten.stdout
    for line in [*surface.splitlines(), *tests.splitlines()]:
        outcome = run_line(folder, line)
        assert outcome.returncode == 0, outcome.stdout[-4000:] + outcome.stderr[-2000:]


def test_the_page_changes_no_backend() -> None:
    assert not [change.path for change in changes(PAGE) if "backends" in change.path]


@pytest.mark.parametrize("name", ["inverse_temperature", "beta"])
def test_it_is_not_there_yet(name: str) -> None:
    import torch

    from deft_kernels import deft_loss

    with pytest.raises(TypeError, match=f"^{name}: "):
        deft_loss(torch.randn(2, 3), torch.tensor([0, 1]), **{name: 2.0})
