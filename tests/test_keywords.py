"""Keywords as other packages name them: the TypeError says which one is meant here."""

from __future__ import annotations

import inspect

import pytest
import torch

import deft_kernels
from deft_kernels import (
    DEFTLoss,
    FusedLinearDEFTLoss,
    deft_loss,
    fused_linear_deft_loss,
    fused_linear_row_statistics,
    gated_loss,
    row_statistics,
)
from deft_kernels.core import keywords
from deft_kernels.core.settings import (
    LossOfHidden,
    LossOfLogits,
    OfAnchor,
    OfBatch,
    OfCaller,
    OfObjective,
    OfRows,
    RowsOfHidden,
)
from deft_kernels.integrations._shared.settings import HiddenKeywords, LogitsKeywords

N, D, V = 4, 5, 7
LOGITS, HIDDEN, HEAD = torch.randn(N, V), torch.randn(N, D), torch.randn(V, D)
LABELS = torch.tensor([0, 3, 6, 2])
LOGP = -torch.rand(N)

CALLS = {
    "deft_loss": lambda **k: deft_loss(LOGITS, LABELS, **k),
    "row_statistics": lambda **k: row_statistics(LOGITS, LABELS, **k),
    "fused_linear_deft_loss": lambda **k: fused_linear_deft_loss(HIDDEN, HEAD, LABELS, **k),
    "fused_linear_row_statistics": lambda **k: fused_linear_row_statistics(HIDDEN, HEAD, LABELS, **k),
    "gated_loss": lambda **k: gated_loss(LOGP, LOGP, **k),
    "DEFTLoss": lambda **k: DEFTLoss(**k),
    "FusedLinearDEFTLoss": lambda **k: FusedLinearDEFTLoss(**k),
}

TABLES = {
    "deft_loss": LossOfLogits,
    "row_statistics": OfRows,
    "fused_linear_deft_loss": LossOfHidden,
    "fused_linear_row_statistics": RowsOfHidden,
}

MEANT = [
    ("deft_loss", "lse_square_scale", "z_loss"),
    ("deft_loss", "logit_softcapping", "softcap"),
    ("deft_loss", "smoothing", "label_smoothing"),
    ("deft_loss", "inplace_backward", "inplace"),
    ("deft_loss", "process_group", "group"),
    ("deft_loss", "ce_weight", "weight"),
    ("deft_loss", "class_weight", "weight"),
    ("deft_loss", "target", "labels"),
    ("deft_loss", "input", "logits"),
    ("deft_loss", "reduce", 'reduction here: "none"'),
    ("deft_loss", "size_average", "reduction"),
    ("deft_loss", "num_items_in_batch", "num_items"),
    ("deft_loss", "alpha", "objectives.tsallis"),
    ("deft_loss", "ref_per_token_logps", "reference_logp"),
    ("deft_loss", "lable_smoothing", "label_smoothing"),
    ("row_statistics", "target", "labels"),
    ("row_statistics", "final_logit_softcapping", "softcap"),
    ("fused_linear_deft_loss", "lse_square_scale", "z_loss"),
    ("fused_linear_deft_loss", "ce_weight", "class_weight"),
    ("fused_linear_deft_loss", "target", "labels"),
    ("fused_linear_deft_loss", "input", "hidden"),
    ("fused_linear_deft_loss", "lin_weight", "weight"),
    ("fused_linear_deft_loss", "chunk_size", "chunk_bytes"),
    ("fused_linear_deft_loss", "inplace", "leave it out"),
    ("gated_loss", "logps", "logp"),
    ("gated_loss", "collision", "log_collision"),
    ("DEFTLoss", "lse_square_scale", "z_loss"),
    ("DEFTLoss", "size_average", "reduction"),
    ("DEFTLoss", "ce_weight", "weight"),
    ("FusedLinearDEFTLoss", "weight", "class_weight"),
    ("FusedLinearDEFTLoss", "smoothing", "label_smoothing"),
]


