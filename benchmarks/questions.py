"""What docs/benchmarks.md leads with: one plot and one table of ratios for each question that people ask."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import plots
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

Record = dict[str, Any]


class Ratio(NamedTuple):
    label: str
    ours: str
    theirs: str


class Question(NamedTuple):
    title: str
    name: str
    records: str  # the file of each machine
    field: str
    words: str
    ratios: tuple[Ratio, ...]


DEFAULT, IN_PLACE = "deft_loss deft", "deft_loss deft, in place, in forward"
CROSS_ENTROPY, COMPILED = "F.cross_entropy", "F.cross_entropy, compiled"
EAGER = "DEFT in PyTorch"
QUESTIONS = (
    Question(
        "What does it cost beside cross-entropy?", "cross-entropy", "losses.json", "ms",
        "Time of forward and backward over logits, `deft_loss` over theirs: below 1 is faster than what it\n"
        "replaces. In place means that the gradient takes the logits' memory and is made in the forward\n"
        "(`inplace=True, grad_in_forward=True`); default is without both. Compiled is by `torch.compile`.",
        (
            Ratio("default / F.cross_entropy", DEFAULT, CROSS_ENTROPY),
            Ratio("default / F.cross_entropy, compiled", DEFAULT, COMPILED),
            Ratio("in place / F.cross_entropy", IN_PLACE, CROSS_ENTROPY),
            Ratio("in place / Liger's cross-entropy", IN_PLACE, "Liger"),
        ),
    ),
    Question(
        "What does it save beside DEFT in eager PyTorch?", "eager", "losses.json", "ms",
        "Time of forward and backward, `deft_loss` over the same loss in a few lines of PyTorch: as they\n"
        "are (eager) and by `torch.compile` (compiled).",
        (
            Ratio("default / eager", DEFAULT, EAGER),
            Ratio("default / eager, compiled", DEFAULT, f"{EAGER}, compiled"),
            Ratio("in place / eager", IN_PLACE, EAGER),
        ),
    ),
    Question(
        "And beside fused heads?", "heads", "linear.json", "ms",
        "A fused head takes hidden states and the output layer's weight, and makes no whole logits. Time of\n"
        "forward and backward, `fused_linear_deft_loss` with deft over theirs, and over its three matrix\n"
        "products alone, which are the floor. A shape here is tokens x hidden size x words. Liger's head\n"
        "trains cross-entropy. \"TRL's head and DEFT\" is what `trl.apply` trains. PyTorch's own fused\n"
        "head, `F.linear_cross_entropy`, is not in these records.",
        (
            Ratio("deft / the products alone", "deft", "products"),
            Ratio("deft / logits and F.cross_entropy", "deft", "F.linear, F.cross_entropy"),
            Ratio("deft / Liger's head", "deft", "Liger"),
            Ratio("deft / TRL's head and DEFT", "deft", "TRL, deft"),
        ),
    ),
    Question(
        "How much memory?", "memory", "losses.json", "peak_bytes",
        "Peak memory beyond the logits, gradient included, ours over theirs. In place it is next to nothing.",
        (
            Ratio("default / F.cross_entropy", DEFAULT, CROSS_ENTROPY),
            Ratio("default / DEFT in eager PyTorch", DEFAULT, EAGER),
            Ratio("in place / F.cross_entropy", IN_PLACE, CROSS_ENTROPY),
        ),
    ),
    Question(
        "How much memory from hidden states?", "memory-heads", "linear.json", "peak_bytes",
        "Peak memory beyond the inputs, with the gradients, `fused_linear_deft_loss` over theirs.\n"
        "Above 1 ours takes more; `chunk_bytes` sets the size of a chunk of logits.",
        (
            Ratio("deft / logits and F.cross_entropy", "deft", "F.linear, F.cross_entropy"),
            Ratio("deft / Liger's head", "deft", "Liger"),
            Ratio("deft / TRL's head and DEFT", "deft", "TRL, deft"),
        ),
    ),
)  # fmt: skip


def asked(question: Question, results: Path) -> dict[str, list[float | None]]:
    """Machine and shape -> a number for each ratio, None where a record is missing or failed."""
    found: dict[str, list[float | None]] = {}
    for path in sorted(results.glob(f"**/{question.records}")):
        whole = json.loads(path.read_text())
        records = [r for r in whole["records"] if r.get("phase", "both") == "both" and question.field in r]
        for dtype in dict.fromkeys(r["dtype"] for r in records):
            chosen = [r for r in records if r["dtype"] == dtype]
            for v, n in plots.one_size_per_vocabulary(chosen):
                known = {r["name"]: r[question.field] for r in chosen if (r["v"], r["n"]) == (v, n)}
                numbers = [
                    known[ratio.ours] / known[ratio.theirs]
                    if ratio.ours in known and known.get(ratio.theirs)
                    else None
                    for ratio in question.ratios
                ]
                if any(number is not None for number in numbers):
                    hidden = next((f"{r['d']:,} x " for r in chosen if "d" in r), "")
                    found[f"{whole['device']}, {dtype}, {n:,} x {hidden}{v:,}"] = numbers
    return found


def picture(question: Question, rows: dict[str, list[float | None]], path: Path) -> None:
    """One group of bars for each machine and shape; 1 is drawn as a line."""
    shown = [
        i for i in range(len(question.ratios)) if any(numbers[i] is not None for numbers in rows.values())
    ]
    figure = Figure(figsize=(9, 1.1 + 0.14 * len(rows) * (len(shown) + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, i in enumerate(shown):
        points = [
            (row + (place + 0.5) / (len(shown) + 1), numbers[i])
            for row, numbers in enumerate(rows.values())
            if numbers[i] is not None
        ]
        heights, values = zip(*points, strict=True)
        bars = axes.barh(
            heights, values, 0.9 / (len(shown) + 1), label=question.ratios[i].label,
            color=(*plots.OTHERS[:2], plots.OURS[0], plots.OURS[1])[place],
        )  # fmt: skip
        axes.bar_label(bars, fmt=" %.2f", fontsize=7)
    axes.axvline(1, color=plots.GREY, lw=1)
    axes.set_yticks(
        [row + len(shown) / 2 / (len(shown) + 1) for row in range(len(rows))], list(rows), fontsize=8
    )
    axes.set_ylim(len(rows), -1 / (len(shown) + 1))
    axes.set_xlabel(("time" if question.field == "ms" else "peak memory") + ", ours over theirs")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, frameon=False, loc="outside upper center", ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def answers(results: Path, images: Path, link: str) -> str:
    """The questions that the records answer, each with its plot and its table."""
    text = ""
    for question in QUESTIONS:
        rows = asked(question, results)
        if not rows:
            continue
        name = f"ratios-{question.name}.png"
        picture(question, rows, images / name)
        lines = [["", *(ratio.label for ratio in question.ratios)], ["---"] * (len(question.ratios) + 1)]
        lines += [[row, *("" if x is None else f"{x:.2f}" for x in numbers)] for row, numbers in rows.items()]
        text += f"## {question.title}\n\n{question.words}\n\n![{question.title}]({link}{name})\n\n"
        text += "\n".join("| " + " | ".join(cells) + " |" for cells in lines) + "\n\n"
    return text
