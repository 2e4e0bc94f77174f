"""Options of the benchmark suite, its records, and the list of who could not be measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import machine
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--records", metavar="FILE", help="write what was measured, as JSON")


class Records:
    """What was measured, written after each: a run that is cut short keeps what it has."""

    def __init__(self, path: str | None) -> None:
        self.path = Path(path) if path else None
        self.kept: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.before = machine.described() if path else {}

    def keep(self, record: dict[str, Any]) -> None:
        self.kept.append(record)
        if self.path is not None:
            whole = self.before | {
                "load_after": machine.load(),
                "skipped": self.skipped,
                "records": self.kept,
            }
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(json.dumps(whole, indent=1) + "\n")


KEY = pytest.StashKey[Records]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[KEY] = Records(config.getoption("--records"))


@pytest.fixture(scope="session")
def records(request: pytest.FixtureRequest) -> Records:
    return request.config.stash[KEY]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    for name, reason in config.stash[KEY].skipped.items():
        terminalreporter.write_line(f"skipped {name}: {reason}")
