"""Without a GPU the compiled kernels run in an emulator of PTX (`ptx`), or on request in Triton's
interpreter. Either must be chosen before Triton is imported."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

# Side by side, processes with threads of their own wait for each other at every join.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulation
import torch

COVERAGE = pytest.StashKey[dict[str, Any]]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "how kernels run where there is no GPU")
    group.addoption(
        "--ptx", choices=emulation.CHOICES, default="90", help="compute capability, or the interpreter"
    )
    group.addoption("--ptx-order", choices=("lockstep", "warps", "ctas"), default="lockstep")
    group.addoption("--ptx-seed", type=int, default=0, help="of the order and the noise")
    group.addoption("--ptx-noise", choices=("exact", "hash", "up", "down"), default="exact",
                    help="errors of ex2, lg2 and div, within what the PTX manual states")  # fmt: skip
    group.addoption("--ptx-coverage", type=float, nargs=2, metavar=("LINES", "BLOCKS"),
                    help="fail below these percentages of the kernels' lines and blocks")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    emulation.choose(option("--ptx"), option("--ptx-order"), option("--ptx-seed"), option("--ptx-noise"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    result = yield
    emulation.fail_on_reports("in this test")
    return result


@pytest.fixture(autouse=True)
def _reports() -> Iterator[None]:
    """What a failed test left behind is not the next one's."""
    yield
    emulator = emulation.emulator()
    if emulator:
        emulator.reports.take()


def pytest_sessionfinish(session: pytest.Session) -> None:
    emulator = emulation.emulator()
    if emulator is None:
        return
    from ptx.coverage import Coverage

    own = Coverage.of(emulator.kernels.values())
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ptx"] = own.specialisations
        return
    whole = session.config.stash.setdefault(COVERAGE, {})
    own.merge(whole)
    whole.update(own.specialisations)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of xdist is done."""
    from ptx.coverage import Coverage

    whole = Coverage(node.config.stash.setdefault(COVERAGE, {}))
    whole.merge(getattr(node, "workeroutput", {}).get("ptx", {}))


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    emulator = emulation.emulator()
    if emulator is None:
        return
    from ptx.coverage import Coverage

    whole = Coverage(config.stash.get(COVERAGE, {}))
    if not whole.specialisations:
        return
    (ran, known), (blocks, all_blocks), (places, all_places) = whole.lines(), whole.blocks(), whole.places()
    line = terminalreporter.write_line
    line("")
    line(
        f"sm_{emulator.arch}, {len(whole.specialisations)} kernels: {len(ran)} of {len(known)} lines, "
        f"{len(places)} of {len(all_places)} places, {blocks} of {all_blocks} blocks ran"
    )
    line(f"lines that never ran: {sorted(known - ran)}")
    line(f"places that never ran: {sorted(all_places - places)}")


@pytest.fixture
def device() -> str:
    """Where the kernels run: the GPU where there is one, else the CPU."""
    return DEVICE


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> str:
    """Every behaviour is asked of both backends."""
    return request.param


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
