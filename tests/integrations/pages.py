"""The code blocks of a page in docs/integrations: what the pages show is what the tests run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parents[2] / "docs" / "integrations"


def blocks(page: str, language: str = "python") -> list[str]:
    """The fenced blocks of docs/integrations/<page>.md in one language, in order."""
    text = (FOLDER / f"{page}.md").read_text()
    found = re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)
    assert found, f"{page}.md shows no {language}"
    return found


def run_block(page: str, number: int = 0, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Execute a page's Python block with the given names, and return all names it then knows."""
    scope: dict[str, Any] = {"__name__": page, **(names or {})}
    exec(compile(blocks(page)[number], f"{page}.md, block {number}", "exec"), scope)
    return scope
