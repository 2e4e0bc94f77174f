"""Figures of a recording; each takes a recording and a matplotlib axis and returns the axis.

matplotlib is imported when a figure is made (the extra `diagnostics`). The ground is white
and the ink dark whatever page a figure is put on. Colours: Okabe and Ito's, and viridis, which the
colour-blind can tell apart. `CAPTIONS` says what to read from each.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from .bins import ENTROPY, P
from .readings import paired
from .recording import Recording

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#1a1a1a", "#e4e4e4"
BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#000000"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, SKY, BLACK)
LINES = ("-", "--", "-.", ":")
# The colour scale of gradient mass, in per cent of all in one cell; less is drawn as the least.
LEAST_SHARE, MOST_SHARE = 1e-2, 10.0
# Hundredths of p in a cell of the picture: finer, and a small sample looks like a comb.
COARSE = 4
BARS = 8  # how many spreads are drawn along a run

CAPTIONS = {
    "gradient_mass": "Where an objective's gradient comes from: the share of the summed gradient norms in "
    "each cell of label probability p and entropy H. Bottom left: the model is sure and the label "
    "contradicts it, a wrong label or a rare fact. Top left: the model is unsure. Right: known already.",
    "over_training": "Mean over the tokens of each interval of steps; a bar reaches one standard "
    "deviation to either side. A focus index α that rises says that the model commits itself; a gate that "
    "falls while p stays low, that tokens are being shut out.",
    "learned_and_forgotten": "The same tokens before and after, grouped by how sure the model was before "
    "(α). Blue: what tokens that got better contribute to the mean change; orange: what those that got "
    "worse do; the dot is the sum of the two. Forgetting at high α is knowledge lost.",
    "histogram_of_p": "How probable the labels are. A mode at 1 is what is known, one at 0 what the model "
    "gives up on or has not learned; an objective that sharpens moves tokens from the middle to both ends.",
}


def gradient_mass(
    recording: Recording, axis: Axes, objective: str | None = None, *, channel: str | None = None
) -> Axes:
    """Share of gradient mass over (p, H) under an objective; the recording's first where none is named."""
    from matplotlib.colors import LogNorm

    objective = recording.objectives[0] if objective is None else objective
    mass = recording.mass[recording.number(objective), recording.of(channel)].sum(0)
    total = mass.sum()
    mass = mass.reshape(-1, COARSE, ENTROPY.number).sum(1)
    share = 100 * mass / total if total > 0 else mass
    scale = LogNorm(LEAST_SHARE, MOST_SHARE)
    shown = np.ma.masked_equal(share.T, 0)  # blank is none at all
    mesh = axis.pcolormesh(P.edges()[::COARSE], ENTROPY.edges(), shown, cmap="viridis_r", norm=scale)
    # Every objective's panel spans the tokens there are, not those that it weighs.
    occupied = np.flatnonzero(recording.p_entropy[recording.of(channel)].sum((0, 1)))
    top = ENTROPY.edges()[occupied[-1] + 1] if len(occupied) else ENTROPY.top
    axis.set(xlim=(0, 1), ylim=(0, top), title=objective)
    axis.set(xlabel="probability p of the label", ylabel="entropy H, nats")
    axis.figure.colorbar(mesh, ax=axis, label="share of gradient mass, % a cell", extend="both")
    return _styled(axis, grid=False)


