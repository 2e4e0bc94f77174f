"""The figures of docs/evidence.md; each takes results and gives a figure. Okabe and Ito's colours."""

from __future__ import annotations

from typing import Any

import numpy as np
from measures import SHARES
from results import Results

from deft_kernels.diagnostics import Recording, figures

LOOKS = {
    "nll": ("#000000", "-", "o"),
    "neg_prob": ("#cc79a7", ":", "v"),
    "tsallis-0.5": ("#e69f00", "--", "D"),
    "eaft": ("#56b4e9", "-.", "P"),
    "cayley": ("#009e73", "--", "s"),
    "deft": ("#d55e00", "-", "^"),
    "deft-order-1": ("#0072b2", ":", "X"),
    "deft-nll-first": ("#0072b2", "--", "<"),
    "deft-ramp": ("#cc79a7", "-.", ">"),
    "deft-cap": ("#e69f00", ":", "d"),
}
GRID = "#e4e4e4"


def styled(axis: Any) -> Any:
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_axisbelow(True)
    axis.grid(color=GRID, lw=0.8)
    return axis


def legend(figure: Any, axis: Any, columns: int = 7) -> None:
    handles, names = axis.get_legend_handles_labels()
    figure.legend(handles, names, loc="outside upper center", ncols=columns, frameon=False, fontsize=10)


def differences(results: Results) -> Any:
    """Top-1 over nll's, paired by seed, on every kind of data."""
    parts = [p for p in results.parts() if "fonts" not in p]
    figure = figures.blank(11, 0.72 * len(parts) + 1.6)
    near, far = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1.3))
    for place, part in enumerate(parts):
        names = [o for o in results.objectives(part.split(":")[0]) if o != "nll"]
        for number, objective in enumerate(names):
            gap = results.difference(part, objective, "top1")
            height = place + 0.11 * (number - (len(names) - 1) / 2)
            colour, _, marker = LOOKS[objective]
            for axis in (near, far):
                axis.plot(gap.values, [height] * len(gap.values), marker, color=colour, ms=3, alpha=0.5)
                label = objective if place == 0 else None
                axis.plot(gap.mean, height, marker, color=colour, ms=8, label=label)
    near.set(xlim=(-4.5, 4.5), xlabel="top-1 above that of nll, points")
    far.set(xlim=(-45, 6), xlabel="the same, far out")
    near.set_yticks(range(len(parts)), parts)
    near.invert_yaxis()
    for axis in (near, far):
        styled(axis)
        axis.axvline(0, color="#000000", lw=1.2)
        for line in range(1, len(parts)):
            axis.axhline(line - 0.5, color=GRID, lw=0.8)
    legend(figure, near, 6)
    return figure


def over_training(results: Results) -> Any:
    """alpha and p of the training labels, one column a task."""
    tasks = [
        t for t in ("strong-0", "strong-30", "intermediate", "cipher", "cells", "ascii") if t in results.tasks
    ]
    figure = figures.blank(2.45 * len(tasks) + 0.8, 5.6)
    axes = figure.subplots(2, len(tasks), sharey="row", squeeze=False)
    for column, task in enumerate(tasks):
        for row, (place, name) in enumerate(((1, "mean α = Σ p²"), (2, "mean p of the label"))):
            axis = styled(axes[row, column])
            for objective in results.objectives(task):
                colour, line, _ = LOOKS[objective]
                axis.plot(
                    *results.course(task, objective, place), color=colour, ls=line, lw=1.8, label=objective
                )
            axis.set(ylim=(0, 1), title=task if row == 0 else "", xlabel="step" if row else "")
            if column == 0:
                axis.set_ylabel(name)
    legend(figure, axes[0, 0])
    return figure


