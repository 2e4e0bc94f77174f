"""Cases to draw: every keyword beside every other, as far as a call accepts them together."""

from __future__ import annotations

import math

import torch
from cases import KINDS, LAYOUTS, WRITABLE, Case
from hypothesis import strategies as st

from deft_kernels import objectives
from deft_kernels.objectives import Objective

# Every third row or so is of the kinds whose loss may be infinite or NaN.
SOUND = KINDS[:-3]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    """A thousand of them, the ends among them, in few digits."""
    return st.integers(0, 1000).map(lambda step: round(low + (high - low) * step / 1000, 6))


def sometimes(value: st.SearchStrategy, otherwise: object, one_in: int = 3) -> st.SearchStrategy:
    """`value` once in `one_in`: an option that is always on would hide what the others do alone."""
    return st.integers(1, one_in).flatmap(lambda turn: value if turn == one_in else st.just(otherwise))


@st.composite
def described(draw: st.DrawFn) -> Objective:
    """Any objective of the table with random parameters; one in five with a band on p."""
    eps = st.sampled_from([0.0, 0.0, 1e-8, 1e-6, 1e-2])
    alpha = st.one_of(st.sampled_from([0.0, 1e-6, 0.5, 1.0]), numbers(0.0, 4.0))
    made = draw(
        st.one_of(
            st.just(objectives.nll()),
            st.just(objectives.neg_prob()),
            st.builds(objectives.tsallis, alpha),
            st.builds(
                objectives.deft, st.sampled_from([1, 2, math.inf]), detach=st.booleans(), eps=eps
            ),
            st.builds(
                objectives.cayley,
                detach=st.booleans(),
                eps=eps,
                mean_prob=st.one_of(st.none(), numbers(0.0, 1.0)),
            ),
            st.builds(
                objectives.rational, st.one_of(st.just("collision"), alpha), detach=st.booleans()
            ),
            st.builds(objectives.dft, detach=st.booleans()),
            # A power below 1 has no derivative where the entropy is 0, which a masked row's may be.
            st.builds(objectives.eaft, numbers(0.5, 3.0), top_k=numbers(1.5, 1000.0)),
            st.builds(objectives.eaft, numbers(1.0, 3.0), top_k=numbers(1.5, 1000.0), detach=st.just(False)),
        )
    )
    if draw(st.integers(0, 4)) == 4:
        low, high = sorted((draw(numbers(0.0, 1.0)), draw(numbers(0.0, 1.0))))
        made = made.within(draw(st.sampled_from([(low, 1.0), (0.0, high), (low, high)])))
    return made


def shapes(most: int) -> st.SearchStrategy[tuple[int, ...]]:
    """Of labels: a scalar, up to three dimensions, any of them empty."""
    return st.one_of(
        st.tuples(st.integers(1, most)),
        st.just(()),
        st.tuples(st.integers(0, 3), st.integers(0, 5)),
        st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    )


@st.composite
def cases(
    draw: st.DrawFn, *, dtypes: tuple[torch.dtype, ...] = DTYPES, wide: int = 1200, sound: bool = False
) -> Case:
    """sound: no row whose loss is NaN or infinite, no band, for laws that compare two calls."""
    shape = draw(shapes(7))
    objective = draw(described())
    reduction = draw(st.sampled_from(["none", "mean", "sum"]))
    items = draw(sometimes(numbers(0.5, 50.0), None)) if reduction == "mean" else None
    waits = objective.needs_batch or (objective.has_band and reduction == "mean" and items is None)
    in_forward = st.sampled_from([None, False] if reduction == "none" or waits else [None, False, True])
    inplace = draw(sometimes(st.just(True), False))
    vocabulary = draw(st.one_of(st.integers(1, 40), st.integers(1, 40), st.integers(41, wide)))
    labels = [torch.int64, torch.int32, torch.int16] + ([torch.int8] if vocabulary < 100 else [])
    ignore = draw(st.sampled_from([-100, -100, -1, 0, vocabulary // 2, vocabulary, 127]))
    kinds = SOUND if sound else draw(st.sampled_from([SOUND, SOUND, KINDS]))
    if objective.focus == "entropy" and objective.power < 1:
        # It magnifies the rounding of an entropy near 0, of the oracle's 1e-16 too.
        kinds = ("plain", "uniform", "shifted", "lowered")
    return Case(
        shape=shape,
        vocabulary=vocabulary,
        dtype=draw(st.sampled_from(dtypes)),
        layout=draw(st.sampled_from(WRITABLE if inplace else LAYOUTS)),
        kinds=tuple(draw(st.lists(st.sampled_from(kinds), min_size=1, max_size=4))),
        seed=draw(st.integers(0, 2**16)),
        objective=objective,
        reduction=reduction,
        ignored=draw(st.sampled_from([0.0, 0.0, 0.3, 0.7, 1.0])),
        ignore_index=ignore,
        label_dtype=draw(st.sampled_from(labels)) if -128 <= ignore < 128 else torch.int64,
        token_weight=draw(sometimes(st.sampled_from(["positive", "zeros", "signed", "bool"]), None)),
        class_weight=draw(sometimes(st.sampled_from(["positive", "zeros", "large"]), None)),
        num_items=items,
        tensor_items=draw(st.booleans()),
        shift=draw(sometimes(st.just(True), False)) and shape != (),
        softcap=draw(sometimes(numbers(0.5, 60.0), None)),
        temperature=draw(sometimes(numbers(0.25, 4.0), 1.0)),
        z_loss=draw(sometimes(numbers(1e-5, 0.1), 0.0)),
        label_smoothing=draw(sometimes(numbers(0.01, 1.0), 0.0)),
        inplace=inplace,
        grad_in_forward=draw(in_forward),
        upstream=draw(
            st.one_of(st.just(1.0), st.sampled_from([-1.0, 0.0, 0.5, 1e-6, 65536.0]), numbers(-100.0, 100.0))
        ),
        block=draw(st.integers(1, 4)),
    )
