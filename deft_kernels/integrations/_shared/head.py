"""A causal model taken apart: its backbone and its head."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ...dtensors import is_dtensor

OWN_LOGITS = "use set_loss_function(model), which takes the model's own logits"


def bare(model: Any, call: str) -> Any:
    """The transformers model behind a PEFT wrapper; TypeError for what is neither."""
    dynamo = sys.modules.get("torch._dynamo")  # without which nothing is compiled
    if dynamo is not None and isinstance(model, dynamo.OptimizedModule):
        raise TypeError(f"model: {call} comes before torch.compile; pass the model that was compiled")
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    if not (hasattr(model, "get_output_embeddings") and hasattr(model, "base_model")):
        raise TypeError(
            f"model: {call} expects a transformers model or a PEFT model around one, before it is wrapped "
            f"for distributed training, got {type(model).__name__}"
        )
    return model


def backbone(model: Any, call: str) -> nn.Module:
    """The module that makes the hidden states: `base_model`, or `model` if a class has no prefix of its
    own."""
    for part in (model.base_model, getattr(model, "model", None)):
        if isinstance(part, nn.Module) and part is not model:
            return part
    raise ValueError(
        f"model: {type(model).__name__} has no backbone apart from its head, as {call} needs; use "
        "transformers.apply(trainer)"
    )


def innermost(model: Any, call: str) -> nn.Module:
    """The module that every forward runs: the decoder. OPT's forward calls it directly, without the backbone
    around it."""
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    return decoder if isinstance(decoder, nn.Module) and decoder is not model else backbone(model, call)


def refuse_adapter(head: Any, call: str) -> None:
    """ValueError for a head that is a matrix and an adapter."""
    if hasattr(head, "base_layer"):
        raise ValueError(
            f"lm_head: carries an adapter ({type(head).__module__}.{type(head).__name__}), which {call} "
            "would leave out, as it multiplies by lm_head.weight: remove 'lm_head' from target_modules, or "
            + OWN_LOGITS
        )


def plain_head(model: Any, call: str) -> nn.Linear:
    """The output embeddings, if they are a matrix and nothing else; otherwise ValueError, with what to do."""
    head = model.get_output_embeddings()
    if head is None:
        raise ValueError(
            f"model: {type(model).__name__} has no output embeddings, as {call} needs, so it is no language "
            "model or keeps its head elsewhere; use transformers.apply(trainer)"
        )
    if hasattr(head, "modules_to_save") and not head.disable_adapters:
        # PEFT keeps the original head next to the copy that is trained and used.
        (active,) = head.active_adapters
        head = head.modules_to_save[active]
    refuse_adapter(head, call)
    own_forward = (
        "forward" in vars(head)
        or hasattr(head, "parametrizations")
        or type(head).forward is not nn.Linear.forward
    )
    ranks = getattr(model, "tp_size", None) or 1
    if ranks > 1 and (own_forward or is_dtensor(head.weight)):
        raise ValueError(
            f"lm_head: is under tensor parallelism, transformers' tp_plan splits it over {ranks} ranks, and "
            f"{call} multiplies by a whole weight; {OWN_LOGITS} gathered, or fused_linear_deft_loss(group=) "
            "in a loop of your own"
        )
    if not isinstance(head, nn.Linear) or own_forward:
        raise ValueError(
            f"lm_head: {call} needs a plain nn.Linear, got {type(head).__name__} with a forward of its own; "
            + OWN_LOGITS
        )
    if hasattr(head.weight, "ds_id"):
        raise ValueError(
            f"lm_head: its weight is partitioned by DeepSpeed ZeRO-3, which {call} cannot "
            f"gather; {OWN_LOGITS}"
        )
    return head


def with_weights(
    head: nn.Linear, hidden: Tensor, make: Callable[[Tensor, Tensor, Tensor | None], Any]
) -> Any:
    """make(hidden, weight, bias) of a head, inside the head's own call if it is an FSDP2 group of its own.

    Outside of its call its parameters are shards, and their gradient would not follow FSDP's settings: by
    what to divide it, when to reduce it, in which dtype to compute. FSDP's hooks around the head's call do
    this, as for the head's own forward. `make` returns a loss, or a tuple that begins with it.
    """
    if not is_fully_sharded(head):
        return make(hidden, head.weight, head.bias)
    made: list[Any] = []

    def forward(hidden: Tensor) -> Any:
        made.append(make(hidden, head.weight, head.bias))
        # FSDP attaches its backward to what this returns, and casts a copy of it to its output dtype.
        return made[0][0] if isinstance(made[0], tuple) else made[0]

    setattr(head, "forward", forward)  # noqa: B010
    try:
        head(hidden)
    finally:
        delattr(head, "forward")
    return made[0]


def is_fully_sharded(module: nn.Module) -> bool:
    """Whether `fully_shard` made a module a group of its own, or a part of a group with others."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return fsdp is not None and isinstance(module, fsdp.FSDPModule)
