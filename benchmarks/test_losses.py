"""Losses over logits: time, bandwidth, ratio to a copy and peak memory, ours beside what people run today.

    pytest benchmarks/test_losses.py --records benchmarks/results/MACHINE/losses.json
    pytest benchmarks/test_losses.py -k "both and bfloat16 and Liger"

All contestants of a case are measured in turns by its first test; the others report from it. So compare
within a case, and read the ratios to the copy that took part, not milliseconds across runs. With
DEFT_KERNELS_BENCH_TINY=1 the shapes are small and only the running of it is tested.
"""

from __future__ import annotations

import os
from typing import Any

import machine
import pytest
import torch
from measure import PHASES, Case, Inputs, Loss, Measured, compare
from peers import CONTESTANTS, Contestant, Missing

# Benchmarks do not judge other packages' warnings.
pytestmark = pytest.mark.filterwarnings("ignore")

TINY = os.environ.get("DEFT_KERNELS_BENCH_TINY", "0") == "1"
DEVICE = machine.device()
# Llama 2, GPT-2, Llama 3, Qwen 2.5 and Gemma 3; GPT-2's rows begin off a 16-byte boundary.
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)
FP32, BF16 = torch.float32, torch.bfloat16


def tiny_cases() -> list[Case]:
    found = [Case(phase, 4, 1000, FP32) for phase in PHASES]
    return found + [Case("both", n, v, BF16) for n, v in ((4, 1000), (8, 1000), (4, 300))]


def gpu_cases() -> list[Case]:
    """Every size in bf16 for a training step; its halves and fp32 at 4,096 rows; small batches."""
    found = [Case("both", n, v, BF16) for v in VOCABULARIES for n in (4096, 512, 2048, 8192, 16384)]
    found += [Case("both", 4096, v, FP32) for v in VOCABULARIES]
    found += [Case(phase, 4096, v, BF16) for v in VOCABULARIES for phase in ("forward", "backward")]
    return found + [Case("forward", n, 262144, BF16) for n in (1, 8, 64)]


def cpu_cases() -> list[Case]:
    """2^24 logits, 67 MB of fp32, for every vocabulary; the halves and other numbers of rows for two."""
    rows = {v: 2**24 // v for v in VOCABULARIES}
    found = [Case("both", n, v, dtype) for dtype in (FP32, BF16) for v, n in rows.items()]
    for v in (32000, 128256):
        found += [Case(phase, rows[v], v, BF16) for phase in ("forward", "backward")]
    return found + [Case("both", n, 32000, FP32) for n in (128, 256, 1024)]


if TINY:
    CASES, ROUNDS, SECONDS = tiny_cases(), (1, 1), 0.0
elif DEVICE.type == "cuda":
    CASES, ROUNDS, SECONDS = gpu_cases(), (8, 40), 1.5
else:
    CASES, ROUNDS, SECONDS = cpu_cases(), (5, 9), 6.0
PARTICIPANTS = [contestant for contestant in CONTESTANTS if not contestant.repeats(DEVICE)]
# Compiling takes seconds a case, so only the first training step of a vocabulary and dtype is compiled for.
STEPS = [case for case in reversed(CASES) if case.phase == "both" and not (TINY and case.dtype == BF16)]
FIRST = {(case.vocabulary, case.dtype): case for case in STEPS}
PAIRS = [
    (case, contestant)
    for case in CASES
    for contestant in PARTICIPANTS
    if "compiled" not in contestant.name or case in FIRST.values()
]

_replayed: list[float] = []
_now = 0.0


def replay() -> float:
    """A clock that passes the measured rounds, for pytest-benchmark to report what was taken in turns."""
    global _now
    if _replayed:
        _now += _replayed.pop(0)
    return _now


def check_agreement(losses: dict[str, Loss], chosen: dict[str, Contestant], case: Case) -> None:
    """Contestants of one objective compute the same number, or there is nothing to compare."""
    inputs = Inputs(Case("both", 64, case.vocabulary, case.dtype), DEVICE)
    values: dict[str, dict[str, float]] = {}
    for name, loss in losses.items():
        if "compiled" in name:
            continue  # would be compiled anew for these rows
        logits = inputs.next()
        try:
            value = float(loss(logits, inputs.labels))
        except Exception:
            if chosen[name].ours:
                raise
            continue  # another package's failure is reported where it is measured
        values.setdefault(chosen[name].objective, {})[name] = value
        inputs.restored(logits)
    for found in values.values():
        low, high = min(found.values()), max(found.values())
        assert high - low <= 0.02 * abs(high), found


@pytest.fixture(scope="session")
def measured(request: pytest.FixtureRequest, records: Any) -> Any:
    """Results of a case by contestant, measured when first asked for, of the tests that were selected."""
    known: dict[Case, dict[str, Measured]] = {}
    selected: dict[Case, list[Contestant]] = {}
    for item in request.session.items:
        params = getattr(getattr(item, "callspec", None), "params", {})
        if "case" in params:
            selected.setdefault(params["case"], []).append(params["contestant"])

    def of(case: Case) -> dict[str, Measured]:
        if case not in known:
            known.clear()
            chosen = {c.name: c for c in selected[case] if c.name not in records.skipped}
            losses: dict[str, Loss] = {}
            for name, contestant in chosen.items():
                try:
                    losses[name] = contestant.make(DEVICE)
                except Missing as reason:
                    records.skipped[name] = str(reason)
            check_agreement(losses, chosen, case)
            others = [name for name in losses if not chosen[name].ours]
            known[case] = compare(losses, case, DEVICE, ROUNDS, SECONDS, tolerated=others)
        return known[case]

    return of


@pytest.mark.benchmark(timer=replay)
@pytest.mark.parametrize(("case", "contestant"), PAIRS, ids=[f"{case}-{c.name}" for case, c in PAIRS])
def test_loss(benchmark: Any, case: Case, contestant: Contestant, measured: Any, records: Any) -> None:
    results = measured(case)
    if contestant.name in records.skipped:
        pytest.skip(f"{contestant.name}: {records.skipped[contestant.name]}")
    found = results[contestant.name]
    description = {
        "name": contestant.name, "objective": contestant.objective, "mode": contestant.mode,
        "ours": contestant.ours,
    }  # fmt: skip
    record = description | found.record(case, contestant.streams(case.phase, DEVICE))
    records.keep(record)
    if found.failure is not None:
        pytest.skip(f"{contestant.name}: {found.failure}")
    benchmark.extra_info |= record
    benchmark.group = str(case)
    _replayed[:] = [part for seconds in found.seconds for part in (0.0, seconds)]
    benchmark.pedantic(lambda: None, rounds=len(found.seconds))
