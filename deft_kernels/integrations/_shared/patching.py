"""A model's own forward changed: its loss function, or everything from the hidden states on."""

from __future__ import annotations

import copy
import inspect
import pickle
import types
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ...core.keywords import showing
from ...core.statistics import RowLoss
from ...linear import fused_linear_deft_loss
from ...objectives import Objective
from . import head as heads
from . import probe
from .aligned import refuse_aligned
from .columns import AMONG_PIECES, Columns, checked_columns
from .logits import ForCausalLM
from .proof import Calls
from .running import RunningStatistics
from .settings import HiddenKeywords, LogitsKeywords, checked, counted, denominator, described, recorder
from .watch import Watch

RECORD, BEFORE = "_deft_kernels", "_deft_kernels_before"


class Before:
    """Attributes of a model as they were, to be put back."""

    def __init__(self, model: Any, *names: str):
        self.names = names
        self.values = {name: vars(model)[name] for name in names if name in vars(model)}

    def restore(self, model: Any) -> None:
        for name in self.names:
            vars(model).pop(name, None)
        vars(model).update(self.values)


def _takes_items(model: Any) -> None:
    """So that a Trainer counts the items of a whole step, though the model's own is each batch's mean."""
    if getattr(model, "accepts_loss_kwargs", None) is False:
        model.accepts_loss_kwargs = True


@showing(LogitsKeywords)
def set_loss_function(
    model: Any,
    objective: str | Objective | RowLoss = "deft",
    *,
    statistics: RunningStatistics | None = None,
    columns: Columns | None = None,
    shift: bool = True,
    **keywords: Unpack[LogitsKeywords],
) -> None:
    """model.loss_function = ForCausalLM(objective, ...), and an error if a training step does not use it.

    Args: model: a transformers model, or a PEFT model around one, before it is wrapped or compiled; the
        others as in `ComputeLoss`. Used in evaluation too, so eval_loss is gated.
    Raises: TypeError for another model; ValueError for one that has been given a loss already. In the first
        training step that does not come to the loss (Liger's fused flag, TRL >= 1.15, labels taken out of the
        forward): RuntimeError with what to do, before any parameter changes; with a frozen backbone or under
        torch.compile in the second step.
    Memory: the model's logits, whole; as `deft_loss`.
    """
    loss = ForCausalLM(objective, statistics=statistics, columns=columns, shift=shift, **keywords)
    bare = heads.bare(model, "set_loss_function")
    _unpatched(bare)
    if loss.shift:
        refuse_aligned(bare, "set_loss_function")
    loss.watch = Watch(heads.innermost(bare, "set_loss_function"), "set_loss_function")
    found = probe.of_loss(bare, "set_loss_function")
    before = Before(bare, "_loss_function", "loss_type", "accepts_loss_kwargs")
    if found is not None and found.items:
        _takes_items(bare)
    if not loss.shift:
        # By which a Trainer finds that it is to count labels[..., 1:].
        bare.loss_type = "aligned"
    bare.loss_function = loss
    setattr(bare, RECORD, loss)
    setattr(bare, BEFORE, before)


def _unpatched(model: Any) -> None:
    if RECORD in vars(model):
        raise ValueError("model: has a gated loss already; call unpatch_model(model) first")


