"""README and docs as tests see them: fenced blocks, indented commands, text without line breaks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def text(page: str) -> str:
    return (ROOT / page).read_text()


def prose(page: str) -> str:
    """With every run of white space as one space, so that a sentence is found whatever line it breaks on."""
    return re.sub(r"\s+", " ", text(page))


def fenced(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text(page), flags=re.MULTILINE | re.DOTALL)


def commands(page: str) -> list[str]:
    """Shell lines: of fenced blocks, and indented lines that start as one."""
    found = [line for kind in ("sh", "bash") for block in fenced(page, kind) for line in block.splitlines()]
    starts = r"(?:\.venv/bin/python|python3?|pip|pytest|\.ci/|benchmarks/|tests/)"
    return found + re.findall(rf"^    ({starts}\S* ?.*)$", text(page), flags=re.MULTILINE)


def execute(page: str, block: int, names: dict[str, Any]) -> dict[str, Any]:
    """Run a page's Python block with the given names; all the names it then knows."""
    scope = {"__name__": page, **names}
    exec(compile(fenced(page, "python")[block], f"{page}, block {block}", "exec"), scope)
    return scope