def dominated(results: Results) -> Any:
    """ascii: alpha, gate and the end of every objective and remedy."""
    figure = figures.blank(12, 4.4)
    alpha, gate, end = figure.subplots(1, 3, width_ratios=(1, 1, 1.25))
    names = results.objectives("ascii", remedies=True)
    for objective in names:
        colour, line, _ = LOOKS[objective]
        style = {"color": colour, "ls": line, "lw": 1.8, "label": objective}
        alpha.plot(*results.course("ascii", objective, 1), **style)
        gate.plot(*results.course("ascii", objective, 3), **style)
    alpha.set(ylim=(0, 1), xlabel="step", title="mean α of the training labels")
    gate.set(ylim=(0, 1.02), xlabel="step", title="mean gate")
    for place, objective in enumerate(names):
        top1 = results.spread("ascii", objective, "top1_ink")
        colour = LOOKS[objective][0]
        end.barh(place, top1.mean, color=colour, height=0.65, alpha=0.75)
        end.plot(top1.values, [place] * len(top1.values), "o", color="#000000", ms=4, mfc="white")
        end.text(
            1,
            place,
            f"{top1.mean:.1f}",
            va="center",
            fontsize=9,
            color="#ffffff" if top1.mean > 12 else "#000000",
        )
    end.set_yticks(range(len(names)), names)
    end.invert_yaxis()
    end.set(xlim=(0, 100), title="top-1 on ink, new words, %")
    for axis in (alpha, gate, end):
        styled(axis)
    legend(figure, alpha, 5)
    return figure


def histograms(results: Results) -> Any:
    """p of held-out labels before and after, on a logarithmic scale."""
    parts = [p for p in ("strong-0", "strong-30", "cipher", "cells", "ascii") if p in results.parts()]
    figure = figures.blank(2.7 * len(parts) + 0.6, 3.6)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    edges = np.linspace(0, 1, SHARES + 1)
    for axis, part in zip(axes, parts, strict=True):
        styled(axis)
        before = np.mean(results.measured(part, "nll", "p_before_histogram"), axis=0)
        axis.stairs(before, edges, fill=True, color="#c9d1da", label="before")
        for objective in ("nll", "neg_prob", "cayley", "deft"):
            if objective in results.objectives(part):
                share = np.mean(results.measured(part, objective, "p_histogram"), axis=0)
                colour, line, _ = LOOKS[objective]
                axis.stairs(share, edges, baseline=None, color=colour, ls=line, lw=1.7, label=objective)
        axis.set(yscale="log", xlim=(0, 1), title=part, xlabel="probability p of the label")
    axes[0].set_ylabel("labels, % a twentieth of p")
    legend(figure, axes[0])
    return figure


def learned_and_forgotten(results: Results) -> Any:
    """Mean change of p by alpha before: what got better, what got worse, and the sum."""
    parts = [p for p in ("strong-0", "strong-30", "cipher", "ascii") if p in results.parts()]
    figure = figures.blank(3.3 * len(parts) + 0.6, 3.9)
    axes = figure.subplots(1, len(parts), sharey=True, squeeze=False)[0]
    names = ("nll", "cayley", "deft")
    for axis, part in zip(axes, parts, strict=True):
        styled(axis)
        for number, objective in enumerate(names):
            groups = np.mean(results.measured(part, objective, "change_of_p"), axis=0)
            places = np.arange(len(groups)) + 0.27 * (number - 1)
            colour = LOOKS[objective][0]
            some = groups[:, 2] >= 20  # of fewer tokens nothing can be said
            axis.bar(places[some], groups[some, 3], color=colour, width=0.23, label=objective)
            axis.bar(
                places[some], groups[some, 4], color=colour, width=0.23, alpha=0.55, hatch="///", ec="white"
            )
            axis.plot(places[some], groups[some, 3] + groups[some, 4], "_", color="#ffffff", ms=9, mew=3.6)
            axis.plot(places[some], groups[some, 3] + groups[some, 4], "_", color="#000000", ms=9, mew=1.6)
        axis.axhline(0, color="#000000", lw=0.8)
        axis.set_xticks(range(len(groups)), [f"{low:g}-{high:g}" for low, high in groups[:, :2]])
        axis.set(title=part, xlabel="focus index α before")
    axes[0].set_ylabel("mean change of p")
    legend(figure, axes[0])
    return figure


def gradient_mass(recordings: dict[str, Recording]) -> Any:
    """Where gradients come from before the first step, a row a task."""
    names = ("nll", "cayley", "deft", "neg_prob")
    figure = figures.blank(4.1 * len(names), 3.2 * len(recordings))
    axes = figure.subplots(len(recordings), len(names), squeeze=False)
    for row, (task, recording) in enumerate(recordings.items()):
        for column, name in enumerate(names):
            figures.gradient_mass(recording, axes[row, column], name)
            axes[row, column].set_title(f"{task}: {name}")
    return figure
