"""Times on paper: what each kernel should take on a GPU, from its compiled code, beside what was measured.

    python benchmarks/model.py             writes docs/predictions.md
    python benchmarks/model.py --compile   counts the kernels again first

Everything that goes in is counted, except a few constants, which say where they come from. Times
are in copies: of one read and one write of the logits.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gpus

ROOT = Path(__file__).parent.parent
COUNTS = ROOT / "benchmarks" / "results" / "compiled" / "model.json"
ITEM = 2  # bytes of a bf16 logit
# A load that misses L2 while memory is busy, seconds: a guess.
LATENCY = 0.8e-6
# Bytes of rows that L2 still holds for their second read: counted by Nsight Compute on an H200, see
# docs/kernels.md.
KEPT = 34e6
# Dependent waits of a fused program besides its streams: the label, the sums over warps, the row's numbers.
WAITS = 3

MACHINES = {
    # Bandwidth of a copy in PyTorch, as its records have it, instead of the datasheet's.
    "NVIDIA H100 80GB HBM3": gpus.GPU("H100", "90", 132, 1.98, 3.0, "a copy in PyTorch"),
    "NVIDIA H200": gpus.GPUS["H200"],
}
FOLDERS = {"NVIDIA H100 80GB HBM3": "nvidia-h100", "NVIDIA H200": "nvidia-h200"}
SHAPES = ((4096, 32000), (4096, 50257), (8192, 128256), (4096, 262144))


@dataclass(frozen=True)
class Code:
    """A compiled kernel.

    warps: of a program.  programs: resident on a multiprocessor.  statistics, gradient: instructions a logit
    in the loops, 0 where there is none.  fixed: instructions a warp outside of the loops.  in_flight: bytes a
    multiprocessor has asked for at a time.  blocks: columns between two barriers of the statistics' loop, 0
    if it has none.
    """

    warps: int
    programs: int
    statistics: float
    gradient: float
    fixed: int
    in_flight: float
    blocks: int = 0


@dataclass(frozen=True)
class Bound:
    """copies: the predicted time.  why: what it consists of."""

    copies: float
    why: str


def waves(programs: int, gpu: gpus.GPU, resident: int) -> float:
    """Time over that of an endless launch: while the last programs run, on average half the places are
    empty."""
    turns = programs / (gpu.processors * resident)
    return (turns + 0.5) / turns


def one_visit(gpu: gpus.GPU, rows: int, vocabulary: int, code: Code, streams: int) -> Bound:
    """A kernel whose programs only stream: the slowest of memory, loads in flight and issue."""
    share = gpu.bandwidth * 1e12 / gpu.processors
    memory = streams / 2
    waiting = memory * max(1.0, LATENCY * share / code.in_flight)
    logits = code.statistics + code.gradient
    cycles = (vocabulary / 32 * logits + code.warps * code.fixed) / 4
    issue = cycles / (gpu.clock * 1e9) * share / (2 * vocabulary * ITEM)
    # A program of the gradient has a slice of a row, and there are many; one of the statistics has a row.
    tail = waves(rows, gpu, code.programs) if not code.gradient else 1.0
    slowest = max((waiting, "memory"), (issue, "issue"))
    return Bound(slowest[0] * tail, f"{slowest[1]} {slowest[0]:.2f}, waves {tail:.2f}")


def two_visits(gpu: gpus.GPU, rows: int, vocabulary: int, code: Code) -> Bound:
    """Statistics and gradient in one program: the row is read again, from L2 if it is still there.

    With one program on a multiprocessor nothing hides its waits and the row's formulas. Where the loop has
    barriers, its loads wait for the block before, and its instructions do not hide behind loads either.
    """
    share = gpu.bandwidth * 1e12 / gpu.processors
    row = vocabulary * ITEM
    in_flight = gpu.processors * code.programs * row
    missed = max(0.0, 1 - KEPT / in_flight)
    copy = 2 * row / share
    memory = (2 + missed) * row / share
    loops = vocabulary / 32 * (code.statistics + code.gradient) / 4 / (gpu.clock * 1e9)
    fixed = code.warps * code.fixed / 4 / (gpu.clock * 1e9)
    waits = WAITS * LATENCY + fixed
    if code.blocks:
        steps = math.ceil(vocabulary / code.blocks)
        alone = memory + loops + 2 * steps * LATENCY + waits
    else:
        alone = max(memory, loops) + waits
    together = max(memory, loops + fixed, alone / code.programs)
    tail = waves(rows, gpu, code.programs)
    why = f"memory {memory / copy:.2f}, issue {(loops + fixed) / copy:.2f}, alone {alone / copy:.2f}"
    return Bound(together / copy * tail, f"{why} of {code.programs}, waves {tail:.2f}")


def measured(gpu: str, kernel: str, objective: str, rows: int, vocabulary: int) -> float | None:
    """What the launch table's choice took, over a copy in the same rounds."""
    path = ROOT / "benchmarks" / "results" / FOLDERS[gpu] / "sweep.json"
    for record in json.loads(path.read_text())["records"]:
        case = (record["kernel"], record["objective"], record["n"], record["v"], record["dtype"])
        found = case == (kernel, objective, rows, vocabulary, "bfloat16")
        if found and record["candidate"].startswith("table"):
            return record["ratio_to_copy"]
    return None


