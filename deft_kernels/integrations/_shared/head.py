"""A causal model taken apart: its backbone, its head, and what happens to the logits before the loss.

The model itself shows it, run with a small random head, so that no list of families is needed.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...dtensors import is_dtensor

OWN_LOGITS = "use set_loss_function(model), which takes the model's own logits"
ROWS, WORDS = 8, 64  # of the test: enough numbers to tell a factor from any other function


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


def softcap_of(model: Any) -> float | None:
    config = model.config
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    cap = getattr(text, "final_logit_softcapping", None)
    return None if cap is None else float(cap)


class _Outputs:
    """A backbone's outputs of which only the hidden states exist."""

    def __init__(self, hidden: Tensor):
        self.last_hidden_state = hidden

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@contextmanager
def _answering(model: Any, call: str, hidden: Tensor) -> Iterator[None]:
    """Inside this context the backbone computes nothing and returns `hidden`. Dropout is on, so that it would
    show."""
    asked = {id(part): part for part in (backbone(model, call), innermost(model, call))}
    before = [(part, vars(part).get("forward")) for part in asked.values()]
    modes = [(module, module.training) for module in model.modules()]
    for part, _ in before:
        part.forward = lambda *args, **kwargs: _Outputs(hidden)
    model.train()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for part, forward in before:
            del part.forward
            if forward is not None:
                part.forward = forward


def logit_transform(model: Any, call: str) -> tuple[float, float | None]:
    """(scale, softcap) with model logits = softcap tanh(scale head(hidden) / softcap); None: no cap.

    Found by running the model's own forward on random hidden states and a small random head, in float64, with
    a backbone that only returns them. Costs no memory and needs no real weights, so it works
    on the meta device as well.
    Raises: ValueError when the logits are any other function of the product.
    """
    head, cap = plain_head(model, call), softcap_of(model)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, ROWS, head.in_features, generator=generator, dtype=torch.float64)
    weight = torch.randn(WORDS, head.in_features, generator=generator, dtype=torch.float64)
    # Logits up to 3.5 times this: large enough for a cap or a clamp to show, small enough to undo the cap.
    spread = 10.0 if cap is None else cap / 2
    weight *= spread / head.in_features**0.5
    probe = {"weight": weight}
    if head.bias is not None:
        probe["bias"] = torch.randn(WORDS, generator=generator, dtype=torch.float64)
    product = nn.functional.linear(hidden, weight, probe.get("bias"))
    of_head = {id(parameter): name for name, parameter in head.named_parameters()}
    replaced = {
        name: probe[of_head[id(parameter)]]
        for name, parameter in model.named_parameters()
        if id(parameter) in of_head
    }
    ids = torch.zeros(1, ROWS, dtype=torch.long)
    try:
        with torch.no_grad(), _answering(model, call, hidden):
            outputs = torch.func.functional_call(model, replaced, (), {"input_ids": ids, "use_cache": False})
        logits = outputs.logits.double()
        known = logits.shape == product.shape
    except Exception as error:
        raise ValueError(
            f"model: {call} could not find out what {type(model).__name__} does to its logits; {OWN_LOGITS}"
        ) from error
    if known:
        raw = logits if cap is None else cap * torch.atanh(logits / cap)
        scale = float((raw * product).sum() / product.square().sum())
        known = scale > 0 and float((raw - scale * product).abs().max()) < 1e-4 * scale * float(product.max())
    if not known:
        raise ValueError(
            f"model: {type(model).__name__} does more to its logits than {call} can repeat (a factor and "
            f"final_logit_softcapping); {OWN_LOGITS}"
        )
    return (1.0 if abs(scale - 1.0) < 1e-6 else scale), cap
