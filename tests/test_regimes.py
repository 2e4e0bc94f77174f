"""benchmarks/regimes in its tiny size: a killed run goes on and ends with an uninterrupted one's numbers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from documents import ROOT

pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")  # the example's, from which the model is
COMMAND = [sys.executable, str(ROOT / "benchmarks/regimes/run.py")]
# 7 objectives x (2 rates + 2 seeds).
CELLS = 28


def start(folder: Path, *more: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [*COMMAND, str(folder), "--tiny", "--task", "cipher", *more]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def records(folder: Path) -> dict[str, object]:
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*-*.json")}
    assert all(record["task"] == "cipher" for record in found.values())
    return found


def test_a_killed_run_goes_on(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    run = start(whole)
    printed, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert len(records(whole)) == CELLS
    assert [line.split()[1] for line in printed.splitlines()[1:]][:2] == ["nll", "neg_prob"]

    killed = start(cut)
    while not list(cut.glob("validation-*-eaft-*.json")):
        assert killed.poll() is None, killed.communicate()[1]
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    done = {path: path.stat().st_mtime_ns for path in cut.glob("*-*.json")}
    assert 0 < len(done) < CELLS
    run = start(cut)
    again, errors = run.communicate(timeout=200)
    assert run.returncode == 0, errors
    assert {path: path.stat().st_mtime_ns for path in done} == done
    assert records(cut) == records(whole) and again == printed

    (cut / "settings.json").write_text("{}")
    run = start(cut)
    assert "settings.json: the folder has records of another size" in run.communicate()[1]
