"""Keywords as other packages name them, given to a trainer's hook."""

from __future__ import annotations

import inspect

import pytest
from tiny import llama

from deft_kernels import objectives
from deft_kernels.core.settings import DEFAULTS
from deft_kernels.integrations import liger, megatron, trl
from deft_kernels.integrations._shared.settings import HiddenKeywords, LogitsKeywords
from deft_kernels.integrations.transformers import (
    ComputeLoss,
    ForCausalLM,
    apply,
    patch_model,
    set_loss_function,
)

HOOKS = {
    "ComputeLoss": lambda *o, **k: ComputeLoss(*o, **k),
    "ForCausalLM": lambda *o, **k: ForCausalLM(*o, **k),
    "set_loss_function": lambda *o, **k: set_loss_function(llama(), *o, **k),
    "patch_model": lambda *o, **k: patch_model(llama(), *o, **k),
}


@pytest.mark.parametrize("hook", HOOKS)
def test_the_error_says_which_is_meant(hook):
    for foreign, meant in (
        ("lse_square_scale", "z_loss"),
        ("label_smoothing_factor", "label_smoothing"),
        ("ce_weight", "class_weight" if hook == "patch_model" else "weight"),
        ("alpha", "objectives.tsallis"),
    ):
        with pytest.raises(TypeError, match=rf"^{foreign}: not a keyword of .*\b{meant}\b.*; known: "):
            HOOKS[hook](**{foreign: 0.1})


@pytest.mark.parametrize("hook", HOOKS)
def test_an_objective_that_was_not_called(hook):
    with pytest.raises(TypeError, match=r"^objective: .*objectives\.deft\(\.\.\.\)"):
        HOOKS[hook](objectives.deft)


@pytest.mark.parametrize(
    ("call", "table"),
    [
        *((call, LogitsKeywords) for call in (ComputeLoss, ForCausalLM, set_loss_function, apply, trl.apply)),
        (patch_model, HiddenKeywords),
        (liger.install, liger.Keywords),
        (megatron.install, megatron.Keywords),
    ],
)
def test_the_signature_shows_every_keyword_and_its_default(call, table):
    shown = inspect.signature(call).parameters
    assert not [p for p in shown.values() if p.kind is p.VAR_KEYWORD]
    for name in table.__annotations__:
        assert shown[name].default == DEFAULTS[name] and shown[name].kind is inspect.Parameter.KEYWORD_ONLY
