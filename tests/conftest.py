"""Without a GPU the compiled kernels run in an emulator of PTX (`ptx`), or on request in Triton's
interpreter. Either must be chosen before Triton is imported."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import Any

import pytest

# Side by side, processes with threads of their own wait for each other at every join.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import emulation
import sampling
import torch

COVERAGE = pytest.StashKey[dict[str, Any]]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("ptx", "how kernels run where there is no GPU")
    group.addoption(
        "--ptx", choices=emulation.CHOICES,
        help="compute capability of the emulated GPU (90), or the interpreter, also by TRITON_INTERPRET=1",
    )  # fmt: skip
    sampling.add_option(parser)
    group.addoption("--ptx-order", choices=("lockstep", "warps", "ctas"), default="lockstep")
    group.addoption("--ptx-seed", type=int, default=0, help="of the order and the noise")
    group.addoption("--ptx-noise", choices=("exact", "hash", "up", "down"), default="exact",
                    help="errors of ex2, lg2 and div, within what the PTX manual states")  # fmt: skip


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    sampling.describe(config)
    # xdist would hand out files by the number of their tests; the slowest have few.
    config.option.loadscopereorder = False
    asked = emulation.INTERPRETER if os.environ.get("TRITON_INTERPRET", "0") == "1" else "90"
    emulation.choose(
        option("--ptx") or asked, option("--ptx-order"), option("--ptx-seed"), option("--ptx-noise")
    )


# Files that take longest, so that none of them begins when all others are done.
FIRST = (
    "test_machine_code.py",
    "test_parallel.py",
    "test_linear_vocab_parallel.py",
    "test_adding_an_objective.py",
    "test_parallel_dtensor.py",
    "test_predicted_parallel.py",
    "test_torch_compile.py",
    "test_kernel_traffic.py",
    "test_documents.py",
    "test_traps.py",
    "test_semantics.py",
    "test_regimes.py",
    "test_row_formulas.py",
)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(FIRST)}
    items.sort(key=lambda item: places.get(item.path.name, len(FIRST)))
    sampling.leave_out(config, items)
    if emulation.emulator() is None or config.getoption("--ptx-noise") == "exact":
        return
    for item in items:
        reason = next((r for name, r in emulation.BEYOND.items() if item.nodeid.endswith(name)), None)
        if reason is not None:
            item.add_marker(pytest.mark.xfail(reason=reason))


def pytest_collection_finish() -> None:
    """What is imported stays: no collection of garbage has to look through it again, which compiling a
    kernel, by its many small objects, sets off several times."""
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


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


def whole_suite(config: pytest.Config) -> bool:
    everything = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    return everything and not config.option.keyword and not config.option.markexpr


def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of xdist hands over what its kernels ran; the session that has all of it holds the floor."""
    emulator = emulation.emulator()
    if emulator is None:
        return
    own = emulation.coverage_of(emulator)
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["ptx"] = own.specialisations
        return
    whole = session.config.stash.setdefault(COVERAGE, {})
    own.merge(whole)
    whole.update(own.specialisations)
    held = whole_suite(session.config) and session.exitstatus == 0
    if held and (emulation.below(own) or emulation.not_accounted_for(own)):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """A worker of xdist is done."""
    emulator = emulation.emulator()
    if emulator is not None:
        own = emulation.coverage_of(emulator, node.config.stash.get(COVERAGE, {}))
        own.merge(getattr(node, "workeroutput", {}).get("ptx", {}))
        node.config.stash[COVERAGE] = own.specialisations


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    emulator = emulation.emulator()
    if emulator is not None and config.stash.get(COVERAGE, {}):
        for line in emulation.summary(emulator, config.stash[COVERAGE], whole_suite(config)):
            terminalreporter.write_line(line)


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
