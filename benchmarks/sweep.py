"""Measure the candidates for the launch table, each in turns with the others and a copy of the logits.

    python benchmarks/sweep.py --out sweep.json
    python benchmarks/sweep.py --kernel fused --vocabulary 128256 --rows 4096

Prints, for every kernel and shape, the candidates in order and an entry for `deft_kernels/kernels/table.py`
that names its measurement. With TRITON_INTERPRET=1 the kernels run in the interpreter on a few numbers, which
tests this script and measures nothing: no entry is printed.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import machine
import torch
from measure import Case, Inputs, Loss, compare

from deft_kernels import backends, objectives
from deft_kernels.kernels import launch, table
from deft_kernels.spec import Spec

DRY = backends.interpreted()
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = (32000, 50257, 128256, 151936, 262144)


@dataclass(frozen=True)
class Candidate:
    """num_warps and width: of `table.Launch`; slices: turns of a gradient program; splits: programs a row."""

    num_warps: int
    width: int
    slices: int | None = None
    splits: int | None = None

    def __str__(self) -> str:
        text = f"num_warps={self.num_warps}, width={self.width}"
        text += "" if self.slices is None else f", SLICE_TURNS={self.slices}"
        return text + ("" if self.splits is None else f", splits={self.splits}")


def candidates(kernel: str, rows: int, itemsize: int, processors: int) -> list[Candidate]:
    """Loads of 16 bytes, the widest there are, and warps by powers of two; the rest as the kernel has it."""
    width = 16 // itemsize
    warps = (1, 2) if DRY else (1, 2, 4, 8, 16, 32)
    if kernel == "gradient":
        return [
            Candidate(w, width, slices=s) for w in warps[:4] for s in ((2, 8) if DRY else (2, 4, 8, 16, 32))
        ]
    if kernel == "fused":
        return [Candidate(w, width) for w in warps]
    if rows >= 2 * processors:
        return [Candidate(w, width, splits=1) for w in warps[:5]]
    splits = (1, 2) if DRY else (1, 2, 4, 8, 16, 32, 64)
    return [Candidate(w, width, splits=s) for w in warps[1:4] for s in splits]


@contextmanager
def launched(kernel: str, candidate: Candidate) -> Iterator[None]:
    """The launchers as if the table held the candidate for this kernel."""
    kept = (getattr(table, kernel), table.splits, launch.SLICE_TURNS)

    def plan(vocabulary: int, itemsize: int, warp: int = 32) -> table.Launch:
        return table.Launch(candidate.num_warps, candidate.width, warp)

    setattr(table, kernel, plan)
    if candidate.splits is not None:
        table.splits = lambda *_: candidate.splits
    if candidate.slices is not None:
        launch.SLICE_TURNS = candidate.slices
    try:
        yield
    finally:
        setattr(table, kernel, kept[0])
        table.splits, launch.SLICE_TURNS = kept[1:]


def run_of(kernel: str, candidate: Candidate, case: Case, device: torch.device) -> Loss:
    """One launch of the kernel as the candidate has it; fused, the gradient overwrites the logits."""
    spec = Spec(objectives.deft(), backend="triton")
    dloss = torch.full((case.n,), 1 / case.n, device=device)
    known: dict[str, torch.Tensor] = {}

    def run(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = logits.detach()
        with launched(kernel, candidate):
            if kernel == "statistics":
                return launch.row_loss(logits, labels, None, -100, spec)[0]
            if kernel == "fused":
                return launch.row_loss_with_gradient(logits, labels, dloss, None, -100, spec, logits)[0]
            if not known:
                known["rows"] = launch.row_loss(logits, labels, None, -100, spec)[1]
                known["out"] = torch.empty_like(logits)
            launch.gradient(logits, labels, None, known["rows"], dloss, spec, known["out"])
            return known["out"]

    return run


STREAMS = {"statistics": 1, "gradient": 2, "fused": 2}


def sweep(kernel: str, case: Case, device: torch.device) -> list[dict[str, Any]]:
    """Records of the candidates, the fastest first; the table's own choice is among them as "table"."""
    plan = getattr(table, kernel)(case.vocabulary, case.dtype.itemsize)
    own = Candidate(plan.num_warps, plan.width)
    processors = 1 if DRY else torch.cuda.get_device_properties(device).multi_processor_count
    found = {str(c): c for c in candidates(kernel, case.n, case.dtype.itemsize, processors)}
    found = {f"table: {own}": own} | found
    runs = {name: run_of(kernel, candidate, case, device) for name, candidate in found.items()}
    expected, inputs = None, Inputs(Case("forward", min(case.n, 64), case.vocabulary, case.dtype), device)
    for name, candidate in found.items():
        small = Case("forward", len(inputs.labels), case.vocabulary, case.dtype)
        got = run_of(kernel, candidate, small, device)(inputs.sets[0], inputs.labels).double()
        inputs.restored(inputs.sets[0])
        expected = got if expected is None else expected
        torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-6, msg=f"{kernel}, {name}: wrong result")
    measured = compare(runs, case, device, (1, 1) if DRY else (8, 30), 0.5, memory=False)
    records = [
        {"kernel": kernel, "candidate": name} | measured[name].record(case, STREAMS[kernel]) for name in found
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
    parser.add_argument("--kernel", nargs="+", default=list(STREAMS), choices=list(STREAMS))
    parser.add_argument("--dtype", nargs="+", default=["bf16", "fp32"], choices=list(DTYPES))
    parser.add_argument("--vocabulary", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--rows", nargs="+", type=int, default=[8, 512, 4096])
    parser.add_argument("--out", type=Path, help="write every record, as JSON")
    args = parser.parse_args()
    device = torch.device("cpu") if DRY else machine.device()
    if not DRY and device.type != "cuda":
        parser.error("needs a GPU; TRITON_INTERPRET=1 tries the script without one")
    if DRY:
        print("dry run: Triton's interpreter, nothing is measured")
        args.vocabulary, args.rows, args.dtype = [300], [2], args.dtype[:1]
    whole = machine.described() | {"records": []}
    shapes = itertools.product(args.kernel, args.dtype, args.vocabulary, args.rows)
    for kernel, dtype, vocabulary, rows in shapes:
        case = Case("forward", rows, vocabulary, DTYPES[dtype])
        records = sweep(kernel, case, device)
        whole["records"] += records
        if args.out:  # after each shape: a run that is cut short keeps what it has
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(whole, indent=1) + "\n")
        if DRY:
            print(f"{kernel} {case}: {len(records)} candidates ran and agree")
            continue
        for record in records[:4] + [r for r in records[4:] if r["candidate"].startswith("table")]:
            print(f"  {record['ms']:8.3f} ms  {fraction(record):.2f} of a copy  {record['candidate']}")
        print(entry(records[0], whole["command"]), flush=True)


if __name__ == "__main__":
    main()
