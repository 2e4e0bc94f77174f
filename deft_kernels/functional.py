"""The public calls over logits: `deft_loss`, `row_statistics`."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import objectives, reference
from .backends import choice
from .core import checks
from .core.groups import VocabShard
from .core.inputs import RowLoss, aligned, described, own_rows, shard_of, statistics_record, transform
from .core.keywords import named
from .core.reduction import Reduction, Weighting, in_forward
from .core.spec import Spec
from .core.statistics import Field, RowStatistics, detached, predicted_classes
from .core.validation import in_step
from .dtensors import is_dtensor, loss_of_dtensor, refuse_dtensors, statistics_of_dtensor
from .objectives import Objective
from .operators import functions
from .operators import logits as logits_operators

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def _addressable(logits: Tensor) -> Tensor:
    """The logits with a unit stride along the vocabulary and at most two row strides; a copy only if not."""
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        return logits.contiguous()
    if logits.dim() <= 3:
        return logits
    leading = list(zip(logits.shape[:-1], logits.stride()[:-1], strict=True))
    merged = 1
    for (_, outer), (size, inner) in itertools.pairwise(leading):
        merged += outer != size * inner
    return logits if merged <= 2 else logits.contiguous()


@overload
def deft_loss(
    logits: Tensor, labels: Tensor, *, return_stats: Literal[False] = False, **keywords: Any
) -> Tensor: ...
@overload
def deft_loss(
    logits: Tensor, labels: Tensor, *, return_stats: Literal[True], **keywords: Any
) -> tuple[Tensor, RowStatistics]: ...
@named  # type: ignore[misc]  # the overloads tell the return type apart, not the keywords
@in_step("logits", 0, -1)
def deft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    objective: str | Objective | RowLoss = "deft",
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    shift: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    inplace: bool = False,
    grad_in_forward: bool | None = None,
    return_stats: bool = False,
    group: ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RowStatistics]:
    """Token loss with a trust gate; a drop-in for `torch.nn.functional.cross_entropy` on [..., V] logits.

    With p = softmax(z), z = softcap tanh(logit_scale logits / softcap) / temperature, y the label of a row:

        deft (default):  loss = (1 - p_y^alpha) / alpha,  alpha = sum_j p_j^2 held constant
        gradient:        dloss/dz_j = p_y^alpha (p_j - [j = y])

    Other objectives: module `objectives`. A row's full loss is

        (1 - label_smoothing) w_y objective + label_smoothing / V sum_c w_c (lse - z_c) + z_loss lse^2

    times its token weight; without smoothing, z-loss and weights that is the objective.

    Args:
        logits: [..., V], fp32, bf16, fp16 or fp64; any strides. -inf (masked vocabulary) is legal. A DTensor
            gives DTensors back, its rows counting as one batch (docs/parallel.md). The classes are always
            the last dimension, where `F.cross_entropy` wants [N, C, T]: move them there, movedim(1, -1). With
            C = T nobody can tell, and the loss is that of other numbers.
        labels: [...], integer, of a dtype that holds `ignore_index`. Rows whose label it is count for
            nothing, whatever their logits and their upstream hold.
        objective: a name, an `objectives.Objective`, or a function of differentiable `RowStatistics` that
            returns each row's loss (see `row_statistics`). In place of an ignored row the function sees one
            with probabilities 1/2, 1/4, 1/4, so that no parameter of its own gets a NaN from there.
        reduction: "mean" divides the sum by the number of rows that are neither ignored nor dropped by a
            band on p (with `weight`: by the sum of their w_y, and where that is 0 the mean is NaN, as in
            F.cross_entropy); "sum"; "none": [...], zero at ignored rows.
        token_weight: [...], scales each row's loss and leaves the denominator; differentiable.
        weight: [V], per class, as in `nn.CrossEntropyLoss`; z-loss is not weighted.
        num_items: replaces the mean's denominator (gradient accumulation); a number or one-element tensor,
            which may be 0 where no row counts.
        shift: align causal labels: position t is scored against labels[..., t + 1]. Pads the labels, never
            slices the logits; the last position counts for nothing.
        logit_scale, softcap, temperature: positive; act on the logits, in this order, before everything else.
            The gradient is by the logits given. Folded into one another, so the scale costs nothing.
        z_loss, label_smoothing: factors, see above. Under torch.compile these numbers and the objective's are
            constants of the graph: each new value compiles anew, and after eight torch runs the call
            uncompiled. num_items may change from call to call. A NumPy number breaks the graph.
        inplace: the backward overwrites the logits with their gradient; a later use of them in autograd
            raises. Saves one [N, V] tensor.
        grad_in_forward: make the gradient in the forward, in the same visit to the logits. None: where it
            pays (CPU, mean or sum, not under torch.compile). True needs "mean" or "sum", and an objective
            whose rows do not wait for the batch; with `inplace` the forward itself overwrites the logits.
            For an upstream that is not 1 that gradient is scaled, which in half precision rounds it a second
            time: up to 1.5 ulp in all instead of 0.5. In fp16 a loss scale comes too late for entries that
            were rounded to 0, those below 3e-8: a RuntimeWarning says so, once.
        return_stats: also return the rows' `RowStatistics`, from the same pass, detached.
        group: torch.distributed ranks that split the vocabulary: the logits are this rank's columns,
            [..., V_r], in the order of the ranks, uneven or none at all; labels, `weight` and everything else
            are those of the whole vocabulary and the same on every rank. Every rank returns the same loss. A
            `VocabShard` also says where the columns lie; else the ranks ask each other, once for a group.
        backend: "auto" takes the Triton kernels on a GPU they support, PyTorch elsewhere and for fp64;
            "triton" raises where they cannot run; "torch"; "reference" is the slow oracle.

    Returns: the loss in nats, fp32 (fp64 for fp64 logits): a scalar, or [...] with reduction="none"; with
        return_stats the pair (loss, RowStatistics). With no row to count, a mean is 0, not NaN.
    Raises: TypeError, ValueError for arguments that cannot be honoured, named in the message; IndexError for
        a label outside [0, V) on the CPU. On a GPU such a row's loss and gradient are NaN, and nothing
        out of bounds is read; DEFT_KERNELS_VALIDATE=1 raises there too, for a device synchronisation.
        With a group, ranks whose columns, labels or settings do not fit together raise on the CPU; on a GPU
        their losses are NaN. DEFT_KERNELS_VALIDATE=1 compares them by name (docs/parallel.md).
    Memory: forward 1 read of the logits; backward 1 read and 1 write. Saved: the logits and 19 numbers a
        row. Gradient in the forward: 1 read and 1 write in all, the gradient alive from the forward on.
        With a group: one all-gather in the forward, of 5 numbers for each row and for one row more, 6 with
        label smoothing, one more each for exact gradients through max p and for return_stats; nothing in the
        backward.
    Limits: |logits| / temperature below 1.8e8 in the largest of a row, NaN beyond. First derivatives only, by
        backward() and torch.autograd; neither forward mode nor torch.func (backend="reference": any).
    Source: DEFT, arXiv:2602.11424.
    """
    objective = described(objective)
    ignore_index = checks.label("ignore_index", ignore_index)
    if is_dtensor(logits):
        return loss_of_dtensor(deft_loss, logits, labels, {
            "objective": objective, "reduction": reduction, "ignore_index": ignore_index,
            "token_weight": token_weight, "weight": weight, "num_items": num_items, "shift": shift,
            "logit_scale": logit_scale, "softcap": softcap, "temperature": temperature, "z_loss": z_loss,
            "label_smoothing": label_smoothing, "inplace": inplace, "grad_in_forward": grad_in_forward,
            "return_stats": return_stats, "group": group, "backend": backend,
        })  # fmt: skip
    given = {"labels": labels, "token_weight": token_weight, "weight": weight, "num_items": num_items}
    refuse_dtensors(given, "logits")
    checks.check_logits(logits, part=group is not None)
    checks.check_labels(labels, logits)
    checks.check_reduction(reduction)
    checks.check_token_weight(token_weight, labels, logits)
    num_items = checks.number_of_items(num_items, reduction)
    for name, value in (("shift", shift), ("inplace", inplace), ("return_stats", return_stats)):
        checks.flag(name, value)
    if grad_in_forward is not None:
        checks.flag("grad_in_forward", grad_in_forward)
    settings = transform(logit_scale, softcap, temperature)
    settings["z_loss"] = checks.number("z_loss", z_loss, 0.0)
    settings["label_smoothing"] = checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    chosen = choice.choose(backend, logits.device, logits.dtype)
    shard = shard_of(group, logits.shape[-1], logits.device, chosen, labels, ignore_index, weight)
    vocabulary = logits.shape[-1] if shard is None else shard.size
    checks.check_class_weight(weight, logits, vocabulary)
    shape, flat = labels.shape, aligned(labels, shift, ignore_index)
    weight = None if weight is None else weight.contiguous()
    weighting = Weighting(reduction, token_weight, weight, num_items)

    if not isinstance(objective, Objective):
        _refuse_for_function(inplace, grad_in_forward, settings["label_smoothing"])
        stats = row_statistics(
            logits,
            flat.reshape(shape),
            ignore_index=ignore_index,
            logit_scale=logit_scale,
            softcap=softcap,
            temperature=temperature,
            group=group,
            backend=backend,
        )
        valid = flat != ignore_index
        loss = weighting.reduce(
            own_rows(objective, stats, weight, flat, valid, settings["z_loss"]), valid, flat
        )
        loss = loss.reshape(shape) if reduction == "none" else loss
        return (loss, detached(stats)) if return_stats else loss

    if chosen == "reference":
        for name, asked in (("inplace", inplace), ("grad_in_forward", grad_in_forward)):
            if asked:
                raise ValueError(f'{name}: not available with backend="reference", which uses autograd')
        if objective.batch_group:
            raise ValueError('batch_group: not available with backend="reference", which is one process')
        return _reference(
            logits, flat.reshape(shape), objective, weighting, ignore_index, settings, return_stats
        )

    checks.check_no_transform(logits)
    if inplace:
        checks.check_inplace(logits)
    spec = Spec(objective, **settings, statistics=return_stats, inplace=inplace, backend=chosen, shard=shard)
    logits = _addressable(logits)
    # Asked first, as what cannot be honoured raises in evaluation too.
    forward = in_forward(grad_in_forward, spec, weighting, logits)
    if forward and torch.is_grad_enabled() and logits.requires_grad:
        loss, rows = _loss_with_gradient(logits, flat, weighting, ignore_index, spec)
    elif _few_launches(logits, flat, weighting, spec) and not objective.has_band:
        loss, rows = functions.mean_loss(logits, flat, ignore_index, spec)
    else:
        row_losses, rows = functions.row_loss(logits, flat, weight, ignore_index, spec)
        loss = weighting.reduce(row_losses, rows[Field.KEPT] != 0, flat)
        loss = loss.reshape(shape) if reduction == "none" else loss
    return (loss, statistics_record(rows, shape, vocabulary)) if return_stats else loss


def _few_launches(logits: Tensor, labels: Tensor, weighting: Weighting, spec: Spec) -> bool:
    """Whether kernels of the batch stand in for the reductions in PyTorch."""
    return spec.backend == "triton" and weighting.counts_rows and not functions.watched(logits, labels)


def _loss_with_gradient(
    logits: Tensor, labels: Tensor, weighting: Weighting, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    if _few_launches(logits, labels, weighting, spec):
        scale = functions.mean_scale(labels, ignore_index)
    else:
        dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
        scale = weighting.row_scale(labels != ignore_index, labels, dtype)
    return functions.loss_with_gradient(logits, labels, scale, weighting.class_weight, ignore_index, spec)


def _refuse_for_function(inplace: bool, in_forward: bool | None, smoothing: float) -> None:
    given = {"inplace": inplace, "grad_in_forward": bool(in_forward), "label_smoothing": smoothing > 0}
    for name, value in given.items():
        if value:
            raise ValueError(f"{name}: not available with an objective that is a function of RowStatistics")


def _reference(
    logits: Tensor,
    labels: Tensor,
    objective: Objective,
    weighting: Weighting,
    ignore_index: int,
    settings: dict[str, float],
    return_stats: bool,
) -> Any:
    checks.check_label_range(labels.reshape(-1), logits.shape[-1], ignore_index)
    loss, stats = reference.loss(
        logits,
        labels,
        objective=objective,
        reduction=weighting.reduction,
        ignore_index=ignore_index,
        token_weight=weighting.token_weight,
        weight=weighting.class_weight,
        num_items=weighting.num_items,
        softcap=settings["softcap"] or None,
        temperature=settings["temperature"],
        z_loss=settings["z_loss"],
        label_smoothing=settings["label_smoothing"],
    )
    return (loss, RowStatistics(**stats)) if return_stats else loss


@named
@in_step("logits", 0, -1)
def row_statistics(
    logits: Tensor,
    labels: Tensor,
    *,
    ignore_index: int = -100,
    shift: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    group: ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
) -> RowStatistics:
    """Differentiable statistics of each row: write an objective of your own in plain PyTorch over them.

        logp = z_y - lse,  lse = ln sum e^z,  collision = sum p^2,  entropy = -sum p ln p,  max_prob = max p

    The gradient of any differentiable L(logp, lse, S, H, max p) comes from one pass over the logits:

        dL/dz_j = p_j (a + b p_j + c (z_j - lse)) - g [j = y],   b = 2 dL/dS,  c = -dL/dH,  g = -dL/dlogp,
        a = dL/dlse + g - 2 S dL/dS - H dL/dH   (max p: shared evenly among tied maxima, as torch.amax does)

        def focal(r):
            return -(1 - r.logp.exp()) ** 2 * r.logp
        loss = deft_loss(logits, labels, objective=focal)                # or
        loss = focal(row_statistics(logits, labels)).mean()

    Args: as in `deft_loss`.
    Returns: `RowStatistics`, every tensor of the labels' shape, nats, fp32 (fp64 for fp64 logits); alpha and
        gate are None, `correct` is bool, `predicted` int64. Ignored rows are 0 (predicted: -1) and pass no
        gradient.
    Raises: as `deft_loss`.
    Memory: forward 1 read of the logits; backward 1 read and 1 write. Saved: the logits and 19 numbers a row.
        With a group: one all-gather of 7 numbers a row in the forward, nothing in the backward.
    Source: docs/mathematics.md.
    """
    if is_dtensor(logits):
        return statistics_of_dtensor(row_statistics, logits, labels, {
            "ignore_index": ignore_index, "shift": shift, "logit_scale": logit_scale, "softcap": softcap,
            "temperature": temperature, "group": group, "backend": backend,
        })  # fmt: skip
    refuse_dtensors({"labels": labels}, "logits")
    checks.check_logits(logits, part=group is not None)
    checks.check_labels(labels, logits)
    ignore_index = checks.label("ignore_index", ignore_index)
    checks.flag("shift", shift)
    settings = transform(logit_scale, softcap, temperature)
    chosen = choice.choose(backend, logits.device, logits.dtype)
    shard = shard_of(group, logits.shape[-1], logits.device, chosen, labels, ignore_index)
    shape, flat = labels.shape, aligned(labels, shift, ignore_index)
    if chosen == "reference":
        checks.check_label_range(flat, logits.shape[-1], ignore_index)
        valid = (flat != ignore_index).reshape(shape)
        z = reference.transformed(logits, settings["softcap"] or None, settings["temperature"]).masked_fill(
            ~valid.unsqueeze(-1), 0.0
        )
        values = reference.statistics(z, flat.reshape(shape), ignore_index)
        return RowStatistics(**reference.without_ignored(values, valid))
    checks.check_no_transform(logits)
    spec = Spec(objectives.of_statistics(), **settings, statistics=True, backend=chosen, shard=shard)
    code, numbers = spec.encode()
    outputs = logits_operators.row_statistics(_addressable(logits), flat, ignore_index, code, numbers)
    logp, lse, collision, entropy, max_prob = (value.reshape(shape) for value in outputs[:5])
    correct = outputs[5][Field.CORRECT].reshape(shape) != 0
    predicted = predicted_classes(outputs[5], shape, spec.vocabulary(logits.shape[-1]))
    return RowStatistics(logp, lse, collision, entropy, max_prob, correct, predicted=predicted)
