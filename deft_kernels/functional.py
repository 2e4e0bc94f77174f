"""The public calls over logits: `deft_loss`, `row_statistics`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import reference
from .backends import choice
from .core import checks
from .core.inputs import addressable, aligned, shard_of
from .core.keywords import named, showing
from .core.reduction import Weighting, in_forward, own_rows
from .core.settings import LossOfLogits, OfRows, Request, checked
from .core.spec import Spec
from .core.statistics import Field, RowStatistics, detached, differentiable_record, statistics_record
from .core.validation import in_step
from .dtensors import is_dtensor, loss_of_dtensor, refuse_dtensors, statistics_of_dtensor
from .objectives import Objective
from .operators import functions
from .operators import logits as logits_operators
from .operators import terms as terms_operators
from .operators.eager import watched
from .row_objectives import RowObjective

Loss = Tensor | tuple[Tensor, RowStatistics]


@overload
def deft_loss(
    logits: Tensor,
    labels: Tensor,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[LossOfLogits],
) -> Tensor: ...
@overload
def deft_loss(
    logits: Tensor, labels: Tensor, *, return_stats: Literal[True], **keywords: Unpack[LossOfLogits]
) -> tuple[Tensor, RowStatistics]: ...
@overload
def deft_loss(
    logits: Tensor, labels: Tensor, *, return_stats: bool, **keywords: Unpack[LossOfLogits]
) -> Loss: ...
@named
@in_step("logits", 0, -1)
@showing(LossOfLogits)
def deft_loss(
    logits: Tensor, labels: Tensor, *, return_stats: bool = False, **keywords: Unpack[LossOfLogits]
) -> Loss:
    """Token loss with a trust gate; a drop-in for `torch.nn.functional.cross_entropy` on [..., V] logits.

    With p = softmax(z), z = softcap tanh(logit_scale logits / softcap) / temperature, y the label of a row:

        deft (default):  loss = (1 - p_y^alpha) / alpha,  alpha = sum_j p_j^2 held constant
        gradient:        dloss/dz_j = p_y^alpha (p_j - [j = y])

    Other objectives: module `objectives`. A row's full loss is

        (1 - label_smoothing) w_y objective + label_smoothing / V sum_c w_c (lse - z_c) + z_loss lse^2
        + anchor (e^D - D - 1),  D = reference_logp - logp

    times its token weight; without smoothing, z-loss, anchor and weights that is the objective.

    Args:
        logits: [..., V], fp32, bf16, fp16 or fp64; any strides. -inf (masked vocabulary) is legal. A DTensor
            gives DTensors back, its rows counting as one batch (docs/parallel.md). The classes are always
            the last dimension, where `F.cross_entropy` wants [N, C, T]: move them there, movedim(1, -1). If C
            = T this cannot be noticed, and the loss is that of other numbers.
        labels: [...], integer, of a dtype that holds `ignore_index`. Rows with that label do not count,
            whatever their logits and their upstream are.
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
        shift: align causal labels: position t is scored against labels[..., t + 1], or with an integer n
            against labels[..., t + n], for a head that predicts n ahead. Pads the labels and does not slice
            the logits; the last positions do not count. Where ranks have pieces of a sequence:
            `parallel.shifted_labels`.
        logit_scale, softcap, temperature: positive; act on the logits, in this order, before everything else.
            The gradient is by the logits given. The scale is folded into the other two, so it costs nothing.
        z_loss, label_smoothing: factors, see above. Under torch.compile these numbers and the objective's are
            constants of the graph: each new value compiles again, and after eight torch runs the call
            uncompiled. num_items may change from call to call. A NumPy number breaks the graph.
        anchor, reference_logp: a factor above 0, and [...], the log-probability that a reference model gives
            each target, held constant; both or none. What is added is the k3 estimate of the divergence from
            that model on the target. Like a token weight, the entry at t goes with the logits at t.
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
    request = checked(keywords, return_stats)
    if is_dtensor(logits):
        return loss_of_dtensor(loss_of_logits, logits, labels, request)
    return loss_of_logits(logits, labels, request)


