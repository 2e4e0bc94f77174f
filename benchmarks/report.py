"""Write docs/benchmarks.md and its plots from the records under benchmarks/results.

    python benchmarks/report.py
    python benchmarks/report.py --results OUT_DIR --out OUT_DIR/benchmarks.md

Shows what was measured and nothing else: a case that no record holds is absent. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import plots

ROOT = Path(__file__).parent.parent
Record = dict[str, Any]

INTRODUCTION = """\
# Benchmarks

Written by `python benchmarks/report.py` from the records under `benchmarks/results`; how they are taken is in
[CONTRIBUTING.md](../CONTRIBUTING.md#measuring). What is not measured is absent.

Every time is the median of rounds in which all contestants, and a copy of the logits, took turns in one
process. "x copy" is the time over that copy's (one read and one write of the logits). "Bandwidth" counts what
the mode cannot do without: one read of the logits for the statistics, a read and a write for the gradient, a
read and a write in all where both are made in one visit; as a fraction of the copy's. Peak memory is what is
alive at once beyond the logits, gradient included, as a multiple of the logits' size.
"""

COMPILED = """\
## Machine code

Counted, not timed: the kernels compiled ahead of time and disassembled, V = 128,256
(`python benchmarks/sass_report.py --json > benchmarks/results/compiled/sass.json`). While an H200 reads one
bf16 logit at full bandwidth it can issue about 15 instructions.
"""


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(header), *map(list, rows)]
    lines.insert(1, ["---"] * len(lines[0]))
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n"


def unique(records: Iterable[Record], key: str) -> list[Any]:
    return list(dict.fromkeys(record[key] for record in records))


def cell(record: Record | None) -> str:
    if record is None:
        return ""
    if "failure" in record:
        return record["failure"]
    return f"{record['ms']:.3g} ms, {record['ratio_to_copy']:.2f} x copy"


def times(records: list[Record], phase: str, dtype: str) -> str:
    """One row a contestant, one column a shape."""
    chosen = [r for r in records if r["phase"] == phase and r["dtype"] == dtype]
    shapes = sorted({(r["v"], r["n"]) for r in chosen})
    if not shapes:
        return ""
    known = {(r["name"], r["v"], r["n"]): r for r in chosen}
    rows = [
        [name, *(cell(known.get((name, v, n))) for v, n in shapes)]
        for name in unique(chosen, "name")
        if any((name, v, n) in known for v, n in shapes)
    ]
    title = {"both": "Forward and backward"}.get(phase, phase.capitalize())
    return f"### {title}, {dtype}\n\n" + table(["", *(f"{n:,} x {v:,}" for v, n in shapes)], rows) + "\n"


def bandwidth_and_memory(records: list[Record], dtype: str) -> str:
    """Of the training steps with the most rows of each vocabulary."""
    chosen = [r for r in records if r["phase"] == "both" and r["dtype"] == dtype and "failure" not in r]
    shapes = plots.one_size_per_vocabulary(chosen)
    if not shapes:
        return ""
    known = {(r["name"], r["v"], r["n"]): r for r in chosen}

    def text(record: Record | None) -> str:
        if record is None:
            return ""
        stream = record["bytes"] / record["streams"]
        return f"{plots.share_of_copy(record):.2f}, {record['peak_bytes'] / stream:.2f} x logits"

    rows = [[name, *(text(known.get((name, v, n))) for v, n in shapes)] for name in unique(chosen, "name")]
    return (
        f"### Bandwidth over the copy's and peak memory, forward and backward, {dtype}\n\n"
        + table(["", *(f"{n:,} x {v:,}" for v, n in shapes)], rows)
        + "\n"
    )


def origin(whole: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in whole["versions"].items())
    load = f" Load average before {whole['load_before'][0]:.2f}, after {whole['load_after'][0]:.2f}."
    note = f" {whole['note']}" if "note" in whole else ""
    return (
        f"{whole['device']} ({whole['system']}); {versions}; commit {whole['commit']}; {whole['date']}."
        f"{load}{note}\n\n    {whole['command']}\n\n"
    )


def losses(path: Path, images: Path, link: str) -> str:
    whole = json.loads(path.read_text())
    records = whole["records"]
    text = f"## {whole['device']}\n\n" + origin(whole)
    for name in plots.draw(records, images, path.parent.name):
        text += f"![{name}]({link}{name})\n\n"
    for dtype in unique(records, "dtype"):
        for phase in ("both", "forward", "backward"):
            text += times(records, phase, dtype)
        text += bandwidth_and_memory(records, dtype)
    for name, reason in whole["skipped"].items():
        text += f"Skipped: {name}, {reason}.\n"
    return text + "\n"


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
    text = INTRODUCTION + "\n"
    for path in sorted(args.results.glob("**/losses.json")):
        text += losses(path, images, "images/")
    for path in sorted(args.results.glob("**/sass.json")):
        text += compiled(path)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(text.rstrip() + "\n")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
