"""A keyword that a call does not have: the TypeError says which keyword of the call is meant."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")
C = TypeVar("C", bound=Callable[..., Any])

# What PyTorch, Liger, flash-attention, flash-linear-attention, QuACK, Apple's CCE, Transformer Engine,
# Megatron and transformers call it, by what this package does. A call takes the first that it has.
FAMILIAR: dict[tuple[str, ...], tuple[str, ...]] = {
    ("labels",): ("target", "targets", "label", "shift_labels", "y"),
    ("logits", "hidden"): ("input", "_input", "inputs", "inp", "x", "preds", "vocab_parallel_logits"),
    ("hidden", "logits"): ("e", "hidden_states", "lm_hidden_states"),
    ("weight",): ("lin_weight", "linear_weight", "lm_head", "lm_head_weight", "classifier", "c"),
    ("bias",): ("lin_bias", "linear_bias", "lm_head_bias", "classifier_bias"),
    ("class_weight", "weight"): ("ce_weight", "class_weight", "weight", "class_weights", "weights"),
    ("token_weight",): ("token_weights", "sample_weight", "loss_weights", "loss_mask"),
    ("reduction",): ("reduce", "size_average", "reduce_loss"),
    ("ignore_index",): ("ignored_index", "ignore_idx", "ignore_id", "pad_id"),
    ("num_items",): ("num_items_in_batch", "n_items", "denominator"),
    ("z_loss",): ("lse_square_scale", "z_loss_coeff", "z_loss_weight", "z_loss_multiplier"),
    ("label_smoothing",): ("smoothing", "label_smoothing_factor", "label_smooth", "epsilon"),
    ("softcap",): (
        "logit_softcapping", "logit_softcap", "softcapping", "soft_cap", "final_logit_softcapping",
    ),
    ("logit_scale",): ("logits_scale", "logits_scaling", "scale"),
    ("inplace",): ("inplace_backward", "inplace_grad", "in_place"),
    ("group",): ("process_group", "dist_process_group", "tp_group", "vocab_parallel_options", "mesh"),
    ("chunk_bytes",): ("chunk_size", "num_chunks", "n_loop_iters"),
    ("return_stats",): ("return_token_accuracy", "return_entropy", "return_statistics"),
    ("objective",): ("loss_type", "loss_fn", "loss", "kind"),
    ("log_collision",): ("collision",),
    ("reference_logp",): ("ref_logp", "ref_logps", "ref_per_token_logps"),
    ("logp",): ("log_p", "logps", "logprobs", "per_token_logps"),
    ("backend",): ("impl", "implementation"),
}  # fmt: skip
MEANT = {foreign: ours for ours, names in FAMILIAR.items() for foreign in names}
# Where a name alone does not say what to pass.
NOTES = {
    "reduce": ': "none" for reduce=False',
    "size_average": ': "mean", or "sum" for size_average=False',
    "reduce_loss": ': "mean" or "sum", or "none" for reduce_loss=False',
    "shift_labels": ", which are shifted already, with shift=False",
    "logits_scaling": ", and 1 / logits_scaling is its value",
    "chunk_size": ", which counts bytes of logits, not rows",
    "num_chunks": ", which counts bytes of logits, not chunks",
    "loss_mask": ", or labels of ignore_index, which leave the mean's denominator too",
    "return_token_accuracy": ", whose `correct` it is",
    "return_entropy": ", whose `entropy` it is",
}
# The linear call has no keyword for these, as it always does so.
OF_LOGITS = {
    "inplace": "its own buffer of logits is always overwritten",
    "inplace_backward": "its own buffer of logits is always overwritten",
    "grad_in_forward": "a mean or a sum makes its gradients in the forward",
    "accum_dtype": "gradients are summed in fp32",
    "accum_e_fp32": "gradients are summed in fp32",
    "accum_c_fp32": "gradients are summed in fp32",
}
# Settings of an objective, not of a call.
OF_OBJECTIVES = {
    "alpha": "objectives.tsallis(alpha=...)",
    "q": "objectives.tsallis(q=...)",
    "order": "objectives.deft(order=...)",
    "eps": "objectives.deft(eps=...)",
    "detach": "objectives.deft(detach=...)",
    "mean_prob": "objectives.cayley(mean_prob=...)",
    "batch_group": "objectives.cayley(batch_group=...)",
    "power": "objectives.eaft(power=...)",
    "top_k": "objectives.eaft(top_k=...)",
    "keep": "objectives.deft().within(...)",
}


def meant(known: Iterable[str], name: str) -> str | None:
    """What to write for `name` in a call that has the `known` keywords only; None where that is not clear."""
    known = sorted(known)
    ours = [own for own in MEANT.get(name, ()) if own in known]
    if ours:
        return f"it is called {ours[0]} here{NOTES.get(name, '')}"
    if name in OF_LOGITS and "chunk_bytes" in known:
        return f"leave it out: {OF_LOGITS[name]}"
    if name in OF_OBJECTIVES and "objective" in known:
        return f"it belongs to an objective: objective={OF_OBJECTIVES[name]}"
    close = difflib.get_close_matches(name, known, 1, 0.75)
    return f"did you mean {close[0]}?" if close else None


def unknown(call: str, known: Iterable[str], name: str) -> TypeError:
    """The error for a keyword `name` that `call` does not have."""
    hint = meant(known, name) or f"known: {', '.join(sorted(known))}"
    return TypeError(f"{name}: not a keyword of {call}; {hint}")


def declarations(table: Any) -> list[tuple[str, Any, Any]]:
    """(name, type, default) of the keywords of a table of `settings`, in order."""
    return [(name, kind.__origin__, kind.__metadata__[0]) for name, kind in table.__annotations__.items()]


def showing(table: Any) -> Callable[[C], C]:
    """For a function that takes the keywords of a table as `**keywords`: its signature shows each of them."""

    def around(call: C) -> C:
        signature = inspect.signature(call)
        *parameters, _ = signature.parameters.values()
        own = [p for p in parameters if p.kind is p.KEYWORD_ONLY]
        declared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
            for name, kind, default in declarations(table)
        ]
        ahead = [p for p in parameters if p.kind is not p.KEYWORD_ONLY]
        call.__signature__ = signature.replace(parameters=ahead + declared + own)  # type: ignore[attr-defined]
        return call

    return around


def named(call: Callable[P, R]) -> Callable[P, R]:
    """`call`, which raises `unknown` for a keyword that its signature does not show, before all else."""
    parameters = inspect.signature(call).parameters
    known = frozenset(name for name, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY)
    title = call.__qualname__.removesuffix(".forward")

    @functools.wraps(call)
    def checked(*args: P.args, **keywords: P.kwargs) -> R:
        if not known.issuperset(keywords):
            raise unknown(title, known - {"self"}, min(keywords.keys() - known))
        return call(*args, **keywords)

    return checked