def loss_record(gpu: str, name: str, rows: int, vocabulary: int) -> dict[str, Any] | None:
    path = ROOT / "benchmarks" / "results" / FOLDERS[gpu] / "losses.json"
    for record in json.loads(path.read_text())["records"]:
        if (record["name"], record["phase"], record["n"], record["v"]) == (name, "both", rows, vocabulary):
            return record
    return None


def linear_record(gpu: str, name: str) -> dict[str, Any] | None:
    path = ROOT / "benchmarks" / "results" / FOLDERS[gpu] / "linear.json"
    found = (r for r in json.loads(path.read_text())["records"] if (r["name"], r["v"]) == (name, 128256))
    return next(found, None)


def counted() -> dict[str, Code]:
    return {name: Code(**fields) for name, fields in json.loads(COUNTS.read_text()).items()}


def count_again() -> None:
    """Compiles the kernels that the launch table names for the shapes, and Liger's."""
    import sass
    from ahead_of_time import Compiled, Variant, compile_variant
    from peer_kernels import PEERS

    def code(compiled: Compiled, blocks: int = 0) -> dict[str, Any]:
        loops = {loop.kind: loop for loop in sass.main_loops(compiled.code, ITEM)}
        inner = sum(len(body) for body in sass.innermost(compiled.code))
        every = sum(bool(text) for _, text in sass.instructions(compiled.code))
        usage = compiled.usage
        resident = gpus.programs("90", usage.registers, usage.shared_bytes, compiled.num_warps)
        turn = max(loop.logits for loop in loops.values())
        each = {kind: loop.instructions / loop.logits for kind, loop in loops.items()}
        return {
            "warps": compiled.num_warps,
            "programs": resident,
            "statistics": each.get("statistics", 0.0),
            "gradient": each.get("gradient", 0.0),
            "fixed": every - inner,
            "in_flight": resident * compiled.num_warps * 32 * turn * ITEM,
            "blocks": blocks,
        }

    found = {}
    for kernel in ("statistics", "gradient", "fused"):
        for objective in ("deft", "eaft") if kernel != "gradient" else ("deft",):
            for size in ("", "narrow"):
                compiled = compile_variant(Variant(kernel, objective, "bf16", "90", size))
                found[" ".join(filter(None, (kernel, objective, size)))] = code(compiled)
    liger = next(peer for peer in PEERS if peer.package == "liger-kernel")
    found["liger"] = code(liger.compile("90", "bf16", 128256), blocks=32768)
    COUNTS.write_text(json.dumps(found, indent=1) + "\n")


@dataclass(frozen=True)
class Line:
    what: str
    shape: str
    predicted: float
    measured: float | None
    why: str

    @property
    def cells(self) -> list[str]:
        known = self.measured
        error = "" if known is None else f"{self.predicted / known - 1:+.0%}"
        value = "" if known is None else f"{known:.2f}"
        return [self.what, self.shape, f"{self.predicted:.2f}", value, error, self.why]


def own(name: str, gpu: gpus.GPU, codes: dict[str, Code]) -> Iterator[Line]:
    for rows, vocabulary in SHAPES:
        size = " narrow" if vocabulary * ITEM < 150_000 else ""
        shape = f"{rows:,} x {vocabulary:,}"
        statistics = one_visit(gpu, rows, vocabulary, codes[f"statistics deft{size}"], 1)
        gradient = one_visit(gpu, rows, vocabulary, codes[f"gradient deft{size}"], 2)
        for kernel, bound in (
            ("statistics", statistics),
            ("gradient", gradient),
            ("statistics, gradient", Bound(statistics.copies + gradient.copies, "the sum of the two")),
        ):
            seen = measured(name, kernel, "deft", rows, vocabulary)
            yield Line(kernel, shape, bound.copies, seen, bound.why)
        for objective in ("deft", "eaft"):
            bound = two_visits(gpu, rows, vocabulary, codes[f"fused {objective}{size}"])
            seen = measured(name, "fused", objective, rows, vocabulary)
            yield Line(f"fused, in place, {objective}", shape, bound.copies, seen, bound.why)


# Streams of [N, V] that PyTorch's eager cross-entropy moves in bf16: log_softmax reads three times (largest,
# sum, result) and writes once; nll_loss's backward writes zeros; log_softmax's backward reads the gradient
# twice and the result once, and writes once.
EAGER_STREAMS = 9


