"""Draw the README's picture of the gate: `python docs/figures.py` writes docs/images/gate.png."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

IMAGES = Path(__file__).parent / "images"
LOWEST = 1e-4  # left end of the axis: a random label under a confident model is about here
CAPTION = (
    "α = Σ p² over the vocabulary: near 0 unsure, near 1 certain. "
    "A line ends at p = √α, the most that a label can have."
)
NOTE = (
    "A noisy label contradicts\na confident model: here\ncross-entropy pushes hardest,\nDEFT hardly at all."
)
BLACK, GREY, SHADE = "#1a1a1a", "#5a5a5a", "#f3f1e8"
COLOURS = {0.02: "#0072b2", 0.3: "#009e73", 0.65: "#aa4499", 1.0: "#d55e00"}  # apart for the colour-blind too


def attainable(alpha: float) -> np.ndarray:
    """Probabilities a label can have: p^2 is one term of alpha = sum p^2. At alpha = 1, all: the fixed -p."""
    return np.geomspace(LOWEST, np.sqrt(alpha), 400)


def curve(axes: Axes, alpha: float, gradient: bool) -> None:
    p = attainable(alpha)
    y = p**alpha * (1 - p if gradient else 1)
    axes.plot(p, y, color=COLOURS[alpha], lw=2.4, solid_capstyle="round")
    if alpha < 1:
        axes.plot(p[-1], y[-1], "o", color=COLOURS[alpha], ms=5, zorder=3)


def write(axes: Axes, p: float, y: float, text: str, colour: str = BLACK, **keywords: object) -> None:
    axes.text(p, y, text, **{"color": colour, "fontsize": 10.5, "va": "center", **keywords})


def draw_gate(axes: Axes) -> None:
    axes.axhline(1, color=BLACK, lw=2.4)
    for alpha in COLOURS:
        curve(axes, alpha, gradient=False)
    write(axes, 1.3e-4, 1.05, "cross-entropy: 1 for every label")
    write(axes, 1.3e-4, 0.77, "α = 0.02: an unsure model", COLOURS[0.02])
    write(axes, 6e-3, 0.28, "α = 0.3", COLOURS[0.3], ha="right")
    write(axes, 3.7e-2, 0.17, "α = 0.65", COLOURS[0.65], ha="right")
    write(axes, 0.14, 0.05, "α = 1", COLOURS[1.0])
    axes.set_title("DEFT's gate  $p^{\\,α}$", loc="left", color=BLACK)


def draw_gradient(axes: Axes) -> None:
    p = np.geomspace(LOWEST, 1, 400)
    axes.axvspan(LOWEST, 2e-2, color=SHADE, lw=0)
    axes.plot(p, 1 - p, color=BLACK, lw=2.4)
    for alpha in (0.02, 0.65, 1.0):
        curve(axes, alpha, gradient=True)
    write(axes, 1.3e-4, 1.05, "cross-entropy")
    write(axes, 1.3e-4, 0.77, "DEFT, unsure: α = 0.02", COLOURS[0.02])
    write(axes, 1.3e-4, 0.09, "DEFT, confident: α = 0.65", COLOURS[0.65])
    write(axes, 0.12, 0.04, "−p: α = 1", COLOURS[1.0])
    clear = {"facecolor": SHADE, "edgecolor": "none", "pad": 1}  # no grid lines through the words
    write(axes, 1.3e-4, 0.42, NOTE, GREY, fontsize=10, linespacing=1.35, bbox=clear)
    axes.set_title("Pull of one label on its logit  $p^{\\,α}(1-p)$", loc="left", color=BLACK)


def main() -> None:
    figure = Figure(figsize=(9, 3.9), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, draw in zip(panels, (draw_gate, draw_gradient), strict=True):
        draw(axes)
        axes.set(xscale="log", xlim=(LOWEST, 1.15), ylim=(0, 1.12), xlabel="probability p of the label")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="#e4e4e4", lw=0.8)
        axes.set_axisbelow(True)
    figure.supxlabel(CAPTION, fontsize=9.5, color=GREY)
    IMAGES.mkdir(exist_ok=True)
    canvas = FigureCanvasAgg(figure)
    figure.set_dpi(200)  # twice the 900 pixels it is shown at
    canvas.draw()
    picture = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB")
    picture.quantize(128).save(IMAGES / "gate.png", optimize=True)  # a palette: a third of the bytes


if __name__ == "__main__":
    main()
