"""The records of the kernels: which variants there are, and how few parameters a function needs."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from typing import Any

from deft_kernels import objectives
from deft_kernels.backends import triton as room
from deft_kernels.backends.triton import launch
from deft_kernels.backends.triton.records import Options
from deft_kernels.core.spec import Spec
from deft_kernels.objectives import Objective


def variants(objective: Objective, **settings: Any) -> launch.Variants:
    return launch.variants(Spec(objective, **settings), 32000, False, "ptx")


def values(record: Options) -> dict[str, Any]:
    return {name: value.value for name, value in record._asdict().items()}


def test_objectives_share_the_kernels_in_which_they_do_not_differ() -> None:
    """Each variant of a kernel is compiled for itself, which takes a second."""
    plain = variants(objectives.nll())
    for objective in (objectives.deft(), objectives.cayley(), objectives.dft(), objectives.rational()):
        other = variants(objective)
        assert values(other.slices) == values(plain.slices)
        assert values(other.states) == values(plain.states)
        assert values(other.gradient) == values(plain.gradient)
        assert values(other.rows) != values(plain.rows)
    capped, exact = variants(objectives.nll(), softcap=30.0), variants(objectives.deft(detach=False))
    assert values(capped.finish) == values(plain.finish)
    assert values(capped.slices) != values(plain.slices)
    assert values(exact.slices) == values(plain.slices)
    assert values(exact.gradient) != values(plain.gradient)


def test_records_are_made_once() -> None:
    """Made anew at each launch they take the host longer than the launch."""
    for objective in objectives.NAMED.values():
        assert variants(objective) is variants(objective)


def test_no_function_takes_a_long_list() -> None:
    """Kernels apart, whose arguments the launchers give one by one."""
    found = 0
    for module in pkgutil.iter_modules(room.__path__):
        for name, member in vars(importlib.import_module(f"{room.__name__}.{module.name}")).items():
            function = getattr(member, "fn", member)
            if not inspect.isfunction(function) or not function.__module__.startswith(room.__name__):
                continue
            found += 1
            most = 20 if name.endswith("_kernel") else 12
            assert len(inspect.signature(function).parameters) <= most, f"{module.name}.{name}"
    assert found > 50
