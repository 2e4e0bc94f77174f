"""benchmarks/regimes in its tiny size: a killed run goes on and ends with an uninterrupted one's numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from documents import ROOT

pytest.importorskip("tqdm")
pytest.importorskip("rapidfuzz")
pytest.importorskip("pyfiglet")
pytest.importorskip("matplotlib")  # the example's, from which the model is
COMMAND = [sys.executable, str(ROOT / "benchmarks/regimes/run.py")]
# 2 objectives x (2 rates + 2 seeds).
CELLS = 8


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [
        *COMMAND,
        str(folder),
        "--tiny",
        "--task",
        "cipher",
        "--objective",
        "nll",
        "--objective",
        "deft",
    ]
    pipe = subprocess.PIPE
    return subprocess.Popen([*command, *more], env=environment, stdout=pipe, stderr=pipe, text=True)


def records(folder: Path) -> dict[str, Any]:
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*-cipher-*.json")}
    for record in found.values():
        del record["seconds"]
    return found


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    """Also with another number of processes; and the killed one's end with it."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = start(whole, "--workers", "1")
    killed = start(cut, "--workers", "2")
    while not list(cut.glob("*-cipher-*.json")):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=200)  # ends when its last worker has: they hold the other end
    done = {path: path.stat().st_mtime_ns for path in cut.glob("*-cipher-*.json")}
    assert 0 < len(done) < CELLS
    printed, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert len(records(whole)) == CELLS
    assert [line.split()[:2] for line in printed.splitlines()[1:]] == [["cipher", "nll"], ["cipher", "deft"]]

    run = start(cut, "--workers", "1")
    again, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert records(cut) == records(whole) and again == printed
    written = json.loads((cut / "records.json").read_text())
    assert len(written["records"]) == CELLS and (cut / "base-cipher.npz").exists()
    assert written["found"] == len(done)
