"""A page that changes files, followed to the letter: its blocks of `diff`, applied to a copy."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from documents import ROOT, text

# What a copy needs to run tests of the package.
COPIED = ("README.md", "pyproject.toml", "benchmarks", "deft_kernels", "docs", "tests")


class Change(NamedTuple):
    path: str
    before: str
    after: str


def changes(page: str) -> list[Change]:
    """Of the `diff` blocks, in order; a block belongs to the file that the text before it names last."""
    found: list[Change] = []
    paths: list[str] = []
    for words, block in re.findall(r"(.*?)^```diff\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL):
        named = re.findall(r"`([\w/.]+\.(?:py|md|cfg))`", words)
        if named:
            paths = [name for name in named if (ROOT / name).is_file()]
        found.append(_change(paths, block))
    return found


def _change(paths: list[str], block: str) -> Change:
    lines = block.splitlines(keepends=True)
    assert all(line[0] in "+- \n" for line in lines), block
    before = "".join(line[1:] or line for line in lines if line[0] != "+")
    after = "".join(line[1:] or line for line in lines if line[0] != "-")
    assert before and before != after, block
    homes = [path for path in paths if (ROOT / path).read_text().count(before) == 1]
    assert len(homes) == 1, f"the page's block has its place in {homes}, of {paths}:\n{block}"
    return Change(homes[0], before, after)


def copied(folder: Path, more: tuple[str, ...] = ()) -> Path:
    for name in (*COPIED, *more):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    return folder


def follow(page: str, folder: Path) -> None:
    for path, before, after in changes(page):
        file = folder / path
        words = file.read_text()
        assert words.count(before) == 1, f"{path}: not there, or not there once:\n{before}"
        file.write_text(words.replace(before, after))


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder)}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
