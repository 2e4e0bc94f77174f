"""Which backend a call takes, and why."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter was asked for, which runs the kernels on the CPU, slowly."""
    return os.environ.get("TRITON_INTERPRET", "0") in ("1", "true", "on", "yes", "y")


# Found without importing Triton, so that on a CPU it is never imported. A constant, so torch.compile folds
# it.
TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def _imported_otherwise() -> str | None:
    """Why Triton as it was imported does not fit TRITON_INTERPRET as it is now; None where it does.

    Triton reads the variable when a function is decorated; for its own functions, while it is imported.
    Before that import there is nothing that could disagree.
    """
    language = sys.modules.get("triton.language")
    if language is None:
        return None
    # One of Triton's own functions that are written in its language.
    compiled = isinstance(language.softmax, sys.modules["triton"].JITFunction)
    if compiled != interpreted():
        return None
    state = "set after" if compiled else "set while it was imported, and unset"
    return (
        f"TRITON_INTERPRET was {state} Triton was imported{', which compiles since' if compiled else ''}; "
        "set it before the process starts, or at least before the first import of triton"
    )


# A trace asks once and keeps the answer.
_imported_otherwise._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _device_obstacle(kind: str, index: int | None) -> str | None:
    if kind != "cuda":
        return f"tensors on {kind!r} have no Triton backend here (TRITON_INTERPRET=1 runs it on the CPU)"
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"compute capability {major}.{minor} is below 8.0"
    return None


def obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the Triton kernels cannot take a tensor of this device and dtype; None when they can."""
    if not TRITON_INSTALLED:
        return "triton is not installed"
    if dtype not in KERNEL_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {dtype}"
    if device.type == "cpu" and interpreted():
        return _imported_otherwise()
    return _device_obstacle(device.type, device.index) or _imported_otherwise()


def choose(backend: str, device: torch.device, dtype: torch.dtype) -> str:
    """Resolve "auto": Triton on a GPU that it supports, PyTorch otherwise, always PyTorch for float64.

    backend: one of `core.arguments.BACKENDS`.
    Raises: RuntimeError when "triton" is asked for where it cannot run.
    """
    if backend in ("torch", "reference"):
        return backend
    if backend == "auto" and device.type == "cpu":
        return "torch"
    reason = obstacle(device, dtype)
    if reason is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f'backend: "triton" cannot run here: {reason}')
    return "torch"