def over_training(recording: Recording, axis: Axes, *, channel: str | None = None) -> Axes:
    """Mean alpha, gate and p over training, each with one standard deviation over tokens."""
    whose = f" of {recording.gate_of}" if recording.gate_of else ""
    names = {"alpha": "focus index α = Σ p²", "gate": f"gate{whose}", "p": "probability p of the label"}
    for place, (of, name) in enumerate(names.items()):
        step, mean, spread = recording.over_time(of, channel)
        colour, line, few = COLOURS[place], LINES[place], len(step) < 20
        axis.plot(step, mean, color=colour, ls=line, lw=2, label=name, marker="." if few else None)
        # Bars, each objective's at steps of its own: three shades over each other are one grey.
        apart = max(1, len(step) // BARS)
        some = slice(place * apart // 3, None, apart)
        low, high = mean[some] - spread[some].clip(max=mean[some]), mean[some] + spread[some]
        axis.vlines(step[some], low, high.clip(max=1), color=colour, ls=line, lw=1.2)
    axis.set(ylim=(0, 1.02), xlabel="step", ylabel="mean over tokens, from 0 to 1")
    return _styled(_legend_above(axis))


def learned_and_forgotten(
    before: Recording, after: Recording, axis: Axes, *, of: str = "p", channel: str | None = None
) -> Axes:
    """Change of "p" or of "nll", -log p in nats, of the tokens that both recordings sampled, by alpha before.

    Raises: ValueError where they have no token in common: give both recorders one seed, and the same rows in
    the same order, or ids.
    """
    groups = paired(before, after, of, channel)
    places = np.arange(len(groups))
    better, worse = np.array([g.better for g in groups]), np.array([g.worse for g in groups])
    axis.bar(places, better, color=BLUE, width=0.7, label="learned")
    axis.bar(places, worse, color=ORANGE, width=0.7, label="forgotten", hatch="//", edgecolor="white")
    axis.plot(places, better + worse, "o", color=BLACK, label="mean change")
    axis.axhline(0, color=INK, lw=0.8)
    axis.set_xticks(places, [f"{g.low:g} to {g.high:g}\nn = {g.size}" for g in groups])
    unit = "p" if of == "p" else "−log p, nats"
    axis.set(xlabel="focus index α before", ylabel=f"mean change of {unit}")
    return _styled(_legend_above(axis))


def histogram_of_p(
    recordings: Recording | Mapping[str, Recording], axis: Axes, *, channel: str | None = None
) -> Axes:
    """Share of tokens in each hundredth of p; several recordings by name are laid over each other."""
    several = {"": recordings} if isinstance(recordings, Recording) else recordings
    for number, (name, recording) in enumerate(several.items()):
        counts = recording.histogram("p", channel)
        share = 100 * counts / max(counts.sum(), 1)
        colour, line = COLOURS[number % len(COLOURS)], LINES[number % len(LINES)]
        label = f"{name}, n = {int(counts.sum())}" if name else None
        axis.stairs(share, P.edges(), baseline=None, color=colour, ls=line, lw=1.6, label=label)
    axis.set(
        yscale="log", xlim=(0, 1), xlabel="probability p of the label", ylabel="tokens, % a hundredth of p"
    )
    if not isinstance(recordings, Recording):
        _legend_above(axis)
    return _styled(axis)


def panels_of_mass(recording: Recording, *, channel: str | None = None) -> Figure:
    """`gradient_mass` of every objective, on one colour scale."""
    columns = min(3, len(recording.objectives))
    lines = -(-len(recording.objectives) // columns)
    figure = blank(4.4 * columns, 3.4 * lines)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis, objective in zip(axes, recording.objectives, strict=False):
        gradient_mass(recording, axis, objective, channel=channel)
    for axis in axes[len(recording.objectives) :]:
        axis.remove()
    return figure


def blank(width: float = 6.0, height: float = 4.0) -> Figure:
    """A figure that belongs to no window."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "matplotlib: figures need it; pip install matplotlib tqdm", name=error.name
        ) from error
    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, path: str | Path, *, caption: str | None = None) -> None:
    """Write it with its white ground, and under it a caption where one is given."""
    if caption is not None:
        import textwrap

        letters = int(figure.get_figwidth() * 14)
        figure.supxlabel("\n".join(textwrap.wrap(caption, letters)), fontsize=9, color=INK)
    figure.savefig(path, dpi=120, facecolor="white")


def _legend_above(axis: Axes) -> Axes:
    """Where it covers no data."""
    axis.legend(frameon=False, fontsize=9, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return axis


def _styled(axis: Axes, grid: bool = True) -> Axes:
    axis.set_facecolor("white")
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    if grid:
        axis.grid(color=GRID, lw=0.8)
    return axis
