"""Write docs/evidence.md and its figures from the records of one run.

    python benchmarks/regimes/evidence.py                          # from benchmarks/results/regimes
    python benchmarks/regimes/evidence.py --records OUT --out OUT  # from a run of one's own: OUT/evidence.md

Records of a second run, with another `--seed`, are compared with the first where they lie beside it, as
records-again.json.

Every figure and verdict is worked out from the records; the sentences between them are what was read from the
records that are committed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import again as repetition
import pictures
import prose
from claims import Claim, of_paper, seen_here
from rates import Rate, moves, rates
from results import Results, spread

from deft_kernels.diagnostics import Recording, figures

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tables import table

ROOT = Path(__file__).resolve().parents[2]
RECORDS = ROOT / "benchmarks" / "results" / "regimes"


def folded(title: str, content: str) -> str:
    return f"<details markdown><summary>{title}</summary>\n\n{content}\n</details>\n"


def by_part(r: Results, measure: str, digits: int, better: Callable[..., float]) -> str:
    """A row a kind of data, a column an objective; the best mean is bold."""
    names = r.head["plan"]["objectives"]
    rows = []
    for part in r.parts():
        found = {o: r.spread(part, o, measure) for o in names if o in r.objectives(r.task_of(part))}
        best = better(x.mean for x in found.values())
        cells = [f"**{x.text(digits)}**" if x.mean == best else x.text(digits) for x in found.values()]
        rows.append([part, *cells])
    return table(["", *names], rows)


def differences(r: Results) -> str:
    rows = []
    names = [o for o in r.head["plan"]["objectives"] if o != "nll"]
    for part in r.parts():
        nll = r.spread(part, "nll", "top1").text(1)
        rows.append([part, nll, *(r.difference(part, o, "top1").text(1, "+") for o in names)])
    return table(["", "nll, top-1 %", *(f"{o} - nll" for o in names)], rows)


def claim_table(found: Iterable[Claim], own: bool = False) -> str:
    rows = [
        [
            c.text,
            c.measured,
            f"**{c.verdict}** ({sum(c.holds)} of {len(c.holds)})",
            *([] if own else ["" if c.verdict == "agrees" else c.doubt]),
        ]
        for c in found
    ]
    header = ["said", "measured", "verdict (seeds)", "where not: likely cause, and what would settle it"]
    return table(header[:3] if own else header, rows)


def remedies(r: Results) -> str:
    names = r.objectives("ascii", remedies=True)
    columns = (
        ("top1_ink", "top-1 on ink, %", 1),
        ("top1", "top-1, %", 1),
        ("exact_lines", "exact lines, %", 1),
        ("exact_words", "exact words, %", 1),
        ("jaro_winkler", "Jaro-Winkler", 3),
        ("nll", "nats", 3),
        ("alpha", "alpha at the end", 2),
    )
    rows = [[o, *(r.spread("ascii", o, name).text(digits) for name, _, digits in columns)] for o in names]
    return table(["", *(title for _, title, _ in columns)], rows)


def art_scores(r: Results) -> str:
    columns = (
        ("top1_ink", "top-1 on ink, %", 1),
        ("exact_lines", "exact lines, %", 1),
        ("exact_words", "exact words, %", 1),
        ("jaro_winkler", "Jaro-Winkler", 3),
    )
    parts = [p for p in r.parts() if "cells" in p or "ascii" in p]
    rows = []
    for part in parts:
        for o in r.objectives(r.task_of(part)):
            rows.append([part, o, *(r.spread(part, o, name).text(digits) for name, _, digits in columns)])
    return table(["", "objective", *(title for _, title, _ in columns)], rows)


def rate_table(found: list[Rate], objectives: list[str]) -> str:
    rows = []
    for task in dict.fromkeys(x.task for x in found):
        own = {x.objective: x for x in found if x.task == task}
        cells = []
        for o in objectives:
            x = own.get(o)
            text = "" if x is None else f"{x.by_top1:g}{'*' if x.edge else ''}, {x.by_nll:g} ({x.gate:.2f})"
            cells.append(text)
        rows.append([task, *cells])
    return table(["", *objectives], rows)


def of_pretraining(r: Results) -> str:
    names = r.head["plan"]["objectives"]
    rows = []
    for task in r.tasks:
        cells = [
            spread([record["pretraining_nll_rise"] for record in r.of(task, o)]).text(2, "+")
            for o in names
            if o in r.objectives(task)
        ]
        rows.append([task, *cells])
    return table(["", *names], rows)


def page(
    r: Results, recordings: dict[str, Recording], images: Path, prefix: str, again: Results | None = None
) -> str:
    """The text; draws its figures into a folder, which the page calls by the prefix."""

    def picture(name: str, figure: Any, alternative: str) -> str:
        figures.save(figure, images / f"evidence-{name}.png")
        return f"![{alternative}]({prefix}evidence-{name}.png)\n"

    head, plan = r.head, r.head["plan"]
    adamw, sgd = rates(r), rates(r, "sgd")
    tau = moves(adamw)
    seeds = f"{plan['seeds']} seeds ({plan['more_seeds']} for cells and mixed)"
    sections = [
        prose.INTRODUCTION.format(
            seeds=seeds,
            device=head["device"],
            torch=head["versions"]["torch"],
            minutes=round(r.core_minutes()),
            commit=head["commit"],
        ),
        "## Top-1 against cross-entropy\n",
        picture(
            "differences", pictures.differences(r), "Difference in top-1 from nll by objective, kinds of data"
        ),
        prose.DIFFERENCES,
        differences(r),
        "## What agrees with the paper, and what does not\n",
        prose.CLAIMS,
        claim_table(of_paper(r)),
        "Beyond the paper:\n",
        claim_table(seen_here(r), own=True),
    ]
    if "ascii" in r.tasks:
        sections += [
            "## Where deft fails: one symbol dominates\n",
            picture(
                "dominated", pictures.dominated(r), "alpha, gate and top-1 on ink for FIGlet as characters"
            ),
            prose.DOMINATED,
            remedies(r),
        ]
    sections += [
        "## alpha and p over training\n",
        picture(
            "training", pictures.over_training(r), "alpha and p of the training labels by task and objective"
        ),
        prose.TRAINING,
        "## What is learned and what is forgotten\n",
        picture(
            "learned", pictures.learned_and_forgotten(r), "Mean change of p by alpha before, three objectives"
        ),
        prose.LEARNED,
        picture("p", pictures.histograms(r), "Histograms of p before and after, by task and objective"),
        prose.HISTOGRAMS,
        "What the fine-tuned models forget of the pre-training text, rise of -log p in nats:\n",
        of_pretraining(r),
        prose.FORGOTTEN,
        "## Loss and calibration\n",
        prose.CALIBRATION,
        "Held-out -log p, nats:\n",
        by_part(r, "nll", 3, min),
        "The same after one temperature, fitted on validation data:\n",
        by_part(r, "nll_with_temperature", 3, min),
        "Expected calibration error, of 1:\n",
        by_part(r, "calibration_error", 3, min),
    ]
    if recordings:
        sections += [
            "## Where gradients come from\n",
            picture(
                "mass",
                pictures.gradient_mass(recordings),
                "Gradient mass over p and entropy, tasks and objectives",
            ),
            prose.MASS,
        ]
    if adamw:
        sections += [
            "## Learning rates\n",
            prose.RATES.format(top1=tau["by_top1"], nll=tau["by_nll"]),
            "AdamW: best by top-1, best by loss (mean gate at the first); * is at the edge of those tried:\n",
            rate_table(adamw, plan["objectives"]),
        ]
    if sgd:
        sections += [prose.SGD.format(top1=moves(sgd)["by_top1"], nll=moves(sgd)["by_nll"]),
                     rate_table(sgd, plan["sgd_objectives"])]  # fmt: skip
    if any(task in r.tasks for task in ("cells", "ascii")):
        sections += [folded("The art, by every measure", art_scores(r))]
    if again is not None:
        sections += [repetition.section(r, again)]
    sections += [
        folded("Top-1 by objective, mean and deviation over seeds", by_part(r, "top1", 1, max)),
        prose.LIMITS,
    ]
    return "\n".join(sections).rstrip() + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--records", type=Path, default=RECORDS, help="folder of records.json and base-*.npz")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of evidence.md")
    args = parser.parse_args()
    path = args.records / "records.json"
    if not path.exists():
        raise SystemExit(f"{path}: not there; `python benchmarks/regimes/run.py {args.records}` makes it")
    shown = ("strong-30", "cipher", "ascii")
    files = {task: args.records / f"base-{task}.npz" for task in shown}
    recordings = {task: Recording.load(file) for task, file in files.items() if file.exists()}
    (args.out / "images").mkdir(parents=True, exist_ok=True)
    again = args.records / "records-again.json"
    second = Results(again) if again.exists() else None
    text = page(Results(path), recordings, args.out / "images", "images/", second)
    (args.out / "evidence.md").write_text(text)
    print(f"wrote {args.out / 'evidence.md'}")


if __name__ == "__main__":
    main()
