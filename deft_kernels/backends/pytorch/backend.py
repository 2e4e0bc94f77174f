"""The PyTorch backend: blocks of rows small enough to stay in cache, no [N, V] temporary.

A block is read from memory once; every further pass over it hits the cache. When the gradient is wanted for
a scale that is known in the forward, it is written in the same pass. exp2 in place of exp because PyTorch's
CPU exp2 is three to four times as fast (0.16 against 0.57 ns a logit, fp32, 2 cores of an AMD EPYC with
AVX-512, torch 2.13), and because k z - OFFSET is then one fused multiply-add without a rounding at |z| = 300.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.groups import batch_mean
from ...core.spec import Spec, log2_scale
from ...core.statistics import Field, Fields, pack, unpack
from ..states import state_size
from .block import Block
from .finish import finish
from .state import combine
from .walk import Labels, Results, blocks


def row_loss(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> tuple[Tensor, Tensor]:
    """(loss [N], rows [len(Field), N]); labels [N] are checked by the caller where the host sees them."""
    block = Block(logits, spec, class_weight)
    count, known = labels.numel(), Labels(labels, block.vocabulary, ignore_index)
    results = Results(count, torch.float64, logits.device)
    sums = torch.zeros(count, dtype=torch.float64, device=logits.device) if spec.label_smoothing > 0 else None
    for span, (z,) in blocks(block.elements, logits):
        if known.none_in(span):
            continue
        work = block.scratch("work", len(z))
        fields, total = block.reduce(z, known.index[span], known.known_in(span), work)
        results.put(span, None, fields)
        if sums is not None and total is not None:
            sums[span] = total
    fields, weights = unpack(results.rows()), _class_weights(block.class_weight, labels)
    mean_prob = _mean_prob(spec, fields, labels, ignore_index)
    loss = finish(spec, fields, known.valid, block.vocabulary, mean_prob=mean_prob, logit_sum=sums, **weights)
    return loss.to(block.dtype), pack(fields).to(block.dtype)


def _mean_prob(spec: Spec, fields: Fields, labels: Tensor, ignore_index: int) -> Tensor | float | None:
    if spec.objective.needs_batch:
        return batch_mean(fields[Field.LOGP], labels != ignore_index, spec.objective.batch_group)
    return spec.objective.mean_prob


def row_states(
    logits: Tensor, labels: Tensor, class_weight: Tensor | None, ignore_index: int, spec: Spec
) -> Tensor:
    """States [N, size] (see `states`) of columns that are a part of the vocabulary.

    Labels are counted from the first of these columns; the column of a label outside is in another part.
    Class weights are those of these columns.
    """
    block = Block(logits, spec, class_weight)
    known = Labels(labels, block.vocabulary, ignore_index)
    owned = (labels >= 0) & (labels < block.vocabulary)
    states = torch.zeros(labels.numel(), state_size(spec), dtype=block.dtype, device=logits.device)
    for span, (z,) in blocks(block.elements, logits):
        if not known.none_in(span):
            states[span] = block.states(z, known.index[span], owned[span], block.scratch("work", len(z)))
    return states


def states_loss(
    states: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    vocabulary: int,
    ignore_index: int,
    spec: Spec,
) -> tuple[Tensor, Tensor]:
    """`row_loss` from the states [parts, N, size] of all parts; labels and class weights of the whole."""
    fields, sums = combine(states, spec, log2_scale(spec.temperature, states.dtype))
    known = Labels(labels, vocabulary, ignore_index)
    if known.known is not None:
        fields[Field.LOGP] = fields[Field.LOGP].where(known.known, math.nan)
    weights = _class_weights(None if class_weight is None else class_weight.to(states.dtype), labels)
    mean_prob = _mean_prob(spec, fields, labels, ignore_index)
    loss = finish(spec, fields, known.valid, vocabulary, mean_prob=mean_prob, logit_sum=sums, **weights)
    return loss.to(states.dtype), pack(fields).to(states.dtype)


def _class_weights(class_weight: Tensor | None, labels: Tensor) -> dict[str, Tensor]:
    if class_weight is None:
        return {}
    known = (labels >= 0) & (labels < class_weight.numel())
    target = class_weight[labels.where(known, 0)]
    return {"target_weight": target, "weight_total": class_weight.sum()}


def row_loss_with_gradient(
    logits: Tensor,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    out: Tensor,
) -> tuple[Tensor, Tensor]:
    """`row_loss`, and the gradient of sum_i row_scale_i loss_i into `out` (which may be the logits)."""
    block = Block(logits, spec, class_weight)
    count, known = labels.numel(), Labels(labels, block.vocabulary, ignore_index)
    results = Results(count, block.dtype, logits.device)
    row_scale = row_scale.double()
    weights = _class_weights(block.class_weight, labels)
    total = weights.pop("weight_total", None)
    direct = not (spec.squares or spec.logs or spec.peaks or spec.softcap or spec.label_smoothing)
    for span, (z, target) in blocks(block.elements, logits, out):
        if known.none_in(span):
            target.zero_()
            continue
        own = target.dtype == block.dtype and direct and target.data_ptr() != z.data_ptr()
        work = target if own else block.scratch("work", len(z))
        index, valid = known.index[span], known.valid_in(span)
        fields, logit_sum = block.reduce(z, index, known.known_in(span), work)
        loss = finish(
            spec,
            fields,
            valid,
            block.vocabulary,
            mean_prob=spec.objective.mean_prob,
            logit_sum=logit_sum,
            weight_total=total,
            target_weight=weights["target_weight"][span] if weights else None,
        )
        results.put(span, loss, fields)
        block.write(z, index, fields, row_scale[span], target, work if direct else None)
        drop(target, fields[Field.KEPT], valid is not None or spec.objective.has_band)
    return results.loss(), results.rows()


def drop(target: Tensor, kept: Tensor, some: bool) -> None:
    """Set the gradient of rows that are not kept to 0: a product with a zero coefficient may be NaN."""
    if some and (target.device.type != "cpu" or not kept.all()):
        target.masked_fill_((kept == 0).unsqueeze(1), 0.0)


def gradient(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    dloss: Tensor,
    spec: Spec,
    out: Tensor,
) -> None:
    """Gradient by the logits for an upstream `dloss` [N] into `out` (which may be the logits)."""
    block = Block(logits, spec, class_weight)
    dloss = dloss.double()
    skip = logits.device.type == "cpu"
    index = labels.clamp(0, block.vocabulary - 1).unsqueeze(1)
    # Rows whose target is a column of another part of the vocabulary.
    outside = (labels < 0) | (labels >= block.vocabulary)
    elsewhere = None if skip and not (outside & (rows[Field.KEPT] != 0)).any() else outside
    for span, (z, target) in blocks(block.elements, logits, out):
        fields = unpack(rows[:, span])
        if skip and not fields[Field.KEPT].any():
            target.zero_()
            continue
        block.write(
            z,
            index[span],
            fields,
            dloss[span],
            target,
            None,
            elsewhere=None if elsewhere is None else elsewhere[span],
        )
        drop(target, fields[Field.KEPT], True)


def weighted_total(loss: Tensor, row_scale: Tensor, rows: Tensor) -> Tensor:
    """sum_i row_scale_i loss_i over the rows that are kept; the scale of another row may be NaN or inf."""
    return torch.where(rows[Field.KEPT] != 0, loss * row_scale, 0.0).sum()


def scale(gradient: Tensor, upstream: Tensor, kept: Tensor | None = None) -> None:
    """gradient [..., K] *= upstream, a scalar; rows where `kept` [N] is 0 are 0 and stay it."""
    if upstream.device.type == "cpu":
        value = upstream.item()
        if value == 1.0:
            return
        gradient.mul_(value)
        # A loss scale that overflows makes the upstream inf or NaN, and 0 times that is NaN.
        if kept is not None and not math.isfinite(value):
            gradient.masked_fill_((kept == 0).view(*gradient.shape[:-1], 1), 0.0)
    elif kept is None:
        gradient.mul_(upstream)
    else:
        gradient.mul_(upstream.where(kept != 0, 0.0).view(*gradient.shape[:-1], 1))


def match_upstream(
    dlogits: Tensor,
    upstream: Tensor,
    logits: Tensor | None,
    labels: Tensor,
    row_scale: Tensor,
    class_weight: Tensor | None,
    rows: Tensor,
    spec: Spec,
) -> None:
    """See `operators.match_upstream_`."""
    if upstream.device.type == "cpu":
        value = upstream.item()
        if value == 1.0:
            return
        # A power of two moves bf16's exponent and nothing else; fp16 may have lost digits to underflow.
        exact = dlogits.dtype == torch.bfloat16 and abs(math.frexp(value)[0]) == 0.5
        if logits is None or exact or dlogits.dtype in (torch.float32, torch.float64):
            scale(dlogits, upstream, rows[Field.KEPT])
            return
    elif logits is None:
        scale(dlogits, upstream, rows[Field.KEPT])
        return
    gradient(logits, labels, class_weight, rows, upstream * row_scale, spec, dlogits)
