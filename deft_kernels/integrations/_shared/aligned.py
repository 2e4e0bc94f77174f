"""Whether a model's labels are aligned with its logits, or one place ahead as a causal model's are."""

from __future__ import annotations

import inspect
from typing import Any


def refuse_aligned(model: Any, call: str) -> None:
    """ValueError for a model whose labels are aligned with its logits, as `call` would shift them."""
    if is_aligned(model):
        raise ValueError(
            f"shift: the labels of {type(bare(model)).__name__} are aligned with its logits, and {call} "
            "would shift them; use deft_kernels.integrations.transformers.apply(trainer, shift=False)"
        )


def is_aligned(model: Any) -> bool:
    """By the loss that transformers gives the model's class, or that its forward makes without a shift."""
    from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

    model = bare(model)
    if is_encoder_decoder(model):
        return True
    kind: Any = getattr(model, "loss_type", None)
    return LOSS_MAPPING.get(kind, ForCausalLMLoss) is not ForCausalLMLoss or _makes_own_loss(model)


def is_encoder_decoder(model: Any) -> bool:
    return bool(getattr(getattr(bare(model), "config", None), "is_encoder_decoder", False))


def bare(model: Any) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _makes_own_loss(model: Any) -> bool:
    """Whether a forward of transformers neither asks for loss_function nor has a name with "shift" in it.

    Those are the decoders of encoder-decoder models (BartForCausalLM), whose loss takes aligned labels. A
    forward from another package is assumed to be a causal model's.
    """
    for parent in type(model).__mro__:
        if "forward" not in vars(parent):
            continue
        code = getattr(inspect.unwrap(vars(parent)["forward"]), "__code__", None)
        if code is None or not parent.__module__.startswith("transformers."):
            return False
        names = (*code.co_names, *code.co_varnames)
        if any(name == "loss_function" or "shift" in name for name in names):
            return False
        if "super" not in names:
            return True
    return False
