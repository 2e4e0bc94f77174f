"""The code blocks of a page in docs/integrations, which the tests run, in one process or as two ranks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
FOLDER = HERE.parents[1] / "docs" / "integrations"


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


def two_ranks(script: str, *arguments: object) -> None:
    """Run a Python file as two gloo ranks; the output is shown when they fail."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", script]
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    run = subprocess.run(
        [*command, *map(str, arguments)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
