"""Draw the README's figures from the records: `python docs/headline.py` writes docs/images/headline.png."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

ROOT = Path(__file__).parent.parent
IMAGE = ROOT / "docs" / "images" / "headline.png"
# (records, rows, vocabulary, dtype, what it is called)
PANELS = (
    ("nvidia-h100", 8192, 128256, "bfloat16", "One H100, 8,192 tokens, V = 128,256, bf16"),
    ("amd-epyc-2-threads", 524, 32000, "float32", "Two CPU threads, 524 tokens, V = 32,000, fp32"),
)
NAMES = {
    "deft_loss deft, in place, in forward": "deft_loss, in place",
    "deft_loss deft": "deft_loss",
    "Liger": "Liger's cross-entropy",
    "F.cross_entropy": "F.cross_entropy",
    "DEFT in PyTorch": "DEFT in eager PyTorch",
}
OURS, OTHERS, TEXT = "#d55e00", "#8a9bb0", "#1a1a1a"


def chosen(folder: str, rows: int, vocabulary: int, dtype: str) -> dict[str, dict[str, Any]]:
    """The records of forward and backward at one shape, by the name that is shown, the fastest first."""
    path = ROOT / "benchmarks" / "results" / folder / "losses.json"
    found = {}
    for record in json.loads(path.read_text())["records"]:
        case = (record["phase"], record["n"], record["v"], record["dtype"])
        if case == ("both", rows, vocabulary, dtype) and record["name"] in NAMES and "ms" in record:
            found[NAMES[record["name"]]] = record
    return {name: found[name] for name in NAMES.values() if name in found}


def bars(axes: Axes, values: dict[str, float], unit: str, title: str, names: bool) -> None:
    colours = [OURS if name.startswith("deft") else OTHERS for name in values]
    axes.barh(range(len(values)), list(values.values()), color=colours, height=0.66)
    axes.invert_yaxis()
    for place, value in enumerate(values.values()):
        text = f"{value:.1f}" if value >= 0.05 else "0"
        axes.text(value, place, f" {text} {unit}", va="center", fontsize=10, color=TEXT)
    axes.set_yticks(range(len(values)), list(values) if names else [], fontsize=10.5)
    axes.set_xlim(0, max(values.values()) * 1.22)
    axes.set_xticks([])
    axes.set_title(title, fontsize=10.5, loc="left", color=TEXT)
    axes.spines[["top", "right", "bottom"]].set_visible(False)
    axes.tick_params(length=0)


def draw() -> None:
    figure = Figure(figsize=(9.6, 5.4), facecolor="white", layout="constrained")
    for row, (folder, rows, vocabulary, dtype, what) in enumerate(PANELS):
        records = chosen(folder, rows, vocabulary, dtype)
        size = rows * vocabulary * (2 if dtype == "bfloat16" else 4)
        times = {name: record["ms"] for name, record in records.items()}
        memory = {name: record["peak_bytes"] / size for name, record in records.items()}
        left, right = (figure.add_subplot(len(PANELS), 2, 2 * row + column) for column in (1, 2))
        bars(left, times, "ms", f"{what}\nforward and backward", names=True)
        bars(right, memory, "x", "peak memory beyond the logits,\nas a multiple of them", names=False)
    FigureCanvasAgg(figure)
    figure.savefig(IMAGE, dpi=130)


if __name__ == "__main__":
    draw()
    print(f"wrote {IMAGE}")