@pytest.mark.parametrize(("call", "foreign", "meant"), MEANT)
def test_the_error_says_which_is_meant(call, foreign, meant):
    with pytest.raises(TypeError, match=rf"^{foreign}: .*\b{call}\b.*\b{meant}"):
        CALLS[call](**{foreign: 1})


@pytest.mark.parametrize("call", CALLS)
def test_a_name_that_nobody_has_lists_those_there_are(call):
    with pytest.raises(
        TypeError, match=rf"^focus_index: not a keyword of {call}; known: .*(objective|shift)"
    ):
        CALLS[call](focus_index=1)


@pytest.mark.parametrize("name", ["token_weight", "num_items"])
def test_what_belongs_to_the_call_of_a_module(name):
    for module in (DEFTLoss, FusedLinearDEFTLoss):
        with pytest.raises(TypeError, match=f"^{name}: belongs to the call of a {module.__name__}"):
            module(**{name: torch.ones(N)})


def test_in_place_of_a_positional_argument():
    """Not "missing 1 required positional argument", which does not say why."""
    with pytest.raises(TypeError, match="^target: .*labels"):
        deft_loss(LOGITS, target=LABELS)
    with pytest.raises(TypeError, match="^input: .*logits"):
        deft_loss(input=LOGITS, target=LABELS)
    with pytest.raises(TypeError, match="^target: .*labels"):
        DEFTLoss()(LOGITS, target=LABELS)
    with pytest.raises(TypeError, match="^_input: .*FusedLinearDEFTLoss.*hidden"):
        FusedLinearDEFTLoss()(_input=HIDDEN, weight=HEAD, labels=LABELS)


def test_each_name_stands_for_one_thing_and_for_something_that_exists():
    foreign = [name for names in keywords.FAMILIAR.values() for name in names]
    assert len(foreign) == len(set(foreign))
    calls = (deft_loss, fused_linear_deft_loss, fused_linear_row_statistics, gated_loss)
    ours = {name for call in calls for name in inspect.signature(call).parameters}
    for meant in keywords.FAMILIAR:
        assert set(meant) <= ours
    assert keywords.NOTES.keys() <= keywords.MEANT.keys()
    for call in calls:
        own = set(inspect.signature(call).parameters)
        # A keyword that a call has reaches it, whatever others mean by it.
        assert not [name for name in own if name in keywords.OF_OBJECTIVES]


def test_signatures_are_those_that_were_written():
    assert list(inspect.signature(deft_loss).parameters)[:3] == ["logits", "labels", "objective"]
    assert deft_loss.__name__ == "deft_loss" and "arXiv:2602.11424" in deft_loss.__doc__


@pytest.mark.parametrize(
    ("trainers", "whole"), [(LogitsKeywords, LossOfLogits), (HiddenKeywords, LossOfHidden)]
)
def test_a_trainer_takes_every_keyword_that_is_left_to_the_user(trainers, whole):
    # A trainer has no reference model, and so no anchor to one.
    decided = [name for t in (OfObjective, OfBatch, OfCaller, OfAnchor) for name in t.__annotations__]
    assert trainers.__annotations__.keys() == whole.__annotations__.keys() - set(decided)


@pytest.mark.parametrize("call", TABLES)
def test_every_declared_keyword_is_checked(call):
    """One object that no keyword can be: each raises an error that begins with its name."""
    table = TABLES[call]
    for name in [*table.__annotations__, *(["return_stats"] if "objective" in table.__annotations__ else [])]:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: "):
            CALLS[call](**{name: object()})


@pytest.mark.parametrize("call", TABLES)
def test_defaults_are_those_of_the_signature(call):
    """Said out loud, a default changes nothing."""
    kinds = inspect.signature(getattr(deft_kernels, call)).parameters.values()
    said = {p.name: p.default for p in kinds if p.kind is p.KEYWORD_ONLY}
    first, second = CALLS[call](), CALLS[call](**said)
    assert torch.equal(*(x if isinstance(x, torch.Tensor) else x.logp for x in (first, second)))