class _OfHidden:
    """`fused_linear_deft_loss` on a model's hidden states; what a patched forward needs to know."""

    def __init__(self, model: Any, objective: Any, statistics: Any, columns: Any, keywords: HiddenKeywords):
        self.objective = described(objective)
        self.statistics = recorder(statistics)
        self.columns = checked_columns(columns, self.statistics)
        self.calls = Calls() if self.statistics is None else self.statistics.calls
        self.keywords = checked("patch_model", HiddenKeywords, keywords)
        self.scale, self.softcap = probe.logit_transform(model, "patch_model")
        parameters = list(inspect.signature(type(model).forward).parameters.values())[1:]
        self.names = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        self.watch = Watch(heads.innermost(model, "patch_model"), "patch_model")

    def __deepcopy__(self, memo: dict[int, Any]) -> _OfHidden:
        copied = memo[id(self)] = object.__new__(type(self))
        vars(copied).update(copy.deepcopy(vars(self), memo))
        return copied

    def __reduce__(self) -> Any:
        # A pickle finds an instance's forward by its name, which is the class's own when it is read back:
        # the loaded model would train plain cross-entropy.
        raise pickle.PicklingError(
            "model: patch_model's forward does not survive torch.save(model), pickle or a spawned process: "
            "save model.state_dict() or save_pretrained(), or call unpatch_model(model) before and "
            "patch_model again after it was loaded"
        )

    def __call__(self, model: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        call = dict(zip(self.names, args, strict=False)) | keywords
        labels, aligned = call.pop("labels", None), call.pop("shift_labels", None)
        num_items = call.pop("num_items_in_batch", None)
        ignore_index = call.pop("ignore_index", -100)
        _refuse(model, call, labels is None and aligned is None)
        with self.watch.unless_it_raises():
            return self._loss(model, call, labels, aligned, num_items, ignore_index)

    def _loss(
        self, model: Any, call: dict[str, Any], labels: Any, aligned: Any, num_items: Any, ignore_index: int
    ) -> Any:
        from transformers.modeling_outputs import CausalLMOutputWithPast

        outputs = heads.backbone(model, "patch_model")(**call)
        head = heads.plain_head(model, "patch_model")
        hidden = outputs.last_hidden_state.to(head.weight.device)
        shift = aligned is None
        target = (labels if shift else aligned).to(hidden.device)
        settings: dict[str, Any] = {"objective": self.objective, "shift": shift, **self.keywords}
        settings |= {"logit_scale": self.scale, "softcap": self.softcap}
        settings |= {"num_items": denominator(num_items, hidden), "ignore_index": ignore_index}
        if settings.get("class_weight") is not None:
            settings["class_weight"] = settings["class_weight"].to(hidden.device)
        settings["return_stats"] = self.statistics is not None
        channel = None
        if self.columns is not None:
            channel, settings["token_weight"] = self._columns_of(target, shift)

        def make(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Any:
            return fused_linear_deft_loss(hidden, weight, target, bias, **settings)

        made = heads.with_weights(head, hidden, make)
        if self.statistics is None:
            loss = made
        else:
            loss, stats = made
            self.statistics.add(stats, counted(target, shift, settings["ignore_index"]), channel)
        self.calls.note(loss, own_mean=num_items is None)
        self.watch.seen(loss)
        others = ("past_key_values", "hidden_states", "attentions")
        return CausalLMOutputWithPast(loss=loss, **{name: getattr(outputs, name, None) for name in others})

    def _columns_of(self, labels: Tensor, shift: bool) -> tuple[Tensor | None, Tensor | None]:
        if not shift:
            raise ValueError(AMONG_PIECES)
        assert self.columns is not None
        return self.columns.of(labels, shift)


def _refuse(model: Any, call: dict[str, Any], no_labels: bool) -> None:
    if no_labels:
        raise ValueError(
            "labels: a training forward of a patched model makes the loss and needs them. Leave out "
            "compute_loss_func and label_smoothing_factor, which take them away (pass label_smoothing= to "
            "patch_model), or call unpatch_model(model)"
        )
    for name in (
        *HiddenKeywords.__annotations__,
        "weight",
        "reduction",
        "token_weight",
        "softcap",
        "logit_scale",
    ):
        if name in call:
            raise TypeError(f"{name}: give it to patch_model, not to the model's call")
    if call.pop("return_dict", None) is False:
        raise ValueError("return_dict: a patched model returns a ModelOutput; leave return_dict=False out")
    kept = call.pop("logits_to_keep", 0)
    if isinstance(kept, Tensor) or kept:
        raise ValueError("logits_to_keep: a patched model makes no logits while training; leave it out")
    text = model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config
    if call.get("output_router_logits", getattr(text, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits: a patched model leaves the router's auxiliary loss out; use "
            "set_loss_function(model), with which the model adds it, or set output_router_logits=False"
        )


@showing(HiddenKeywords)
def patch_model(
    model: Any,
    objective: str | Objective | RowLoss = "deft",
    *,
    statistics: RunningStatistics | None = None,
    columns: Columns | None = None,
    **keywords: Unpack[HiddenKeywords],
) -> None:
    """Make the loss inside the model's forward, from hidden states, without logits.

    The instance's forward is wrapped: in training mode with gradients it runs the backbone (`base_model`) and
    `fused_linear_deft_loss` with the weight of `get_output_embeddings()`, and returns a ModelOutput with the
    loss and no logits; otherwise, in evaluation and generation, it is the model's own, so eval_loss is plain
    cross-entropy. What the model does to its logits (Gemma 2's softcap, Cohere's and Granite's scale) is
    found by asking it, and repeated, or refused.

    Args:
        model: a transformers causal model, or a PEFT model around one, before it is compiled, given to a
            trainer or wrapped (DDP, fully_shard).
        objective, statistics, columns: as in `ComputeLoss`.
        temperature, z_loss, label_smoothing, class_weight, chunk_bytes, backend: as in
            `fused_linear_deft_loss`.
    Raises: ValueError for a head that is more than a matrix (LoRA on it, quantised, ZeRO-3, split by tensor
        parallelism), logits that cannot be repeated, an auxiliary router loss, a forward that was replaced
        already. In the first training step that does not come to the loss: RuntimeError with what to do.
        A copy.deepcopy of the model is patched too; torch.save(model) or a pickle of it whole raises
        pickle.PicklingError.
    Memory: as `fused_linear_deft_loss`.
    """
    bare = heads.bare(model, "patch_model")
    _unpatched(bare)
    if "forward" in vars(bare):
        raise ValueError(
            "model: its forward has been replaced already (by Liger, TRL, accelerate or a device map); patch "
            "the model before them, or use deft_kernels.integrations.liger.install() or .trl.apply(trainer)"
        )
    refuse_aligned(bare, "patch_model")
    text = bare.config.get_text_config() if hasattr(bare.config, "get_text_config") else bare.config
    _refuse(bare, {"output_router_logits": getattr(text, "output_router_logits", False)}, False)
    loss = _OfHidden(bare, objective, statistics, columns, keywords)
    probe.refuse_own_terms(bare, "patch_model")
    before = Before(bare, "forward", "accepts_loss_kwargs")
    _takes_items(bare)

    # A function bound to the instance, as accelerate and copy.deepcopy expect a forward to be; the loss is
    # looked up on the instance, so that a copy has its own. No __wrapped__: accelerate would unwrap it.
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.training and torch.is_grad_enabled():
            return getattr(self, RECORD)(self, args, kwargs)
        outputs = type(self).forward(self, *args, **kwargs)
        plain = getattr(outputs, "loss", None)
        if isinstance(plain, Tensor) and plain.requires_grad and not torch.compiler.is_compiling():
            plain.register_hook(_in_eval_mode)
        return outputs

    forward.__signature__ = inspect.signature(type(bare).forward)  # type: ignore[attr-defined]
    setattr(bare, RECORD, loss)
    setattr(bare, BEFORE, before)
    bare.forward = types.MethodType(forward, bare)


def calls_of(model: Any) -> Calls:
    """What the gated loss that a model was given has been called with, for a `ProofCallback`."""
    calls: Calls = vars(heads.bare(model, "calls_of"))[RECORD].calls
    return calls


def _in_eval_mode(_gradient: Tensor) -> None:
    raise RuntimeError(
        "model: is in eval mode, in which a patched model makes its own plain cross-entropy, and would train "
        "it; call model.train() (from_pretrained gives a model in eval mode)"
    )


def unpatch_model(model: Any) -> None:
    """Undo `patch_model`, `set_loss_function` or `integrations.trl.apply`: the model is as it was before.

    Raises: ValueError when there is nothing to undo.
    """
    bare = heads.bare(model, "unpatch_model")
    loss = vars(bare).get(RECORD)
    if loss is None:
        raise ValueError("model: has no gated loss of patch_model, set_loss_function or trl.apply")
    watch = getattr(loss, "watch", None)
    if watch is not None:
        watch.remove()
    vars(bare).pop(BEFORE).restore(bare)
    delattr(bare, RECORD)
