"""Which combinations of parameters an ordinary run tries. The kernels are compiled anew for most of them, and
run in an emulator, where that takes the most of a test.

`@pytest.mark.sampled`: of its combinations so many that each value of each parameter is in one of them; with
the PyTorch backend, which compiles nothing, all. `@pytest.mark.everything`, on a test or one parameter: none.
With `--everything` all are tried.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

MARKS = (
    "sampled: an ordinary run tries each value of each parameter; --everything, each combination",
    "everything: only tried with --everything",
)


def first_of(values: Iterable[Any]) -> list[Any]:
    """For `parametrize`: an ordinary run tries the first."""
    first, *others = values
    return [first, *(pytest.param(value, marks=pytest.mark.everything) for value in others)]


def add_option(parser: pytest.Parser) -> None:
    parser.addoption("--everything", action="store_true", help="all combinations of parameters; takes longer")


def describe(config: pytest.Config) -> None:
    for mark in MARKS:
        config.addinivalue_line("markers", mark)


def leave_out(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A test that is asked for by its name is wanted all the same."""
    if config.getoption("--everything") or any("::" in argument for argument in config.args):
        return
    dropped = left_out(items)
    config.hook.pytest_deselected(items=[item for item in items if item in dropped])
    items[:] = [item for item in items if item not in dropped]


def values_of(item: pytest.Item) -> frozenset[tuple[str, str]]:
    callspec = getattr(item, "callspec", None)
    assert callspec is not None, f"{item.nodeid}: sampled, and has no parameters"
    return frozenset((name, repr(value)) for name, value in callspec.params.items())


def sample(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """Of one function's items: again and again the first of those with most values not seen so far."""
    left = {item: values_of(item) for item in items}
    chosen: set[pytest.Item] = set()
    seen: frozenset[tuple[str, str]] = frozenset()
    while left:
        best = max(left, key=lambda item: len(left[item] - seen))
        if not left[best] - seen:
            break
        seen |= left.pop(best)
        chosen.add(best)
    return chosen


def left_out(items: Iterable[pytest.Item]) -> set[pytest.Item]:
    """What an ordinary run does not try."""
    dropped: set[pytest.Item] = set()
    functions: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("everything"):
            dropped.add(item)
        elif item.get_closest_marker("sampled") and ("backend", repr("torch")) not in values_of(item):
            functions.setdefault(item.nodeid.split("[")[0], []).append(item)
    for found in functions.values():
        dropped |= set(found) - sample(found)
    return dropped