def loss_of_logits(logits: Tensor, labels: Tensor, request: Request) -> Loss:
    """`deft_loss` of plain tensors."""
    objective, weight, ignore_index = request.objective, request.class_weight, request.ignore_index
    terms = request.terms()
    given: dict[str, Any] = {"labels": labels, "token_weight": request.token_weight, "weight": weight}
    given |= {"num_items": request.num_items} | ({} if terms is None else terms.tensors())
    refuse_dtensors(given, "logits")
    checks.check_logits(logits, part=request.group is not None)
    checks.check_labels(labels, logits)
    checks.check_token_weight(request.token_weight, labels, logits)
    chosen = choice.choose(request.backend, logits.device, logits.dtype)
    shard = shard_of(request.group, logits.shape[-1], logits.device, chosen, labels, ignore_index, weight)
    vocabulary = logits.shape[-1] if shard is None else shard.size
    checks.check_class_weight(weight, logits, vocabulary)
    shape, flat = labels.shape, aligned(labels, request.shift, ignore_index)
    weighting = request.weighting()
    if terms is not None:
        terms.check(labels)
    if not isinstance(objective, Objective | RowObjective):
        _refuse_for_function(request)
        return _loss_of_function(objective, logits, flat, shape, weighting, request)
    if chosen == "reference":
        return _reference(objective, logits, flat.reshape(shape), request)

    checks.check_no_transform(logits)
    if request.inplace:
        checks.check_inplace(logits)
    spec = request.spec(chosen, shard)
    logits = addressable(logits)
    # First, so that what cannot be honoured also raises in evaluation.
    forward = in_forward(request.grad_in_forward, spec, weighting, logits)
    if terms is not None:
        # Not where it would only pay: made of formulas, it takes two visits to the logits in any case.
        forward = forward and bool(request.grad_in_forward)
        args = (flat, weighting, ignore_index, spec)
        loss, rows = terms_operators.loss(terms, logits, *args, in_forward=forward)
    elif forward and torch.is_grad_enabled() and logits.requires_grad:
        loss, rows = _loss_with_gradient(logits, flat, weighting, ignore_index, spec)
    elif _few_launches(logits, flat, weighting, spec) and not spec.objective.has_band:
        loss, rows = functions.mean_loss(logits, flat, ignore_index, spec)
    else:
        row_losses, rows = functions.row_loss(logits, flat, weighting.class_weight, ignore_index, spec)
        loss = weighting.reduce(row_losses, rows[Field.KEPT] != 0, flat)
    loss = loss.reshape(shape) if request.reduction == "none" else loss
    return (loss, statistics_record(rows, shape, vocabulary)) if request.return_stats else loss


def _few_launches(logits: Tensor, labels: Tensor, weighting: Weighting, spec: Spec) -> bool:
    """Whether kernels of the batch replace the reductions in PyTorch."""
    return spec.backend == "triton" and weighting.counts_rows and not watched(logits, labels)


