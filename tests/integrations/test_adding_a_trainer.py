"""docs/trainer.md followed to the letter, in a copy: its two files, its change, its commands."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

import pytest
from documents import fenced, text
from following import copied, follow, run

pytest.importorskip("ignite")
PAGE = "docs/trainer.md"


@pytest.fixture(scope="module")
def followed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copied(tmp_path_factory.mktemp("copy"), ("setup.cfg",))
    follow(PAGE, folder)
    blocks = fenced(PAGE, "python")
    # Each new file is named last before its block.
    before = re.split(r"^```python\n.*?^```$", text(PAGE), flags=re.MULTILINE | re.DOTALL)
    names = [re.findall(r"`([\w/]+\.py)`", words) for words in before[: len(blocks)]]
    paths = ["deft_kernels/integrations/ignite.py", "tests/integrations/test_ignite.py"]
    for path, named, block in zip(paths, names, blocks, strict=True):
        assert path in named and not (folder / path).exists()
        (folder / path).write_text(block)
    return folder


def test_the_page_to_the_letter(followed: Path) -> None:
    (block,) = fenced(PAGE, "sh")
    tests, contracts = block.splitlines()
    python, *arguments = shlex.split(tests)
    assert python == ".venv/bin/python" and contracts == ".venv/bin/lint-imports"
    outcome = run(followed, sys.executable, *arguments)
    assert outcome.returncode == 0, outcome.stdout[-4000:]
    assert "2 passed" in outcome.stdout, outcome.stdout[-500:]


def test_the_contracts_know_the_module(followed: Path) -> None:
    """Without the line of setup.cfg they fail: the contract lists every module."""
    command = Path(sys.executable).with_name("lint-imports")
    if not command.exists():
        pytest.skip("import-linter is not installed")
    assert run(followed, str(command)).returncode == 0
    config = followed / "setup.cfg"
    config.write_text(config.read_text().replace(" | ignite", ""))
    assert run(followed, str(command)).returncode != 0
