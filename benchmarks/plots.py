"""Plots of the records: time over V, memory over N, fraction of the copy's bandwidth over V."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Record = dict[str, Any]
# Apart for the colour-blind too. Ours are warm and drawn thick, everything else cold and thin.
OURS = ("#d55e00", "#e69f00", "#cc79a7", "#a6761d", "#882255", "#661100", "#aa4499", "#ddaa33")
OTHERS = ("#0072b2", "#56b4e9", "#009e73", "#444444", "#117733", "#88ccee", "#999999", "#332288")
GREY = "#5a5a5a"


def one_size_per_vocabulary(records: list[Record]) -> list[tuple[int, int]]:
    """(v, n): for every vocabulary the number of rows that the most vocabularies share, else its largest."""
    rows: dict[int, set[int]] = {}
    for record in records:
        rows.setdefault(record["v"], set()).add(record["n"])
    counts = {n: sum(n in each for each in rows.values()) for each in rows.values() for n in each}
    return [(v, max(each, key=lambda n: (counts[n], n))) for v, each in sorted(rows.items())]


def _lines(axes: Axes, records: list[Record], over: str, value: Callable[[Record], float]) -> None:
    names = list(dict.fromkeys((r["name"], r["ours"]) for r in records))
    colours: dict[bool, Iterator[str]] = {True: iter(OURS * 3), False: iter(OTHERS * 3)}
    for name, ours in names:
        points = sorted((r[over], value(r)) for r in records if r["name"] == name)
        axes.plot(
            *zip(*points, strict=True), "-o", color=next(colours[ours]), lw=2.4 if ours else 1.2,
            ms=5 if ours else 3.5, label=name, zorder=3 if ours else 2,
        )  # fmt: skip
    axes.set_xscale("log", base=2)
    ticks = sorted({r[over] for r in records})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks], rotation=20)
    axes.minorticks_off()
    axes.set_xlabel({"v": "vocabulary V", "n": "rows N"}[over])


def _picture(
    path: Path, title: str, label: str, records: list[Record], over: str, value: Callable[[Record], float]
) -> tuple[str, str]:
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    _lines(axes, records, over, value)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(label)
    axes.set_title(title, loc="left", fontsize=11)
    axes.grid(axis="y", color="#e4e4e4", lw=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return path.name, title


def time_a_logit(record: Record) -> float:
    return record["ms"] * 1e6 / (record["n"] * record["v"])


def share_of_copy(record: Record) -> float:
    return record["gb_per_s"] / record["copy_gb_per_s"]


def peak_mib(record: Record) -> float:
    return record["peak_bytes"] / 2**20


def draw(records: list[Record], images: Path, machine: str) -> Iterator[tuple[str, str]]:
    """(name, title) of the pictures written; none for what the records do not hold."""
    steps = [r for r in records if r["phase"] == "both" and "failure" not in r]
    for dtype in dict.fromkeys(r["dtype"] for r in steps):
        chosen = [r for r in steps if r["dtype"] == dtype]
        shapes = set(one_size_per_vocabulary(chosen))
        alike = [r for r in chosen if (r["v"], r["n"]) in shapes]
        rows = sorted({n for _, n in shapes})
        step = f"forward and backward, {dtype}"
        size = f"N = {rows[0]:,}" if len(rows) == 1 else f"N = {rows[0]:,} to {rows[-1]:,}"
        if len(shapes) > 1:
            path = images / f"benchmarks-{machine}-time-{dtype}.png"
            yield _picture(path, f"Time of {step}, {size}", "ns a logit", alike, "v", time_a_logit)
            path = images / f"benchmarks-{machine}-bandwidth-{dtype}.png"
            title = f"Bandwidth of {step}, {size}"
            yield _picture(path, title, "fraction of a copy's", alike, "v", share_of_copy)
        counts = {v: len({r["n"] for r in chosen if r["v"] == v}) for v in {r["v"] for r in chosen}}
        v = max(counts, key=lambda v: (counts[v], v))
        if counts[v] > 1:
            path = images / f"benchmarks-{machine}-memory-{dtype}.png"
            title = f"Peak memory beyond the logits, {step}, V = {v:,}"
            yield _picture(path, title, "MiB", [r for r in chosen if r["v"] == v], "n", peak_mib)