def _loss_with_gradient(
    logits: Tensor, labels: Tensor, weighting: Weighting, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    by_kernel = _few_launches(logits, labels, weighting, spec)
    scale = functions.row_scale(weighting, labels, ignore_index, logits.dtype, by_kernel=by_kernel)
    return functions.loss_with_gradient(logits, labels, scale, weighting.class_weight, ignore_index, spec)


def _refuse_for_function(request: Request) -> None:
    given = {
        "inplace": request.inplace,
        "grad_in_forward": bool(request.grad_in_forward),
        "label_smoothing": request.label_smoothing > 0,
    }
    for name, value in given.items():
        if value:
            raise ValueError(f"{name}: not available with an objective that is a function of RowStatistics")


def _loss_of_function(
    objective: Any,
    logits: Tensor,
    flat: Tensor,
    shape: torch.Size,
    weighting: Weighting,
    request: Request,
) -> Loss:
    """Of an objective that is a function of differentiable statistics; `flat` labels are shifted already."""
    stats = statistics_of_logits(logits, flat.reshape(shape), request._replace(shift=0))
    valid = flat != request.ignore_index
    rows = own_rows(objective, stats, weighting.class_weight, flat, valid, request.z_loss, request.terms())
    loss = weighting.reduce(rows, valid, flat)
    loss = loss.reshape(shape) if request.reduction == "none" else loss
    return (loss, detached(stats)) if request.return_stats else loss


def _for_reference(objective: RowObjective, logits: Tensor, labels: Tensor, request: Request) -> Any:
    """The objective as the reference reads one; weights are made of the reference's own statistics."""
    band = {"low": objective.low, "high": objective.high}
    if not objective.needs_statistics:
        return SimpleNamespace(focus="given alpha", alpha=objective.inputs["alpha"].detach(), **band)
    with torch.no_grad():
        stats = statistics_of_logits(logits.detach(), labels, request._replace(shift=0, group=None))
    flat = RowStatistics(*(None if s is None else s.reshape(-1) for s in stats))  # type: ignore[arg-type]
    values = objective.of(flat, labels.reshape(-1) != request.ignore_index)
    return SimpleNamespace(focus="given", weight=values.gate, **band)


def _reference(objective: Any, logits: Tensor, labels: Tensor, request: Request) -> Loss:
    """`labels` are shifted already."""
    for name, asked in (("inplace", request.inplace), ("grad_in_forward", request.grad_in_forward)):
        if asked:
            raise ValueError(f'{name}: not available with backend="reference", which uses autograd')
    if isinstance(objective, Objective) and objective.batch_group:
        raise ValueError('batch_group: not available with backend="reference", which is one process')
    checks.check_label_range(labels.reshape(-1), logits.shape[-1], request.ignore_index)
    if isinstance(objective, RowObjective):
        objective = _for_reference(objective, logits, labels, request)
    loss, stats = reference.loss(logits, labels, **request.for_reference() | {"objective": objective})
    return (loss, RowStatistics(**stats)) if request.return_stats else loss


@named
@in_step("logits", 0, -1)
@showing(OfRows)
def row_statistics(logits: Tensor, labels: Tensor, **keywords: Unpack[OfRows]) -> RowStatistics:
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
    request = checked(keywords)
    if is_dtensor(logits):
        return statistics_of_dtensor(statistics_of_logits, logits, labels, request)
    return statistics_of_logits(logits, labels, request)


def statistics_of_logits(logits: Tensor, labels: Tensor, request: Request) -> RowStatistics:
    """`row_statistics` of plain tensors."""
    ignore_index = request.ignore_index
    refuse_dtensors({"labels": labels}, "logits")
    checks.check_logits(logits, part=request.group is not None)
    checks.check_labels(labels, logits)
    chosen = choice.choose(request.backend, logits.device, logits.dtype)
    shard = shard_of(request.group, logits.shape[-1], logits.device, chosen, labels, ignore_index)
    shape, flat = labels.shape, aligned(labels, request.shift, ignore_index)
    if chosen == "reference":
        checks.check_label_range(flat, logits.shape[-1], ignore_index)
        valid = (flat != ignore_index).reshape(shape)
        z = reference.transformed(logits, request.softcap or None, request.temperature)
        z = z.masked_fill(~valid.unsqueeze(-1), 0.0)
        values = reference.statistics(z, flat.reshape(shape), ignore_index)
        return RowStatistics(**reference.without_ignored(values, valid))
    checks.check_no_transform(logits)
    spec = request.spec_of_statistics(chosen, shard)
    code, numbers = spec.encode()
    outputs = logits_operators.statistics(addressable(logits), flat, ignore_index, code, numbers)
    return differentiable_record(outputs, shape, spec.vocabulary(logits.shape[-1]))
