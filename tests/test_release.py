"""What a release promises: one version, a page of what is public, papers that are cited, licences."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.metadata import metadata
from pathlib import Path

import pytest

from deft_kernels import __version__, objectives, weighted

ROOT = Path(__file__).parent.parent


def read(name: str) -> str:
    return (ROOT / name).read_text()


def test_one_version() -> None:
    assert re.search(r"^version: (.*)$", read("CITATION.cff"), re.M)[1] == __version__  # type: ignore[index]
    newest = re.search(r"^## \[(.*?)\] - ", read("CHANGELOG.md"), re.M)
    assert newest is not None and newest[1] == __version__
    assert 'dynamic = ["version"]' in read("pyproject.toml")  # it comes from the module
    kinds = re.findall(r"^### (.*)$", read("CHANGELOG.md"), re.M)
    assert kinds and set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_what_is_public() -> None:
    """A change of a name, an argument or a default shows in docs/api.md."""
    run = subprocess.run(
        [sys.executable, "-c", "import surface; print(surface.page(), end='')"],
        cwd=ROOT / "docs", env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert run.stdout == read("docs/api.md"), "run `python docs/surface.py`, if the change is meant"


def test_papers_are_cited() -> None:
    """Of everything that is implemented: the numbers that the objectives' docstrings name."""
    named = set(re.findall(r"arXiv:(\d{4}\.\d{5})", (objectives.__doc__ or "") + str(read_docstrings())))
    assert named and named <= set(re.findall(r"arXiv:(\d{4}\.\d{5})", read("CITATION.cff")))


def read_docstrings() -> list[str]:
    made = [*objectives.TABLE.values(), weighted.chord, weighted.infosft, weighted.mile]
    return [function.__doc__ or "" for function in made]


PERMISSIVE = ("apache", "bsd", "mit", "psf", "python software foundation", "zlib")


@pytest.mark.parametrize("name", ["torch", "numpy", "typing-extensions", "triton"])
def test_licences(name: str) -> None:
    """What the core depends on may be used with Apache-2.0."""
    if name == "triton":
        pytest.importorskip("triton")
    found = metadata(name)
    texts = [found.get("License-Expression") or "", found.get("License") or ""]
    texts += [line for line in found.get_all("Classifier") or () if line.startswith("License")]
    assert any(word in text.lower() for text in texts for word in PERMISSIVE), texts


def test_scripts_of_the_workflow_exist() -> None:
    steps = re.findall(r"run: (\S+)", read(".github/workflows/ci.yml"))
    assert steps and all((ROOT / step).is_file() for step in steps)
