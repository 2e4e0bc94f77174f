"""The kernels compiled ahead of time for GPUs that are not here: no spill, no stack, lean loops.

Compilation happens in subprocesses, because this one may have chosen Triton's interpreter.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "sass_report.py"
ARCHITECTURES = ("80", "90", "100", "gfx942")
# One of everything that changes the code. The objective reaches the row's end (each is in `statistics`), and
# the gradient's loop by one of four forms.
OBJECTIVES = (
    "nll", "deft", "deft-shannon-exact", "deft-max-exact", "cayley", "rational", "dft",
    "eaft", "band", "statistics",
)  # fmt: skip
FORMS = ("deft", "deft-exact", "deft-shannon-exact", "statistics")
OPTIONS = "softcap,smoothing,weights,zloss,peel,stats"

# Instructions a bf16 logit on sm_90, in the kernels' main loops.
STATISTICS, STATISTICS_ENTROPY, GRADIENT, GRADIENT_GENERAL = 7.5, 8.8, 6.0, 8.0


def compile_ahead(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = str(SCRIPT.parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join([root, environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--json", "--no-peers", *arguments],
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout)


def assert_lean(records: list[dict]) -> None:
    assert records
    for record in records:
        assert record["registers"] > 0, record
        assert record["spill_bytes"] == 0, record
        assert record["stack_bytes"] == 0, record


def jobs() -> dict[str, list[tuple[str, ...]]]:
    """The command lines behind each test."""
    stored, ones = ("statistics-stored", "combine", "finish"), ("deft", "deft-max-exact")
    found: dict[str, list[tuple[str, ...]]] = {}
    for arch in ARCHITECTURES:
        on = ("--arch", arch, "--dtype")
        found[arch] = [
            (*on, "bf16", "--kernel", "statistics", "--objective", *OBJECTIVES),
            (*on, "bf16", "--kernel", "gradient", "fused", "--objective", *FORMS),
            (*on, "fp16", "--kernel", *stored, "--objective", "deft", "eaft"),
            (*on, "bf16", "fp32", "--objective", "statistics", "--options", OPTIONS),
        ]
    on = ("--arch", "90", "--dtype", "bf16", "--objective")
    found["ones"] = [(*on, *ones, "--options", option) for option in ("ones", f"ones,{OPTIONS}")]
    # What the budgets ask for and the jobs of sm_90 leave out.
    found["budgets"] = [
        (*on, "eaft", "--kernel", "fused"),
        (*on, "statistics-without-max", "--kernel", "gradient"),
    ]
    return found


@pytest.fixture(scope="module")
def compiled() -> Iterator[Callable[[str], list[dict]]]:
    """Reports of a test's jobs; all jobs start at once, as many at a time as there are cores."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        running = {
            name: [pool.submit(compile_ahead, *line) for line in lines] for name, lines in jobs().items()
        }
        yield lambda name: [record for future in running[name] for record in future.result()]


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_spills_and_no_stack(arch: str, compiled: Callable[[str], list[dict]]) -> None:
    """Every objective, every form of the gradient, and every option at once, in 2 and 4 bytes."""
    assert_lean(compiled(arch))


def test_integers_that_are_one(compiled: Callable[[str], list[dict]]) -> None:
    """N = V = 1: Triton makes constants of integers that are 1, another program than the one for V > 1."""
    assert_lean(compiled("ones"))


# (kernel, objective, loop): one of every form that a loop takes. "statistics-without-max" has a gradient with
# all of a, b and c, which a user's own objective reaches.
BUDGETS = {
    ("statistics", "deft", "statistics"): STATISTICS,
    ("statistics", "deft-shannon-exact", "statistics"): STATISTICS_ENTROPY,
    ("statistics", "eaft", "statistics"): STATISTICS_ENTROPY,
    ("gradient", "deft", "gradient"): GRADIENT,
    ("gradient", "deft-exact", "gradient"): GRADIENT_GENERAL,
    ("gradient", "deft-shannon-exact", "gradient"): GRADIENT_GENERAL,
    ("gradient", "statistics-without-max", "gradient"): GRADIENT_GENERAL,
    ("fused", "deft", "statistics"): STATISTICS,
    ("fused", "deft", "gradient"): GRADIENT,
    ("fused", "eaft", "statistics"): STATISTICS_ENTROPY,
    ("fused", "eaft", "gradient"): GRADIENT,
    ("fused", "deft-exact", "gradient"): GRADIENT_GENERAL,
    ("fused", "deft-shannon-exact", "gradient"): GRADIENT_GENERAL,
}


@pytest.mark.parametrize("form", BUDGETS, ids="-".join)
def test_instruction_budgets_on_sm_90(
    form: tuple[str, str, str], compiled: Callable[[str], list[dict]]
) -> None:
    """The loops are bound by instruction issue: reading bf16 at full rate leaves about 15 a logit."""
    reports = compiled("90") + compiled("budgets")
    (found,) = [
        r
        for r in reports
        if (r["kernel"], r["objective"], r["loop"]) == form and r["dtype"] == "bf16" and not r["options"]
    ]
    assert found["barriers_in_loop"] == 0 and found["shuffles_in_loop"] == 0
    assert found["load_bits"] == 128
    assert found["instructions_per_logit"] <= BUDGETS[form]
    # The report's own budgets are these.
    assert found["budget"] == BUDGETS[form] and found["within_budget"]
