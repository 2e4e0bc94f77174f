"""One self-contained HTML page from a recording."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from . import readings
from .recording import Recording

STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
       color: #1a1a1a; background: #ffffff; }
table { border-collapse: collapse; margin: 1rem 0; }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #8888; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 2rem 0; padding: .5rem; background: #ffffff; border-radius: 6px; }
figure img { width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { body { color: #e8e8e8; background: #15181c; } }
"""

ADVICE = {
    "strong": "The model knows much of this text. A label that it finds improbable while it is sure is a "
    "wrong label or a fact that it has yet to learn, and cross-entropy pulls hardest there. The row of "
    "conflicts in the table below says how far each objective takes the gradient off them; try one that "
    "does where labels may be wrong. Where labels are clean, or calibrated probabilities are the point, "
    "nll is the safe choice.",
    "intermediate": "The model knows part of this text. The deformed objectives between the extremes (deft, "
    "cayley, tsallis(0.5)) keep a gradient on what is unknown and damp conflicts. Compare with nll on a "
    "validation set.",
    "weak": "The model knows little of this text, so most labels have a small p. neg_prob and dft, whose "
    "gate is p, give them nearly no gradient and may never begin to learn. Start with nll; deft is close "
    "to it as long as alpha is small.",
    "unknown": "There are no tokens to judge.",
}
CAVEATS = (
    "This is one look at one model, before or during training. Whether an objective wins is a matter of "
    "validation runs, each with a learning rate of its own; none was made here.",
    "The regimes are the paper's (arXiv:2602.11424), which reports a mean alpha near "
    f"{readings.STRONG_START:g} at the start of its strong task and near {readings.WEAK_START:g} at that "
    f"of its weak one. That {readings.STRONG_FROM:g} and {readings.WEAK_TO:g} divide them is a choice of "
    "this page.",
    "Gradient mass is the sum of the norms of the tokens' gradients by the logits, gate · √(S − 2p + 1), "
    "without signs: gradients that cancel, and what the network does with them, are not seen. For "
    "softcapped logits or a temperature other than 1 it is by the logits after both.",
    "neg_prob and dft have the same gradient. The floor of cayley is taken from the rows of one block.",
    "Which labels are wrong is not known here: conflict means improbable under a sure model, nothing more.",
)


def page(recording: Recording, pictures: Sequence[tuple[str, Path, str]], source: Mapping[str, str]) -> str:
    """pictures: (title, PNG with its caption, the caption); source: what is reported on, name by name."""
    alpha = recording.mean("alpha")
    regime = readings.regime(alpha)
    parts = [
        "<h1>What a gate would do to these tokens</h1>",
        _table(("", ""), [(name, value) for name, value in source.items()]),
        "<h2>In short</h2>",
        f"<p>Mean focus index α = Σ p² over {recording.count} tokens: <b>{alpha:.3f}</b>. Mean p of the "
        f"labels: {recording.mean('p'):.3f}; mean −log p: {recording.mean('nll'):.3f} nats; mean entropy: "
        f"{recording.mean('entropy'):.3f} nats.</p>",
        f"<p>Resembles the paper's regime: <b>{regime}</b> (here: strong from a mean alpha of "
        f"{readings.STRONG_FROM:g} on, weak up to {readings.WEAK_TO:g}). {ADVICE[regime]}</p>",
        _warning(recording),
        "<h2>Which tokens the gradient comes from</h2>",
        _shares(recording),
        "<h2>Mean gate</h2>",
        _gates(recording),
    ]
    for title, path, caption in pictures:
        data = base64.b64encode(path.read_bytes()).decode()
        parts.append(
            f"<h2>{escape(title)}</h2>"
            f'<figure><img alt="{escape(caption)}" src="data:image/png;base64,{data}"></figure>'
        )
    caveats = "".join(f"<li>{escape(text)}</li>" for text in CAVEATS)
    parts.append(f"<h2>What is not measured here</h2><ul>{caveats}</ul>")
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>deft-kernels report</title>\n'
        f'<meta name="viewport" content="width=device-width">\n<style>{STYLE}</style>\n{body}\n</html>\n'
    )


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head) if any(head) else ""
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
    return f"<table>{f'<tr>{cells}</tr>' if cells else ''}{rows}</table>"


def _shares(recording: Recording) -> str:
    lines = [
        (kind.name, f"{kind.tokens:.1%}", *(f"{kind.mass[o]:.1%}" for o in recording.objectives))
        for kind in readings.kinds(recording)
    ]
    note = (
        "<p>Share of the tokens, and of the gradient mass under each objective, on tokens of each kind.</p>"
    )
    return note + _table(("tokens", "share", *recording.objectives), lines)


def _gates(recording: Recording) -> str:
    lines = [
        (name, f"{gate:.3f}", f"{spread:.3f}", f"{focus:.3f}", f"{_relative(recording, name):.1%}")
        for name, (gate, spread, focus) in readings.gates(recording).items()
    ]
    head = ("objective", "mean gate", "standard deviation", "mean focus index", "gradient mass, of nll's")
    return _table(head, lines)


def _relative(recording: Recording, name: str) -> float:
    """Gradient mass as a share of that of a gate of 1, which is the closed form without the gate."""
    if "nll" not in recording.objectives:
        return float("nan")
    mass = recording.mass.sum((1, 2, 3))
    whole = mass[recording.number("nll")]
    return float(mass[recording.number(name)] / whole) if whole > 0 else float("nan")


def _warning(recording: Recording) -> str:
    common = readings.commonest_label(recording)
    if common is None or common[1] < readings.DOMINANT:
        return ""
    label, share = common
    return (
        f"<p><b>One label is common:</b> {share:.0%} of the sampled tokens have label {label}. Where one "
        "symbol is that common, a model becomes sure by predicting it, and alpha is high for a reason "
        "that is not knowledge: a gate may then shut out the other labels. Look at the tokens that are "
        "not this one by themselves, and watch mean gate and top-1 on them in training.</p>"
    )