def others(name: str, gpu: gpus.GPU, codes: dict[str, Code]) -> Iterator[Line]:
    for rows, vocabulary in SHAPES:
        shape = f"{rows:,} x {vocabulary:,}"
        eager, liger = (loss_record(name, other, rows, vocabulary) for other in ("F.cross_entropy", "Liger"))
        if eager:
            why = f"{EAGER_STREAMS} streams"
            yield Line("F.cross_entropy", shape, EAGER_STREAMS / 2, eager["ratio_to_copy"], why)
        if liger:
            bound = two_visits(gpu, rows, vocabulary, codes["liger"])
            yield Line("Liger", shape, bound.copies, liger["ratio_to_copy"], bound.why)
    if gpu.name == "H100":
        # Published: 3.01 TB/s on an H100, one read and one write, rows kept on chip between the two passes.
        # https://sysml.cs.princeton.edu/blogs/memory-bound-kernels.html
        yield Line("QuACK's softmax, published", "", 1.0, gpu.bandwidth / 3.01, "2 streams")


def from_hidden_states(name: str, gpu: gpus.GPU, codes: dict[str, Code]) -> Iterator[Line]:
    """Over the three products alone: the fused kernel on the logits of one chunk comes on top of them."""
    products, call = linear_record(name, "products"), linear_record(name, "deft")
    if not products or not call:
        return
    n, v = products["n"], products["v"]
    copy = 2 * n * v * ITEM / (gpu.bandwidth * 1e12)
    rows = two_visits(gpu, n, v, codes["fused deft"])
    predicted = 1 + rows.copies * copy / (products["ms"] / 1e3)
    shape = f"{n:,} x {products['d']:,} x {v:,}"
    yield Line("linear, over its products", shape, predicted, call["over_products"], "products, then fused")


HEAD = """\
# Times on paper

Written by `python benchmarks/model.py`. Each line is what the kernel should take, in copies of the logits
(one read and one write), from its compiled code (sm_90, Triton 3.9; loops, registers and instructions
outside of the loops, in `benchmarks/results/compiled/model.json`), and what the records under
`benchmarks/results` say that it took. The error is predicted over measured.

- A kernel that visits a row once takes as long as the slowest of three: its bytes at a copy's bandwidth;
  its loads in flight, over {latency:.1f} us of latency; its instructions, four warps a clock.
- The fused kernel reads its row again, from L2 if the rows of all resident programs fit into {kept:.0f}
  MB; what does not fit is read from memory. The waits between its passes ({waits} of them) and the
  instructions outside of its loops stand in the way where one program is alone on a multiprocessor, and
  hide behind the others where it is not.
- Where a loop has barriers (Liger's), the loads of a block wait for the block before, and its
  instructions are added to the time of its loads.
- A launch ends with half of the places empty, on average.

The last column, in copies: *memory*, the bytes at a copy's bandwidth; *issue*, the instructions; *alone 1.65
of 3*, a program by itself would take 1.65, and three share a multiprocessor. Predicted is the largest of
memory, issue and 1.65 / 3, times *waves*, the factor for the launch's end. Other words are in the
[glossary](kernels.md#glossary).

The {kept:.0f} MB were counted on an H200; the latency is a guess; the number of waits is counted in the
code. None was fitted to the times below. This program was written after the first measurements. What was
predicted by hand before each of them is in [kernels.md](kernels.md). Where the error is large, the model
lacks something, and the line says where to look.
"""

FOOT = """\
## Where it errs

- Liger's cross-entropy at V = 32,000: the time of its host, which the model leaves out. It asks the
  device for the number of rows, and a step ends before the host is done.
- The fused kernel at V = 128,256 is faster than the model: part of its waits hides behind the stores of
  the row before, and the instructions outside of its loops are all that the code has, both sides of every
  branch.
- The H200's fused lines were measured with the launch table before eight tiles were in flight; the
  predictions are of the table as it is. What that change gave on the H200 is in
  [kernels.md](kernels.md#log-of-changes): 1.23 at V = 32,000, 1.39 at 262,144.
- The gradient writes as much as it reads, a tile at a time, and takes 6 to 8 % more than a copy, 12 %
  where rows begin off a boundary (V = 50,257). The model has it as a copy.
"""


def table(lines: list[Line]) -> str:
    rows = [
        ["", "shape", "predicted", "measured", "error", "made of"],
        ["---"] * 6,
        *(x.cells for x in lines),
    ]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in rows) + "\n\n"


def page() -> str:
    codes = counted()
    text = HEAD.format(latency=LATENCY * 1e6, kept=KEPT / 1e6, waits=WAITS) + "\n"
    for name, gpu in MACHINES.items():
        text += f"## {gpu.name}, {gpu.bandwidth} TB/s\n\n" + table([*own(name, gpu, codes)])
        text += table([*others(name, gpu, codes), *from_hidden_states(name, gpu, codes)])
    return text + FOOT


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--compile", action="store_true", help="count the kernels again")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "predictions.md")
    args = parser.parse_args()
    if args.compile:
        count_again()
    args.out.write_text(page())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
