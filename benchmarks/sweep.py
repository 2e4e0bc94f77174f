"""Measure the candidates for the launch table, each in turns with the others and a copy of the logits.

    python benchmarks/sweep.py --out sweep.json
    python benchmarks/sweep.py --kernel fused --shapes 4096x128256

Prints, for every kernel and shape, the candidates in order and an entry for `backends/triton/tuning.py`
that names its measurement. Candidates are compiled first, by as many processes as there are cores. With
TRITON_INTERPRET=1 the kernels run in the interpreter on a few numbers, which tests this script and measures
nothing: no entry is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import machine
import torch
from measure import Case, Inputs, Loss, compare

from deft_kernels import objectives
from deft_kernels.backends import choice
from deft_kernels.backends.triton import backend as triton_backend
from deft_kernels.backends.triton import tuning
from deft_kernels.backends.triton.launch import lean
from deft_kernels.core.spec import Spec

DRY = choice.interpreted()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
OBJECTIVES = {"deft": objectives.deft(), "eaft": objectives.eaft()}
SHAPES = ("4096x32000", "8192x128256", "4096x262144", "4096x50257", "8x128256", "512x128256")
KERNELS = ("statistics", "gradient", "fused", "fused out of place", "statistics, gradient")
# Rows of a launch that only compiles: a multiple of 16, as the measured ones, so that it is the same kernel.
FEW = 16


@dataclass(frozen=True)
class Candidate:
    """plan: of the kernel's table; slices: turns of a gradient program; splits: programs a row."""

    plan: tuning.Launch
    slices: int | None = None
    splits: int | None = None

    def __str__(self) -> str:
        text = f"num_warps={self.plan.num_warps}, width={self.plan.width}"
        text += "".join(f", {name}" for name in ("tail", "near", "deep") if getattr(self.plan, name))
        text += f", registers={self.plan.registers}" if self.plan.registers else ""
        text += "" if self.slices is None else f", SLICE_TURNS={self.slices}"
        return text + ("" if self.splits is None else f", splits={self.splits}")


def candidates(kernel: str, rows: int, itemsize: int, processors: int) -> list[Candidate]:
    """Loads of 16 bytes, the widest there are, warps by powers of two, and the hints where they could pay."""
    width = 16 // itemsize
    warps = (1, 2) if DRY else (1, 2, 4, 8, 16, 32)
    off_on = (False, True)
    if kernel == "gradient":
        return [
            Candidate(tuning.Launch(w, width), slices=s) for w in warps[:4] for s in (4, 8, 16)[-len(warps) :]
        ]
    if kernel == "statistics, gradient":
        return [Candidate(tuning.Launch(w, width), slices=8, splits=1) for w in warps[2:4] or warps]
    if kernel.startswith("fused"):
        # Registers of a thread with which two, three or four programs of 8 warps share a multiprocessor.
        return [
            Candidate(tuning.Launch(w, width, tail=True, near=near, deep=deep, registers=registers))
            for w in warps[2:] or warps
            for near, deep, counts in (
                (False, False, (0,)),
                (True, False, (0, 64)),
                (True, True, (0, 64, 72, 128)),
            )
            for registers in (counts[:1] if DRY else counts)
            if w * registers <= 2048 and (registers != 72 or w == 8)
        ]
    splits = (1,) if rows >= 2 * processors else (1, 2) if DRY else (1, 2, 4, 8, 16, 32, 64)
    return [
        Candidate(tuning.Launch(w, width, tail=tail), splits=s)
        for w in warps[1:4]
        for s in splits
        for tail in off_on
    ]


def table_of(kernel: str) -> str:
    return {"fused out of place": "fused", "statistics, gradient": "gradient"}.get(kernel, kernel)


@contextmanager
def launched(kernel: str, candidate: Candidate) -> Iterator[None]:
    """The launchers as if the table held the candidate for this kernel."""
    name = table_of(kernel)
    kept = (getattr(tuning, name), tuning.splits, triton_backend.SLICE_TURNS)
    setattr(tuning, name, lambda vocabulary, itemsize, *rest: replace(candidate.plan, warp=rest[-1]))
    if candidate.splits is not None:
        tuning.splits = lambda *_: candidate.splits
    if candidate.slices is not None:
        triton_backend.SLICE_TURNS = candidate.slices
    try:
        yield
    finally:
        setattr(tuning, name, kept[0])
        tuning.splits, triton_backend.SLICE_TURNS = kept[1:]


