"""Options of the benchmark suite, its records, and the list of who could not be measured."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import machine
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", metavar="FILE", help="write what was measured, as JSON")


class Records:
    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}


KEY = pytest.StashKey[Records]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Records()


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest) -> Iterator[Records]:
    kept = request.config.stash[KEY]
    before = machine.described()
    yield kept
    path = request.config.getoption("--records")
    if path and kept.kept:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        whole = before | {"load_after": machine.load(), "skipped": kept.skipped, "records": kept.kept}
        Path(path).write_text(json.dumps(whole, indent=1) + "\n")


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, reason in config.stash[KEY].skipped.items():
        terminalreporter.write_line(f"skipped {name}: {reason}")
