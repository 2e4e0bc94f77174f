"""What an ordinary run leaves out, by pytest's own collection of a folder with two tests."""

from __future__ import annotations

from pathlib import Path

import pytest
from processes import collected

CONFTEST = """
import sampling

pytest_addoption = sampling.add_option
pytest_configure = sampling.describe
pytest_collection_modifyitems = sampling.leave_out
"""
TESTS = """
import pytest
from sampling import first_of

@pytest.mark.sampled
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_sampled(backend, reduction, dtype):
    pass

@pytest.mark.parametrize("case", first_of(["a", "b"]))
def test_first(case):
    pass
"""
WITHOUT = """
import pytest

@pytest.mark.sampled
def test_alone():
    pass
"""


def names(folder: Path, *arguments: str, tests: str = TESTS) -> list[str]:
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_of_its_own.py").write_text(tests)
    outcome, printed = collected(["-p", "no:cacheprovider", *arguments], folder)
    assert outcome == pytest.ExitCode.OK, printed
    return [line.split("::")[1] for line in printed.splitlines() if "::" in line]


def test_each_value_is_tried(tmp_path: Path) -> None:
    found = names(tmp_path)
    kernels = [name for name in found if name.startswith("test_sampled[triton")]
    assert len(kernels) == 3  # of 6
    for value in ("mean", "none", "fp32", "bf16", "fp16"):
        assert any(value in name for name in kernels), (value, kernels)
    # What compiles nothing is tried whole.
    assert sum(name.startswith("test_sampled[torch") for name in found) == 6
    assert [name for name in found if "first" in name] == ["test_first[a]"]
    assert len(found) == 3 + 6 + 1


BY_NAME = ["test_of_its_own.py::test_sampled", "test_of_its_own.py::test_first"]


@pytest.mark.parametrize("arguments", [["--everything"], BY_NAME], ids=["everything", "by name"])
def test_all_on_request(arguments: list[str], tmp_path: Path) -> None:
    found = names(tmp_path, *arguments)
    assert len(found) == len(set(found)) == 12 + 2


def test_a_test_without_parameters_cannot_be_sampled(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="test_alone: sampled, and has no parameters"):
        names(tmp_path, tests=WITHOUT)