def run_of(kernel: str, candidate: Candidate, case: Case, objective: str, device: torch.device) -> Loss:
    """One launch of the kernel as the candidate has it (two for both); fused, the gradient overwrites the
    logits unless it is told to go elsewhere."""
    spec = Spec(OBJECTIVES[objective], backend="triton")
    dloss = torch.full((case.n,), 1 / case.n, device=device)
    known: dict[str, torch.Tensor] = {}

    def out_for(logits: torch.Tensor) -> torch.Tensor:
        if "out" not in known:
            known["out"] = torch.empty_like(logits)
        return known["out"]

    def run(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.detach()
        with launched(kernel, candidate):
            if kernel == "statistics":
                return triton_backend.row_loss(logits, labels, None, -100, spec)[0]
            if kernel.startswith("fused"):
                out = logits if kernel == "fused" else out_for(logits)
                return triton_backend.row_loss_with_gradient(logits, labels, dloss, None, -100, spec, out)[0]
            if "rows" not in known or kernel == "statistics, gradient":
                known["rows"] = triton_backend.row_loss(logits, labels, None, -100, spec)[1]
            triton_backend.gradient(logits, labels, None, known["rows"], dloss, spec, out_for(logits))
            return known["out"]

    return run


def compile_one(job: tuple[str, Candidate, Case, str]) -> None:
    """In a process of its own: Triton's cache on disk then holds the kernel."""
    kernel, candidate, case, objective = job
    device = torch.device("cpu") if DRY else machine.device()
    inputs = Inputs(replace(case, n=min(case.n, FEW)), device, sets=1)
    run_of(kernel, candidate, inputs.case, objective, device)(inputs.next(), inputs.labels)


STREAMS = {
    "statistics": 1, "gradient": 2, "fused": 2, "fused out of place": 2, "statistics, gradient": 3,
}  # fmt: skip


def entrants(kernel: str, case: Case, objective: str, device: torch.device) -> dict[str, Candidate]:
    """By name; the table's own choice is among them as "table"."""
    row = (case.vocabulary, case.dtype.itemsize)
    spec = Spec(OBJECTIVES[objective], backend="triton")
    further = {"statistics": (spec.needs_entropy,), "gradient": (), "fused": (lean(spec),)}[table_of(kernel)]
    own = Candidate(getattr(tuning, table_of(kernel))(*row, *further))
    processors = 1 if DRY else torch.cuda.get_device_properties(device).multi_processor_count
    found = {str(c): c for c in candidates(kernel, case.n, case.dtype.itemsize, processors)}
    return {f"table: {own}": own} | found


def sweep(kernel: str, case: Case, objective: str, device: torch.device) -> list[dict[str, Any]]:
    """Records of the candidates, the fastest first."""
    found = entrants(kernel, case, objective, device)
    runs = {name: run_of(kernel, candidate, case, objective, device) for name, candidate in found.items()}
    small = replace(case, n=min(case.n, FEW))
    expected, inputs = None, Inputs(small, device, sets=1)
    for name, candidate in found.items():
        got = run_of(kernel, candidate, small, objective, device)(inputs.sets[0], inputs.labels).double()
        inputs.restored(inputs.sets[0])
        expected = got if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-6, msg=f"{kernel}, {name}: wrong result")
    measured = compare(runs, case, device, (1, 1) if DRY else (8, 20), 0.5, memory=False)
    records = [
        {"kernel": kernel, "objective": objective, "candidate": name}
        | measured[name].record(case, STREAMS[kernel])
        for name in found
    ]
    return sorted(records, key=lambda record: record["ms"])


def fraction(record: dict[str, Any]) -> float:
    """Of the copy's bandwidth in the same rounds."""
    return record["gb_per_s"] / record["copy_gb_per_s"]


def entry(record: dict[str, Any], command: str) -> str:
    return (
        f"{record['kernel']}: {record['candidate']}  # {machine.device_name()}, {record['dtype']}, "
        f"{record['n']} x {record['v']}: {record['ms']:.3f} ms, {fraction(record):.2f} of a copy's "
        f"bandwidth; {command}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(DTYPES))
    parser.add_argument("--objective", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument("--shapes", nargs="+", default=list(SHAPES), metavar="ROWSxVOCABULARY")
    parser.add_argument("--out", type=Path, help="write every record, as JSON")
    args = parser.parse_args()
    device = torch.device("cpu") if DRY else machine.device()
    if not DRY and device.type != "cuda":
        parser.error("needs a GPU; TRITON_INTERPRET=1 tries the script without one")
    if DRY:
        print("dry run: Triton's interpreter, nothing is measured")
        args.shapes, args.dtype, args.objective = ["2x300"], args.dtype[:1], args.objective[:1]
    whole = machine.described() | {"records": []}
    jobs = [
        (kernel, Case("forward", *map(int, shape.split("x")), DTYPES[dtype]), objective)
        for shape, dtype, kernel, objective in itertools.product(
            args.shapes, args.dtype, args.kernel, args.objective
        )
        # The entropy changes what the statistics' loop holds, and nothing of the gradient's. Few rows are
        # split, which is of the statistics alone.
        if (objective == "deft" or kernel in ("statistics", "fused"))
        and (DRY or kernel == "statistics" or int(shape.split("x")[0]) > 512)
    ]
    if not DRY:
        begun = time.perf_counter()
        # One of each program: Triton tells vocabularies apart by whether they are multiples of 16.
        programs = list({
            (kernel, candidate, case.vocabulary % 16, case.dtype, objective): (
                kernel, candidate, case, objective
            )
            for kernel, case, objective in jobs
            for candidate in entrants(kernel, case, objective, device).values()
        }.values())  # fmt: skip
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(len(programs), os.cpu_count() or 1)) as pool:
            for _ in pool.imap_unordered(compile_one, programs, chunksize=4):
                pass
        print(f"{len(programs)} programs compiled in {time.perf_counter() - begun:.0f} s", flush=True)
    for kernel, case, objective in jobs:
        records = sweep(kernel, case, objective, device)
        whole["records"] += records
        if args.out:  # after each shape: a run that is cut short keeps what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(whole, indent=1) + "\n")
        if DRY:
            print(f"{kernel} {case}: {len(records)} candidates ran and agree")
            continue
        for record in records[:5] + [r for r in records[5:] if r["candidate"].startswith("table")]:
            print(
                f"  {record['ms']:8.3f} ms  {record['ratio_to_copy']:.3f} copies  "
                f"{fraction(record):.2f} of its bandwidth  {record['candidate']}"
            )
        print(entry(records[0], whole["command"]), flush=True)


if __name__ == "__main__":
    main()
