"""docs/examples/finetune.py: what it refuses before the work begins, and the names of what it writes."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from documents import ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")


class Begun(Exception):
    """The arguments were taken."""


@pytest.fixture
def finetune(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("finetune", ROOT / "docs/examples/finetune.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    Path("x.png").mkdir()
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)  # the example takes one


def given(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", ["finetune.py", *arguments])


def begins(finetune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    def begun() -> None:
        raise Begun

    monkeypatch.setattr(finetune, "standard_library", begun)
    finetune.main()


@pytest.mark.parametrize(
    "option, value, why",
    [
        ("--out", "none/curves.png", "no folder none"),
        ("--out", "curves.foo", "Format 'foo' is not supported"),
        ("--out", "there", "there is a folder"),
        ("--out", "x", "x.png is a folder"),
        ("--out", ".", ". is a folder"),
        ("--logits", "none/logits.npz", "no folder none"),
        ("--logits", "there", "there is a folder"),
        ("--steps", "0", "0 is not above 0"),
        ("--pretrain-steps", "-1", "-1 is below 0"),
        ("--corrupt", "-0.1", "-0.1 is no share in [0, 1)"),
        ("--corrupt", "1", "1.0 is no share in [0, 1)"),
        ("--corrupt", "nan", "nan is no share in [0, 1)"),
    ],
)
def test_refused_before_the_work_begins(
    option: str,
    value: str,
    why: str,
    finetune: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given(monkeypatch, option, value)
    with pytest.raises(SystemExit) as raised:
        begins(finetune, monkeypatch)
    assert raised.value.code
    assert f"{option}: {why}" in str(raised.value) + capsys.readouterr().err


@pytest.mark.parametrize("option", ["--out", "--logits"])
def test_a_place_that_cannot_be_written_to(
    option: str, finetune: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Asked of the system, as the tests may run as root, who writes everywhere.
    monkeypatch.setattr(finetune.os, "access", lambda path, mode: path != Path("there"))
    given(monkeypatch, option, "there/file")
    with pytest.raises(SystemExit, match=f"{option}: there/file.* cannot be written"):
        begins(finetune, monkeypatch)


@pytest.mark.parametrize(
    "arguments",
    [[], ["--corrupt", "0"], ["--pretrain-steps", "0"], ["--steps", "1"], ["--out", "there/curves.svg"]],
)
def test_taken(arguments: list[str], finetune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    given(monkeypatch, *arguments)
    with pytest.raises(Begun):
        begins(finetune, monkeypatch)
    assert not [path for path in Path().rglob("*") if path.is_file()]


def test_it_prints_the_names_that_it_writes(
    finetune: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without an ending matplotlib and NumPy append their own; NumPy also to an ending that is not its."""
    given(monkeypatch, "--tiny", "--corrupt", "0", "--out", "there/curves", "--logits", "logits.v2")
    finetune.main()
    printed = capsys.readouterr().out
    assert "curves: there/curves.png\n" in printed
    assert "logits before fine-tuning: logits.v2.npz\n" in printed
    assert "nan" not in printed
    with np.load("logits.v2.npz") as fields:
        assert set(fields) == {"logits", "labels"}
    assert Path("there/curves.png").stat().st_size
