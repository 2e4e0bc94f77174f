"""What a causal model does with its hidden states, asked of the model itself, so that no list of families is
needed: its own forward runs, with a backbone that only returns them and a head that costs nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .aligned import bare
from .head import OWN_LOGITS, backbone, innermost, plain_head

ROWS, WORDS = 8, 64  # of the test: enough numbers to tell a factor from any other function


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
    try:
        logits = _outputs(model, call, hidden, probe).logits.double()
        known = logits.shape == product.shape
    except Exception as error:
        raise ValueError(
            f"model: {call} could not find out what {type(model).__name__} does to its logits; {OWN_LOGITS}"
        ) from error
    if known:
        raw = logits if cap is None else cap * torch.atanh(logits / cap)
        scale = float((raw * product).sum() / product.square().sum())
        known = scale > 0 and float((raw - scale * product).abs().max()) < 1e-4 * scale * float(product.max())
    if not known or _columns(model, call) != head.out_features:
        raise ValueError(
            f"model: {type(model).__name__} does more to its logits than {call} can repeat (a factor and "
            f"final_logit_softcapping); {OWN_LOGITS}"
        )
    return (1.0 if abs(scale - 1.0) < 1e-6 else scale), cap


def _outputs(model: Any, call: str, hidden: Tensor, of_head: dict[str, Tensor], **inputs: Any) -> Any:
    """Of a forward with these hidden states, [1, ROWS, D], and these parameters of the head."""
    names = {id(parameter): name for name, parameter in plain_head(model, call).named_parameters()}
    replaced = {
        name: of_head[names[id(parameter)]]
        for name, parameter in model.named_parameters()
        if id(parameter) in names
    }
    ids = torch.zeros(1, ROWS, dtype=torch.long, device=hidden.device)
    inputs = {"input_ids": ids, "use_cache": False, **inputs}
    with torch.no_grad(), _answering(model, call, hidden):
        return torch.func.functional_call(model, replaced, (), inputs)


def _columns(model: Any, call: str) -> int:
    """How many logits a row has with the head as large as it is, whose padding a model may cut off.

    On the meta device, as such a head may be large.
    """
    head = plain_head(model, call)
    hidden = torch.empty(1, ROWS, head.in_features, device="meta")
    sizes = {name: torch.empty(parameter.shape, device="meta") for name, parameter in head.named_parameters()}
    try:
        return int(_outputs(model, call, hidden, sizes).logits.shape[-1])
    except Exception:  # a forward that looks at its numbers
        return head.out_features


def refuse_own_terms(model: Any, call: str) -> None:
    """ValueError for a forward that adds to its loss_function's loss, where `call` takes only the logits."""
    model = bare(model)
    found = of_loss(model, call)
    if found is not None and found.added != 0:
        raise ValueError(
            f"model: {type(model).__name__} adds a term to its loss, as Bamba its z_loss_coefficient, which "
            f"{call} would leave out; use set_loss_function(model), with which the model adds it, or set its "
            "factor to 0"
        )


class OfLoss(NamedTuple):
    """What a forward does around its `loss_function`.

    items: whether a number of items that is given to the forward comes there.  added: to a loss of 0.
    """

    items: bool
    added: float


def of_loss(model: Any, call: str) -> OfLoss | None:
    """None for a model that cannot be asked, or has no `loss_function`."""
    asked: list[dict[str, Any]] = []

    def loss_function(*args: Any, **keywords: Any) -> Tensor:
        asked.append(keywords)
        return torch.zeros(())

    before = vars(model).get("_loss_function")
    try:
        head = plain_head(model, call)
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, ROWS, head.in_features, generator=generator)
        probe = {"weight": torch.randn(WORDS, head.in_features, generator=generator)}
        if head.bias is not None:
            probe["bias"] = torch.zeros(WORDS)
        labels = torch.zeros(1, ROWS, dtype=torch.long)
        model.loss_function = loss_function
        loss = _outputs(model, call, hidden, probe, labels=labels, num_items_in_batch=torch.tensor(ROWS)).loss
        return OfLoss("num_items_in_batch" in asked[0], float(loss))
    except Exception:
        return None
    finally:
        vars(model).pop("_loss_function", None)
        if before is not None:
            model.loss_function = before
