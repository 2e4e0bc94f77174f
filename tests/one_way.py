"""Branches of the kernels that some specialisation takes one way only in the tests, each with its reason.

Every specialisation has blocks of its own, and the calls that compile it have rows of one kind or two: the
whole suite runs about four blocks of five. Each other block lies behind a branch that ran and always went one
way (`ptx.coverage`). The branch is listed here by its source line. The whole suite fails where a block lies
behind a branch that is not listed, and where a listed one went both ways in no specialisation at all.
"""

from __future__ import annotations

import linecache
from collections.abc import Iterator
from pathlib import Path

from ptx.coverage import Coverage

TURNS = "a loop over columns, or its rest: the rows of these calls have no whole turn, or nothing beyond it"
COUNTED = "all rows of these calls count, or none does, or a part of the vocabulary has another rank's rows"
UPSTREAM = (
    "the gradient stands for an upstream of 1, which is that of these calls, so that no row is done again"
)
TIES = "the rows of these calls have their largest logit in one lane alone, or in the first tile"
ORDINARY = "Triton's logarithm tells denormal arguments apart, which the rows of these calls do not have"

LOG = "return tl.where(ordinary, n * LN2 + twice_artanh((m - 1.0) / (m + 1.0)), tl.log(x))"
# (file, line): reason
LISTED = {
    ("arithmetic.py", LOG): ORDINARY,
    ("objectives.py", "weight = tl.exp2(power * tl.log2(entropy * scale))"): ORDINARY,
    ("kernels.py", "if label != ignore_index:"): COUNTED,
    ("kernels.py", "if kept != 0.0:"): COUNTED,
    ("gradient_kernels.py", "if load_field(saved, row, FIELD.value.kept) != 0.0:"): COUNTED,
    ("gradient_kernels.py", "while row < stop:"): UPSTREAM,
    ("predicted.py", "if other < LANES:"): TIES,
    ("predicted.py", "while (other < LANES) & (taken >= settled):"): TIES,
    ("predicted.py", "while first < body.stop:"): TIES,
    ("state.py", "while first + TURN * TILE <= last:"): TURNS,
    ("state.py", "if first + 4 * TILE < last:"): TURNS,
    ("state.py", "if first < last:"): TURNS,
    ("state.py", "while first < last:"): TURNS,
    ("state.py", "while first < body.stop:"): TURNS,
    ("gradient.py", "while first + 4 * TILE <= last:"): TURNS,
    ("gradient.py", "while first + 2 * TILE <= last:"): TURNS,
    ("gradient.py", "while first < last:"): TURNS,
}  # fmt: skip


def not_accounted_for(coverage: Coverage, kernels: Path) -> Iterator[str]:
    """Branches that keep blocks from running, but for those that are listed and went both ways somewhere.
    kernels: the folder of the source. Those from elsewhere, which tests bring along, are not asked about."""
    both = coverage.both_ways()
    for (kernel, place), blocks in sorted(coverage.one_way().items()):
        file, _, number = place.partition(":")
        if number and not (kernels / file).is_file():
            continue
        text = linecache.getline(str(kernels / file), int(number)).strip() if number else ""
        if (file, text) not in LISTED:
            yield f"{kernel}, {place}: {text} ({blocks} blocks behind a branch that is not in one_way.py)"
        elif place not in both:
            yield f"{kernel}, {place}: {text} ({blocks} blocks behind a branch that went one way everywhere)"
