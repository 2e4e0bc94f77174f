"""The public call over hidden states, whose logits are never whole: `fused_linear_deft_loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from . import objectives
from .backends import choice
from .core import checks
from .core.inputs import aligned, shard_of
from .core.keywords import named, showing
from .core.reduction import Weighting, in_forward_obstacle, own_rows
from .core.settings import LossOfHidden, checked
from .core.spec import Spec
from .core.statistics import Field, RowLoss, RowStatistics, detached, predicted_classes, statistics_record
from .core.validation import in_step
from .dtensors import is_dtensor, refuse_dtensors, whole
from .functional import Loss, loss_of_logits
from .objectives import Objective
from .operators import hidden as hidden_operators
from .operators.chunk_gradients import HALF

# Bytes of the chunk buffer; docs/linear.md has the measurements, on a CPU and on an H200.
CHUNK_BYTES = {"cpu": 32 * 2**20}
CHUNK_BYTES_ELSEWHERE = 2**30


def _check_head(hidden: Any, weight: Any, bias: Any, part: bool) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        checks.check_floats(tensor, name)
        if name != "hidden" and tensor.device != hidden.device:
            raise ValueError(f"{name}: is on {tensor.device}, hidden is on {hidden.device}")
        checks.check_no_transform(tensor, name)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape [..., D] with D > 0, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}], as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 and not part:
        raise ValueError(f"weight: the vocabulary (first dimension) is empty, shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def _product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype `F.linear` would multiply in: autocast's, which leaves float64 alone, or the tensors' own."""
    others = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    kind = hidden.device.type
    # The meta device has no autocast, and raises when asked for it.
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and torch.float64 not in (hidden.dtype, weight.dtype)
    ):
        return torch.get_autocast_dtype(kind)
    for name, tensor in others:
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: is {tensor.dtype}, hidden is {hidden.dtype}; cast one, or use autocast")
    return hidden.dtype


def _budget(chunk_bytes: int | None, hidden: Tensor, columns: int, product: torch.dtype, summed: bool) -> int:
    """Bytes of the chunk buffer. columns: of the logits, as every rank counts them.

    summed: several chunks would need the weight's gradient in fp32 beside them. Where one chunk takes no more
    than a buffer and that sum, it is one: less memory at its peak, and no sum to read and write.
    """
    if chunk_bytes is None:
        if hidden.device.type in CHUNK_BYTES:
            return CHUNK_BYTES[hidden.device.type]
        one = hidden.numel() // hidden.shape[-1] * columns * product.itemsize
        sums = 4 * columns * hidden.shape[-1] if summed and product in HALF else 0
        return max(one, 1) if one <= CHUNK_BYTES_ELSEWHERE + sums else CHUNK_BYTES_ELSEWHERE
    return chunk_bytes


