"""Every argument of every public call, with values that nobody means: taken, or refused by its name.

Not in question here is whether a value is taken rightly, but that none ends in an error from further down.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deft_kernels
from deft_kernels import diagnostics, objectives, parallel
from deft_kernels.diagnostics import Recorder, Recording
from deft_kernels.integrations.columns import Columns
from deft_kernels.integrations.running import RunningStatistics

N, D, V = 4, 3, 9
LABELS = torch.tensor([1, 2, 3, -100])


def values() -> dict[str, Any]:
    """Of each kind one that some argument might be given by mistake."""
    return {
        "None": None, "text": "x", "empty text": "", "bytes": b"x", "True": True, "False": False,
        "1.5": 1.5, "-1": -1, "10^30": 10**30, "10^400": 10**400, "nan": math.nan, "inf": math.inf, "1j": 1j,
        "object": object(), "function": lambda *_args, **_keywords: None, "class": int,
        "[]": [], "[1]": [1, 2, 3, 4], "{}": {}, "tuple": (0.5, 0.1), "module": torch.nn.Linear(2, 2),
        "array": np.zeros(N), "array of texts": np.array(["a", "b"]), "numpy": np.int64(3),
        "floats": torch.zeros(N), "leaf": torch.zeros(N, requires_grad=True), "bools": torch.zeros(N).bool(),
        "integers": torch.zeros(N, dtype=torch.int64), "0-d": torch.tensor(1.0), "0-d integer": LABELS[0],
        "3-d": torch.zeros(2, 2, 2), "no element": torch.empty(0), "complex": torch.zeros(N, V).cfloat(),
        "sparse": torch.zeros(N, V).to_sparse(), "meta": torch.zeros(N, V, device="meta"),
        "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    }  # fmt: skip


def statistics() -> deft_kernels.RowStatistics:
    return deft_kernels.deft_loss(torch.zeros(N, V), LABELS, return_stats=True)[1]


def recording() -> Recording:
    recorder = Recorder(tokens=8, slots=2)
    recorder.add(statistics(), LABELS)
    return recorder.recording()


def calls() -> Iterator[tuple[str, Callable[..., Any], dict[str, Any]]]:
    """(name, call, arguments with which it works); a method is bound anew for each value."""
    logits = {"logits": torch.zeros(N, V), "labels": LABELS}
    hidden = {"hidden": torch.zeros(N, D), "weight": torch.zeros(V, D), "labels": LABELS}
    rows = {"stats": statistics(), "labels": LABELS}
    own = {
        "deft_loss": logits, "row_statistics": logits, "fused_linear_deft_loss": hidden,
        "fused_linear_row_statistics": hidden, "gradient_norm": {"stats": statistics()},
        "gated_loss": {"logp": torch.full((N,), -1.0), "log_collision": torch.full((N,), -1.0)},
        "shifted_labels": {"labels": LABELS, "group": None}, "weighted": {"function": len},
    }  # fmt: skip
    # Records that a user does not make are not asked.
    records = ("RowStatistics", "VocabShard", "Recording", "RowObjective", "Weighted")
    of_objectives = ("deft_kernels.objectives", "deft_kernels.row_objectives", "deft_kernels.weighted")
    of_modules = {name: getattr(deft_kernels, name) for name in deft_kernels.__all__}
    of_modules |= {name: getattr(diagnostics, name) for name in diagnostics.__all__}
    of_modules |= {n: v for n, v in vars(objectives).items() if getattr(v, "__module__", "") in of_objectives}
    for name, call in (of_modules | {"shifted_labels": parallel.shifted_labels}).items():
        if name[0] != "_" and name not in records and (inspect.isfunction(call) or inspect.isclass(call)):
            made = {"name": "x", "family": "deformed", "focus": "collision"}
            yield name, call, made if name == "Objective" else own.get(name, {})
    yield "Objective.within", objectives.deft().within, {}
    yield "Recorder.add", lambda **k: Recorder(channels=("a", "b")).add(**k), {**rows, **of(Recorder.add)}
    yield "Recorder.recording", Recorder().recording, {}
    yield "Recorder.save", Recorder().save, {"path": "a.npz"}
    for method in ("histogram", "over_time", "mean", "number", "of", "token", "save"):
        usual = {"of": "p"} if method in ("histogram", "over_time", "mean") else {}
        yield f"Recording.{method}", getattr(recording(), method), usual
    yield "Recording.load", Recording.load, {}
    yield "RunningStatistics", RunningStatistics, {}
    update = {"stats": statistics(), "valid": LABELS != -100}
    yield "RunningStatistics.update", lambda **k: RunningStatistics().update(**k), {**update, "channel": None}
    for method in ("update", "add"):
        usual = {**update, "channel": torch.zeros(N, dtype=torch.int64)}
        yield f"RunningStatistics.{method}", getattr(RunningStatistics(("a", "b")), method), usual
    yield "RunningStatistics.forget", RunningStatistics().forget, {}
    yield "RunningStatistics.means", RunningStatistics().means, {}
    yield "Columns", Columns, {"channel": "kind", "channels": ("a", "b")}
    yield "Columns.attach", Columns(token_weight="weight").attach, {}


def of(method: Callable[..., Any]) -> dict[str, Any]:
    """The keywords of a method, with their defaults."""
    parameters = inspect.signature(method).parameters.values()
    return {p.name: p.default for p in parameters if p.default is not p.empty}


CALLS = list(calls())


def taken_or_refused(call: Callable[..., Any], usual: dict[str, Any], name: str, known: set[str]) -> None:
    for kind, value in values().items():
        try:
            call(**{**usual, name: value})
        except OSError:  # of a path that there is not, or is a folder's
            assert name == "path", (name, kind)
        except RuntimeError as error:  # of a device that there is not: a whole number is that of a GPU
            assert name == "device", (name, kind, error)
        except (TypeError, ValueError, IndexError) as error:
            # The argument, or another that fits it no longer: its labels, a shape.
            begin = str(error).partition(":")[0]
            assert begin and set(begin.replace(",", " ").split()) <= known, (name, kind, error)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of nested tensors, and of numbers that are a leaf
@pytest.mark.parametrize("number", range(len(CALLS)), ids=[name for name, _, _ in CALLS])
def test_an_argument_is_taken_or_refused_by_its_name(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # for what is saved under a name that is none
    _, call, usual = CALLS[number]
    names = [
        p.name
        for p in inspect.signature(call).parameters.values()
        if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
    ]
    names = names or list(usual)
    for name in names:
        taken_or_refused(call, usual, name, {*names, *usual})


@pytest.mark.parametrize("wrong", [
    {"labels": [1, 2]}, {"labels": LABELS * 1.0}, {"labels": LABELS[:3]}, {"channel": 2},
    {"channel": LABELS != 0}, {"ids": [1]}, {"ids": LABELS[:2]}, {"shift": -1}, {"step": -1},
    {"step": 10**30},
])  # fmt: skip
def test_a_recorder_is_as_it_was_after_a_call_that_raises(wrong: dict[str, Any]) -> None:
    """`step=10**30` once left intervals of 2^100 steps behind, which no file can hold."""
    recorders = [Recorder(channels=("a", "b"), tokens=8, slots=2) for _ in range(2)]
    for recorder in recorders:
        if recorder is recorders[0]:
            with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))}: "):
                recorder.add(**{"stats": statistics(), "labels": LABELS, **wrong})
        recorder.add(statistics(), LABELS)
    one, other = (recorder.recording() for recorder in recorders)
    for name, value in vars(other).items():
        np.testing.assert_array_equal(getattr(one, name), value)


@pytest.mark.parametrize("wrong", [
    {"stats": LABELS}, {"valid": LABELS}, {"valid": [True] * N}, {"valid": LABELS[:1] != 0}, {"channel": 2},
])  # fmt: skip
def test_running_statistics_take_rows_only(wrong: dict[str, Any]) -> None:
    """A mask of integers, or of one row, was once summed as it stood."""
    running = RunningStatistics(("a", "b"))
    with pytest.raises((TypeError, ValueError), match=f"^{next(iter(wrong))}: "):
        running.update(**{"stats": statistics(), "valid": LABELS != -100, "channel": 0, **wrong})
    assert running.means() == {}


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", "1"), ("temperature", 0.0), ("z_loss", -1.0), ("label_smoothing", 2.0), ("shift", -1),
    ("softcap", 0), ("ignore_index", 1.5), ("reduction", "average"), ("backend", "cuda"), ("anchor", -1.0),
    ("return_stats", 1), ("logit_scale", None), ("chunk_bytes", 0), ("inplace", 1), ("grad_in_forward", 1),
])  # fmt: skip
def test_a_module_refuses_a_value_when_it_is_made(name: str, value: Any) -> None:
    for module in (deft_kernels.DEFTLoss, deft_kernels.FusedLinearDEFTLoss):
        if name in inspect.signature(module).parameters:
            with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
                module(**{name: value})


def test_a_module_is_made_without_what_comes_with_the_call() -> None:
    loss, logits = deft_kernels.DEFTLoss(anchor=0.5), torch.randn(N, V)
    given = torch.full((N,), -1.0)
    assert loss(logits, LABELS, reference_logp=given) > deft_kernels.deft_loss(logits, LABELS)
    with pytest.raises(ValueError, match="^anchor: needs reference_logp"):
        loss(logits, LABELS)
