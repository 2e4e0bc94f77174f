"""What a record says of where and when it was taken."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "numpy", "liger-kernel", "quack-kernels", "cut-cross-entropy", "trl")


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    model = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def folder() -> str:
    """Name of this machine's folder under benchmarks/results."""
    return re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")


def load() -> list[float] | None:
    """Processes that wanted a core in the last 1, 5 and 15 minutes."""
    return list(os.getloadavg()) if hasattr(os, "getloadavg") else None


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The checkout's commit, marked where files differ from it; None outside of one."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    return run.stdout.strip() if run.returncode == 0 else None


def command() -> str:
    """As one would type it at the root of the checkout."""
    words = [Path(sys.argv[0]).name, *sys.argv[1:]]
    if words[0] in ("__main__.py", "pytest"):
        words[0] = "python -m pytest"
    return words[0] + "".join(f" {shlex.quote(word.replace(f'{ROOT}/', ''))}" for word in words[1:])


def described() -> dict[str, Any]:
    return {
        "device": device_name(),
        "system": f"{platform.system()}, {os.cpu_count()} cores",
        "versions": versions(),
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": command(),
        "load_before": load(),
    }
