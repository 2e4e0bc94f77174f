"""pytest plugin: a peer's tests with this package's loss in place of the peer's. See run.sh.

The names that a test module or the peer's own modules know are set to those of `adapters`; "cuda" means the
CPU where there is no GPU; sizes that are a GPU's are made small, the rest of each test is untouched.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import types
from collections.abc import Iterator
from typing import Any

import adapters
import pytest
import torch
from known import KNOWN, LEFT_OUT
from torch.overrides import TorchFunctionMode

PEER = os.environ["PEER"]
# Rows of a GPU's batch, in parameters or in the body of a test.
LARGE, SMALL = (423, 1024, 4096, 16384), 64
# Skips that only say that there is none.
WITHOUT_A_GPU = ("Test requires CUDA", "bfloat16 not supported on this GPU")
REPLACED: dict[str, dict[str, Any]] = {
    "pytorch": {},
    "liger": {
        "LigerCrossEntropyFunction": adapters.LigerCrossEntropyFunction,
        "LigerFusedLinearCrossEntropyFunction": adapters.LigerFusedLinearCrossEntropyFunction,
    },
    "apple": {
        "linear_cross_entropy": adapters.linear_cross_entropy,
        "softcapping": adapters.softcapping,
    },
    "flash": {"CrossEntropyLoss": adapters.FlashCrossEntropyLoss},
}
# Modules between a test and the replaced function.
BETWEEN = {
    "liger": (
        "liger_kernel.transformers.cross_entropy",
        "liger_kernel.transformers.fused_linear_cross_entropy",
        "liger_kernel.transformers.functional",
    )
}


class Namespace(types.ModuleType):
    """A module as a test sees it, with some names of ours."""

    def __init__(self, module: types.ModuleType, **ours: Any):
        super().__init__(module.__name__)
        self.__dict__.update(module.__dict__, **ours)


class OnTheCpu(TorchFunctionMode):
    """ "cuda" is the CPU, and a dimension of thousands of rows one of `SMALL`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func in (torch.randn, torch.randint, torch.randperm):
            args = tuple(smaller(argument) for argument in args)
        return func(*args, **kwargs)


def smaller(size: Any) -> Any:
    if isinstance(size, (tuple, list)):
        return tuple(smaller(s) for s in size)
    return SMALL if isinstance(size, int) and size in LARGE else size


def pytest_configure(config: pytest.Config) -> None:
    if PEER == "flash" and not torch.cuda.is_available():
        torch.cuda.get_device_capability = lambda *_: (8, 0)  # type: ignore[assignment]
        module = types.ModuleType("flash_attn.losses.cross_entropy")
        module.CrossEntropyLoss = adapters.FlashCrossEntropyLoss  # type: ignore[attr-defined]
        for name in ("flash_attn", "flash_attn.losses"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["flash_attn.losses.cross_entropy"] = module
    if PEER == "pytorch":
        # A copy of PyTorch's tests for another device asks for that device alone.
        from torch.testing._internal import common_device_type as devices

        instantiate = devices.instantiate_device_type_tests
        devices.instantiate_device_type_tests = lambda cls, scope, **_: instantiate(
            cls, scope, only_for="cpu"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for name in BETWEEN.get(PEER, ()):
        replace(importlib.import_module(name))
    kept = []
    for item in items:
        if any(re.search(pattern, item.nodeid) for pattern, _ in LEFT_OUT[PEER]):
            continue
        kept.append(item)
        replace(item.module)  # type: ignore[attr-defined]
        item.own_markers = [m for m in item.own_markers if m.kwargs.get("reason") not in WITHOUT_A_GPU]
        call = getattr(item, "callspec", None)
        if call is not None:
            call.params.update({name: smaller(value) for name, value in call.params.items()})
        for pattern, reason in KNOWN[PEER]:
            if re.search(pattern, item.nodeid):
                item.add_marker(pytest.mark.xfail(reason=reason, strict=True))
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def replace(module: types.ModuleType) -> None:
    for name, ours in REPLACED[PEER].items():
        if hasattr(module, name):
            setattr(module, name, ours)
    if PEER == "pytorch" and hasattr(module, "F") and not isinstance(module.F, Namespace):
        import torch.nn.functional as F

        function = Namespace(F, cross_entropy=adapters.cross_entropy)
        network = Namespace(torch.nn, CrossEntropyLoss=adapters.CrossEntropyLoss, functional=function)
        module.F, module.nn = function, network  # type: ignore[attr-defined]
        module.torch = Namespace(torch, nn=network)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    if PEER in ("apple", "flash") and not torch.cuda.is_available():
        with OnTheCpu(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "is_available", lambda: True)
            return (yield)
    return (yield)