@overload
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: Unpack[LossOfHidden],
) -> Tensor: ...
@overload
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **keywords: Unpack[LossOfHidden],
) -> tuple[Tensor, RowStatistics]: ...
@overload
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: bool,
    **keywords: Unpack[LossOfHidden],
) -> Loss: ...
@named
@in_step("weight", 1, 0)
@showing(LossOfHidden)
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: bool = False,
    **keywords: Unpack[LossOfHidden],
) -> Loss:
    """`deft_loss` of a linear layer's logits, from its input, without ever holding all logits.

        deft_loss(logit_scale * F.linear(hidden, weight, bias), labels, weight=class_weight, ...)

    Rows that count for nothing are left out before the first matrix product; the others go through one buffer
    of logits, chunk by chunk, and their gradient is written over them there.

    Args:
        hidden: [..., D], fp32, bf16, fp16 or fp64.
        weight: [V, D], the lm_head, of hidden's dtype unless under autocast; a DTensor is gathered, and its
            gradient averaged over the ranks.
        labels: [...], integer. Rows whose label is `ignore_index` count for nothing.
        bias: [V].
        class_weight: [V], the `weight` of `deft_loss`.
        logit_scale: a positive number that multiplies the logits (Cohere's logit_scale, 1 / Granite's
            logits_scaling), before softcap and temperature.
        chunk_bytes: size of the buffer of logits; a chunk holds at least one row. None: 32 MiB on a CPU.
            Elsewhere one chunk where that takes no more memory than 1 GiB and the fp32 sum of dW that
            several chunks need; else 1 GiB.
        group: torch.distributed ranks that split the head: weight is [V_r, D] and bias [V_r], this rank's
            rows of them; hidden is the same on every rank, and so is everything else (see `deft_loss`). Every
            rank's gradient of hidden is the whole one.
        objective, reduction, ignore_index, token_weight, num_items, shift, softcap, temperature, z_loss,
        label_smoothing, return_stats, backend: as in `deft_loss`. backend="reference" is not chunked.

    Returns: as `deft_loss`. The logits are those that F.linear would give, in its dtype; the gradients have
        the dtype of hidden, weight and bias, that of weight and bias summed in fp32 and cast once. Gradients
        made in the forward (see Memory) are scaled by an upstream that is not 1, and rounded once more.
    Raises: as `deft_loss`; TypeError for hidden, weight and bias of different dtypes without autocast.
    Memory: chunk_bytes, 19 numbers a row, and the gradients that are wanted; with half-precision products and
        more than one chunk also dW in fp32 until it is cast; under autocast the weight's copy in its dtype.
        Matrix products: 1 without gradients. 3 with them, which a mean or a sum makes in the forward. 4 where
        they wait for the backward: "none", float16 (which would lose small gradients before the loss scale is
        known), a mean over a band on p without num_items, differentiable token_weight or num_items, and a
        function of RowStatistics. `cayley` makes the logits once more first, for the batch's mean p, unless
        mean_prob is given.
        With a group: one all-gather of 5 to 8 numbers a row for each chunk of the forward, and one all-reduce
        of hidden's gradient, in fp32 for half precision.
    Limits: first derivatives only. On a GPU the host waits once for the number of rows that count, and once
        for cayley's mean p.
    Source: DEFT, arXiv:2602.11424.
    """
    request = checked(keywords, return_stats)
    if request.group is not None and (is_dtensor(weight) or is_dtensor(bias)):
        raise ValueError("group: weight and bias are to be this rank's own rows; pass weight.to_local()")
    given = {"labels": labels, "token_weight": request.token_weight, "class_weight": request.class_weight}
    refuse_dtensors(given | {"num_items": request.num_items}, "hidden")
    hidden, weight, bias = whole(hidden, weight, bias)
    _check_head(hidden, weight, bias, request.group is not None)
    outline = checks.Outline((*hidden.shape[:-1], weight.shape[0]), hidden.device)
    checks.check_labels(labels, outline)
    checks.check_token_weight(request.token_weight, labels, outline)
    product = _product_dtype(hidden, weight, bias)
    chosen = choice.choose(request.backend, hidden.device, product)
    ignore_index, class_weight = request.ignore_index, request.class_weight
    shard = shard_of(
        request.group, weight.shape[0], hidden.device, chosen, labels, ignore_index, class_weight
    )
    vocabulary = weight.shape[0] if shard is None else shard.size
    checks.check_class_weight(class_weight, outline, vocabulary, "class_weight")
    if chosen == "reference":
        return loss_of_logits(torch.nn.functional.linear(hidden, weight, bias), labels, request)

    columns = vocabulary if shard is None else -(-shard.size // shard.ranks)
    summed = torch.is_grad_enabled() and weight.requires_grad
    budget = _budget(request.chunk_bytes, hidden, columns, product, summed)
    flat = aligned(labels, request.shift, ignore_index)
    call = _Call(hidden, weight, bias, flat, ignore_index, product, budget)
    weighting, objective, shape = request.weighting(), request.objective, labels.shape
    if not isinstance(objective, Objective):
        if request.label_smoothing > 0:
            raise ValueError(
                "label_smoothing: not available with an objective that is a function of RowStatistics"
            )
        spec = request.spec(objectives.of_statistics(), chosen, shard, statistics=True)
        stats: RowStatistics | None
        loss, stats = call.of_function(objective, spec, weighting, shape)
    else:
        spec = request.spec(objective, chosen, shard, statistics=return_stats)
        loss, rows = call.of_objective(spec, weighting)
        stats = statistics_record(rows, shape, vocabulary) if return_stats else None
    loss = loss.reshape(shape) if request.reduction == "none" else loss
    return loss if stats is None or not return_stats else (loss, stats)


class _Call:
    """A checked call: what its operators share."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        ignore_index: int,
        product: torch.dtype,
        budget: int,
    ):
        hidden = hidden.reshape(-1, hidden.shape[-1])
        grad = torch.is_grad_enabled()
        inputs = (hidden, weight, bias)
        self.wanted = [grad and tensor is not None and tensor.requires_grad for tensor in inputs]
        self.inputs, self.labels, self.ignore_index = inputs, labels, ignore_index
        self.product, self.budget = product, budget

    def _settings(self, spec: Spec) -> tuple[Any, ...]:
        return (self.wanted, self.product, self.budget, self.ignore_index, *spec.encode())

    def of_objective(self, spec: Spec, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(loss, rows); the loss [N] for "none"."""
        classes = weighting.class_weight
        if self._in_forward(spec, weighting):
            dtype = torch.float64 if self.product == torch.float64 else torch.float32
            scale = weighting.row_scale(self.labels != self.ignore_index, self.labels, dtype)
            args = (*self.inputs, self.labels, scale, classes, *self._settings(spec))
            loss, rows, *_ = hidden_operators.loss_with_gradient(*args)
            return loss, rows
        args = (*self.inputs, self.labels, classes, *self._settings(spec))
        loss, rows = hidden_operators.row_loss(*args)
        return weighting.reduce(loss, rows[Field.KEPT] != 0, self.labels), rows

    def _in_forward(self, spec: Spec, weighting: Weighting) -> bool:
        if not any(self.wanted) or self.product == torch.float16:
            return False
        # The extra pass for cayley's mean belongs to the operator here, so its rows wait for nothing.
        if spec.objective.needs_batch:
            spec = replace(spec, objective=replace(spec.objective, mean_prob=0.0, batch_group=""))
        return in_forward_obstacle(spec, weighting) is None

    def of_function(
        self, objective: RowLoss, spec: Spec, weighting: Weighting, shape: torch.Size
    ) -> tuple[Tensor, RowStatistics]:
        """(loss, detached statistics) of an objective that is a function of differentiable statistics."""
        plain = replace(spec, z_loss=0.0, label_smoothing=0.0)
        args = (*self.inputs, self.labels, *self._settings(plain))
        *vectors, rows = hidden_operators.statistics(*args)
        logp, lse, collision, entropy, max_prob = (vector.reshape(shape) for vector in vectors)
        correct = rows[Field.CORRECT].reshape(shape) != 0
        predicted = predicted_classes(rows, shape, spec.vocabulary(self.inputs[1].shape[0]))
        stats = RowStatistics(logp, lse, collision, entropy, max_prob, correct, predicted=predicted)
        valid = self.labels != self.ignore_index
        losses = own_rows(objective, stats, weighting.class_weight, self.labels, valid, spec.z_loss)
        loss = weighting.reduce(losses, valid, self.labels)
        return loss, detached(stats)
