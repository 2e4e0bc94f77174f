"""Write docs/benchmarks.md, docs/benchmarks-tables.md and their plots from benchmarks/results.

    python benchmarks/report.py
    python benchmarks/report.py --results OUT_DIR --out OUT_DIR/benchmarks.md

Shows what was measured and nothing else: a case that no record holds is absent. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import plots
import questions
from tables import table

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]

WRITTEN = """\
Written by `python benchmarks/report.py` from the records under `benchmarks/results`; how they are taken is in
[CONTRIBUTING.md](../CONTRIBUTING.md#measuring). What is not measured is absent.
"""

INTRODUCTION = f"""\
# Benchmarks

{WRITTEN}
Every number here is a ratio within one record: all contestants took turns in one process, and each time is
the median of the rounds. A shape such as 4,096 x 32,000 is tokens x words of the vocabulary; of each
vocabulary one number of tokens is shown, the one that most vocabularies were measured with or else the
largest. With fewer tokens a ratio may be above 1: [all measurements]({{tables}}) has them, with
every time, machine, version and command.
"""

TABLES = f"""\
# All measurements

{WRITTEN}
Every time is the median of rounds in which all contestants, and a copy of the logits, took turns in one
process. "x copy" is the time over that copy's (one read and one write of the logits). "Bandwidth" counts what
the mode cannot do without: one read of the logits for the statistics, a read and a write for the gradient, a
read and a write in all where both are made in one visit; as a fraction of the copy's. Peak memory is what is
alive at once beyond the logits, gradient included, as a multiple of the logits' size.
"""

COMPILED = """\
## Machine code

Counted, not timed: kernels compiled ahead of time and disassembled, V = 128,256, by
`python benchmarks/sass_report.py --dtype bf16 fp32 --objective deft eaft deft-shannon-exact --kernel
statistics gradient fused --json > benchmarks/results/compiled/sass.json`. While an H200 reads one bf16
logit at full bandwidth it can issue about 15 instructions.
"""


def unique(records: Iterable[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def cell(record: Record | None) -> str:
    if record is None:
        return ""
    if "failure" in record:
        return record["failure"]
    return f"{record['ms']:.3g} ms, {record['ratio_to_copy']:.2f} x copy"


def groups(shapes: Iterable[tuple[int, int]]) -> list[list[tuple[int, int]]]:
    """(v, n) by the number of rows where several vocabularies share one; the others together."""
    alike: dict[int, list[tuple[int, int]]] = {}
    for v, n in sorted(set(shapes)):
        alike.setdefault(n, []).append((v, n))
    rest = [shape for group in alike.values() if len(group) == 1 for shape in group]
    shared = [alike[n] for n in sorted(alike) if len(alike[n]) > 1]
    return [*shared, sorted(rest)] if rest else shared


def by_shape(records: list[Record], text: Callable[[Record | None], str]) -> str:
    """One row a contestant, one column a shape; tables by `groups`."""
    known = {(r["name"], r["v"], r["n"]): r for r in records}
    found = ""
    for shapes in groups((r["v"], r["n"]) for r in records):
        names = unique((r for r in records if (r["v"], r["n"]) in shapes), "name")
        rows = [[name, *(text(known.get((name, *shape))) for shape in shapes)] for name in names]
        found += table(["", *(f"{n:,} x {v:,}" for v, n in shapes)], rows) + "\n"
    return found


def times(records: list[Record], phase: str, dtype: str) -> str:
    chosen = [r for r in records if r["phase"] == phase and r["dtype"] == dtype]
    title = {"both": "Forward and backward"}.get(phase, phase.capitalize())
    return f"### {title}, {dtype}\n\n" + by_shape(chosen, cell) if chosen else ""


def bandwidth_and_memory(records: list[Record], dtype: str) -> str:
    chosen = [r for r in records if r["phase"] == "both" and r["dtype"] == dtype and "failure" not in r]

    def text(record: Record | None) -> str:
        if record is None:
            return ""
        stream = record["bytes"] / record["streams"]
        return f"{plots.share_of_copy(record):.2f}, {record['peak_bytes'] / stream:.2f} x logits"

    title = f"### Bandwidth over the copy's and peak memory, forward and backward, {dtype}\n\n"
    return title + by_shape(chosen, text) if chosen else ""


def ratios(records: list[Record]) -> str:
    """Ours over the two that it stands in for."""
    known = {(r["name"], r["dtype"], r["v"], r["n"]): r for r in records if r["phase"] == "both"}
    pairs = (
        ("deft_loss nll", "F.cross_entropy", "ms"),
        ("deft_loss deft", "F.cross_entropy", "ms"),
        ("deft_loss deft", "DEFT in PyTorch", "ms"),
        ("deft_loss deft", "DEFT in PyTorch, compiled", "ms"),
        ("deft_loss deft", "DEFT in PyTorch", "peak_bytes"),
    )
    rows = []
    for dtype, v, n in dict.fromkeys(key[1:] for key in known):
        cells = []
        for ours, theirs, what in pairs:
            over = [known.get((name, dtype, v, n), {}).get(what) for name in (ours, theirs)]
            cells.append("" if None in over else f"{over[0] / over[1]:.2f}")
        if any(cells):
            rows.append([f"{dtype}, {n:,} x {v:,}", *cells])
    header = [f"{a} / {b}, {'time' if what == 'ms' else 'peak memory'}" for a, b, what in pairs]
    return "### In ratios, forward and backward\n\n" + table(["", *header], rows) + "\n"


def origin(whole: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    commit = f"; commit {whole['commit']}" if whole["commit"] else ""
    load = ""
    if "load_after" in whole:
        load = f" Load average before {whole['load_before'][0]:.2f}, after {whole['load_after'][0]:.2f}."
    note = f" {whole['note']}" if "note" in whole else ""
    return (
        f"{whole['device']} ({whole['system']}); {versions}{commit}; {whole['date']}.{load}{note}\n\n"
        f"    {whole['command']}\n\n"
    )


def losses(path: Path, images: Path, link: str) -> str:
    whole = json.loads(path.read_text())
    records = whole["records"]
    text = f"## {whole['device']}\n\n" + origin(whole)
    for name, title in plots.draw(records, images, path.parent.name):
        text += f"![{title}]({link}{name})\n\n"
    text += ratios(records)
    for dtype in unique(records, "dtype"):
        for phase in ("both", "forward", "backward"):
            text += times(records, phase, dtype)
        text += bandwidth_and_memory(records, dtype)
    for name, reason in whole["skipped"].items():
        text += f"Skipped: {name}, {reason}.\n"
    return text + "\n"


def linear(path: Path) -> str:
    """The linear call beside its bare products: one row a contestant, one column a shape."""
    whole = json.loads(path.read_text())
    records = whole["records"]
    shapes = unique((r for r in records if "ms" in r), "v")
    known = {(r["name"], r.get("v")): r for r in records}

    def text(record: Record | None) -> str:
        if record is None or "failure" in record:
            return "" if record is None else record["failure"]
        memory = record["peak_bytes"] / 2**30
        return f"{record['ms']:.1f} ms, {record['over_products']:.2f} x products, {memory:.2f} GiB"

    header = [""]
    for v in shapes:
        first = next(r for r in records if r.get("v") == v)
        header.append(f"{first['n']:,} x {first['d']:,} x {v:,}, {first['dtype']}")
    rows = [[name, *(text(known.get((name, v))) for v in shapes)] for name in unique(records, "name")]
    return (
        f"## {whole['device']}: forward and backward from hidden states\n\n" + origin(whole) + "N x D x V. "
        "Times over the three matrix products alone; memory is the peak beyond the inputs, with the "
        "gradients.\n\n" + table(header, rows) + "\n"
    )


def candidates(path: Path) -> str:
    """The three fastest candidates of every kernel and shape, and what the launch table holds."""
    whole = json.loads(path.read_text())
    found: dict[tuple[Any, ...], list[Record]] = {}
    for r in whole["records"]:
        found.setdefault((r["kernel"], r["objective"], r["dtype"], r["n"], r["v"]), []).append(r)
    rows = []
    for (kernel, objective, dtype, n, v), group in found.items():
        own = [r for r in group if r["candidate"].startswith("table")]
        best = [r for r in group if r not in own][:3]
        shown = [f"{r['ratio_to_copy']:.3f} ({r['candidate']})" for r in own + best]
        rows.append([kernel, objective, f"{n:,} x {v:,}, {dtype}", *shown, *[""] * (4 - len(shown))])
    header = ["kernel", "objective", "", "launch table", "fastest", "second", "third"]
    return (
        f"## {whole['device']}: candidates for the launch table\n\n" + origin(whole) + "Times over a copy of "
        "the logits.\n\n" + table(header, rows) + "\n"
    )


def compiled(path: Path) -> str:
    """The loops of one representative of each kind, and the peers'."""
    kept = {
        ("statistics", "deft"),
        ("statistics", "eaft"),
        ("gradient", "deft"),
        ("gradient", "deft-shannon-exact"),
    }
    kept |= {("fused", "deft"), ("fused", "eaft")}
    rows = []
    for r in json.loads(path.read_text()):
        own = r["package"] == "deft-kernels"
        if r["loop"] is None or (own and (r["kernel"], r["objective"]) not in kept):
            continue
        rows.append([
            f"sm_{r['arch']}", r["dtype"], f"`{r['kernel']}`" + ("" if own else f", {r['package']}"),
            r["objective"], r["loop"], f"{r['instructions_per_logit']:.2f}", f"{r['mufu_per_logit']:.2f}",
            str(r["registers"]), str(r["spill_bytes"]), str(r["barriers_in_loop"]), f"{r['occupancy']:.0%}",
        ])  # fmt: skip
    header = ["", "dtype", "kernel", "objective", "loop", "instructions / logit", "MUFU / logit"]
    return (
        COMPILED + "\n" + table([*header, "registers", "spilled bytes", "barriers", "occupancy"], rows) + "\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "benchmarks.md")
    args = parser.parse_args()
    images = args.out.parent / "images"
    tables = args.out.with_name(f"{args.out.stem}-tables.md")
    lead = INTRODUCTION.format(tables=tables.name) + "\n" + questions.answers(args.results, images, "images/")
    text = TABLES + "\n"
    for path in sorted(args.results.glob("**/losses.json")):
        text += losses(path, images, "images/")
    for path in sorted(args.results.glob("**/linear.json")):
        text += linear(path)
    for path in sorted(args.results.glob("**/sweep.json")):
        text += candidates(path)
    for path in sorted(args.results.glob("**/sass.json")):
        text += compiled(path)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for path, page in ((args.out, lead), (tables, text)):
        path.write_text(page.rstrip() + "\n")
        print(f"wrote {path}")


if __name__ == "__main__":
    main()
