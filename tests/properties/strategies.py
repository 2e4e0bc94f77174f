"""Cases to draw: every keyword beside every other, as far as a call accepts them together.

Each field is drawn on its own, from a strategy made once; `accepted` then takes out what a call would refuse.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from cases import KINDS, LAYOUTS, WRITABLE, Case
from hypothesis import strategies as st

from deft_kernels import objectives
from deft_kernels.objectives import Objective

# Without the kinds whose loss may be infinite or NaN.
SOUND = KINDS[:-3]
# On which an entropy is not near 0.
SPREAD = ("plain", "uniform", "shifted", "lowered")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """A thousand of them, the ends among them, in few digits."""
    return st.integers(0, 1000).map(lambda step: round(low + (high - low) * step / 1000, 6))


def sometimes(value: st.SearchStrategy[Any], otherwise: object, one_in: int = 3) -> st.SearchStrategy[Any]:
    """`value` once in `one_in`: an option that is always on would hide what the others do alone."""
    return st.one_of(*[st.just(otherwise)] * (one_in - 1), value)


ALPHA = st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 1.0]), numbers(0.0, 4.0))
EPS = st.sampled_from([0.0, 0.0, 1e-8, 1e-6, 1e-2])
SHARE = numbers(0.0, 1.0)
PLAIN = st.one_of(
    st.just(objectives.nll()),
    st.just(objectives.neg_prob()),
    st.builds(objectives.tsallis, ALPHA),
    st.builds(objectives.deft, st.sampled_from([1, 2, math.inf]), detach=st.booleans(), eps=EPS),
    st.builds(objectives.cayley, detach=st.booleans(), eps=EPS, mean_prob=st.one_of(st.none(), SHARE)),
    st.builds(objectives.rational, st.one_of(st.just("collision"), ALPHA), detach=st.booleans()),
    st.builds(objectives.dft, detach=st.booleans()),
    # A power below 1 has no derivative where the entropy is 0, which a masked row's may be.
    st.builds(objectives.eaft, numbers(0.5, 3.0), top_k=numbers(1.5, 1000.0)),
    st.builds(objectives.eaft, numbers(1.0, 3.0), top_k=numbers(1.5, 1000.0), detach=st.just(False)),
)


def banded(objective: Objective, ends: tuple[float, float, int]) -> Objective:
    low, high = sorted(ends[:2])
    return objective.within([(low, 1.0), (0.0, high), (low, high)][ends[2]])


# Any objective of the table with random parameters; one in five with a band on p.
OBJECTIVES = sometimes(st.builds(banded, PLAIN, st.tuples(SHARE, SHARE, st.integers(0, 2))), None, 5)
OBJECTIVES = st.builds(lambda banded, plain: banded or plain, OBJECTIVES, PLAIN)

# Of labels: a scalar, up to three dimensions, any of them empty.
SHAPES = st.one_of(
    st.tuples(st.integers(1, 7)),
    st.just(()),
    st.tuples(st.integers(0, 3), st.integers(0, 5)),
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "shape": SHAPES,
    "layout": st.sampled_from(LAYOUTS),
    "seed": st.integers(0, 2**16),
    "objective": OBJECTIVES,
    "reduction": st.sampled_from(["none", "mean", "sum"]),
    "ignored": st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0]),
    "ignore_index": st.sampled_from([-100, -100, -1, 0, 1, 7, 127, 10**9]),
    "label_dtype": st.sampled_from([torch.int64, torch.int64, torch.int32, torch.int16, torch.int8]),
    "token_weight": sometimes(st.sampled_from(["positive", "zeros", "signed", "bool"]), None),
    "class_weight": sometimes(st.sampled_from(["positive", "zeros", "large"]), None),
    "num_items": sometimes(numbers(0.5, 50.0), None),
    "tensor_items": st.booleans(),
    "shift": sometimes(st.just(True), False),
    "softcap": sometimes(numbers(0.5, 60.0), None),
    "temperature": sometimes(numbers(0.25, 4.0), 1.0),
    "z_loss": sometimes(numbers(0.0, 0.1), 0.0),
    "label_smoothing": sometimes(SHARE, 0.0),
    "alpha": sometimes(st.sampled_from(["number", "rows", "rows"]), None, 5),
    "anchor": sometimes(numbers(0.001, 1.0), 0.0, 5),
    "inplace": sometimes(st.just(True), False),
    "grad_in_forward": st.sampled_from([None, False, True]),
    "upstream": st.one_of(
        st.just(1.0), st.sampled_from([-1.0, 0.0, 0.5, 1e-6, 65536.0]), numbers(-100.0, 100.0)
    ),
    "block": st.integers(1, 4),
}


def cases(
    *, dtypes: tuple[torch.dtype, ...] = DTYPES, wide: int = 1200, sound: bool = False
) -> st.SearchStrategy[Case]:
    """sound: no row whose loss is NaN or infinite, for laws that compare two calls."""
    kinds = [SOUND] if sound else [SOUND, SOUND, KINDS]
    return st.builds(
        partial(accepted, Case),
        dtype=st.sampled_from(dtypes),
        vocabulary=st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(41, wide)),
        kinds=st.one_of(*(st.lists(st.sampled_from(k), min_size=1, max_size=4).map(tuple) for k in kinds)),
        **FIELDS,
    )


def accepted(make: type[Case], **fields: Any) -> Case:
    """A case without what a call would refuse, one field giving way to another."""
    case = make(**fields)
    if case.alpha is not None:
        case = replace(
            case, objective=replace(objectives.nll(), low=case.objective.low, high=case.objective.high)
        )
    changes: dict[str, Any] = {}
    items = case.num_items if case.reduction == "mean" else None
    changes["num_items"] = items
    waits = case.objective.has_band and case.reduction == "mean" and items is None
    if case.grad_in_forward and (case.reduction == "none" or case.objective.needs_batch or waits):
        changes["grad_in_forward"] = None
    if case.inplace and case.layout not in WRITABLE:
        changes["layout"] = WRITABLE[LAYOUTS.index(case.layout) % len(WRITABLE)]
    if case.shape == ():
        changes["shift"] = False
    largest = max(case.vocabulary - 1, abs(case.ignore_index))
    if largest > torch.iinfo(case.label_dtype).max:
        changes["label_dtype"] = torch.int64
    if case.objective.focus == "entropy" and case.objective.power < 1:
        # It magnifies the rounding of an entropy near 0, of the oracle's 1e-16 too.
        changes["kinds"] = tuple(kind if kind in SPREAD else "plain" for kind in case.kinds)
    elif case.anchor > 0:
        # e^D of a target that is all but impossible is beyond fp32, or its digits are those of log p.
        changes["kinds"] = tuple(kind if kind in SOUND and kind != "wild" else "plain" for kind in case.kinds)
    return replace(case, **changes)
