"""The public call over hidden states, whose logits are never whole: `fused_linear_deft_loss`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from . import objectives
from .backends import choice
from .core import checks
from .core.groups import VocabShard
from .core.inputs import RowLoss, aligned, described, own_rows, shard_of, statistics_record, transform
from .core.keywords import named
from .core.reduction import Reduction, Weighting, in_forward_obstacle
from .core.spec import Spec
from .core.statistics import Field, RowStatistics, detached, predicted_classes
from .core.validation import in_step
from .dtensors import is_dtensor, refuse_dtensors, whole
from .functional import deft_loss
from .objectives import Objective
from .operators import hidden as hidden_operators
from .operators.chunk_gradients import HALF

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

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


def _budget(chunk_bytes: Any, hidden: Tensor, columns: int, product: torch.dtype, summed: bool) -> int:
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
    budget: int = checks.integer("chunk_bytes", chunk_bytes)
    if budget < 1:
        raise ValueError(f"chunk_bytes: expected a positive number of bytes, got {budget}")
    return budget


@overload
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[False] = False,
    **keywords: Any,
) -> Tensor: ...
@overload
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    return_stats: Literal[True],
    **keywords: Any,
) -> tuple[Tensor, RowStatistics]: ...
@named  # type: ignore[misc]  # the overloads tell the return type apart
@in_step("weight", 1, 0)
def fused_linear_deft_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    *,
    objective: str | Objective | RowLoss = "deft",
    reduction: Reduction = "mean",
    ignore_index: int = -100,
    token_weight: Tensor | None = None,
    class_weight: Tensor | None = None,
    num_items: Tensor | float | None = None,
    shift: bool = False,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    label_smoothing: float = 0.0,
    chunk_bytes: int | None = None,
    return_stats: bool = False,
    group: ProcessGroup | VocabShard | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, RowStatistics]:
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
    objective = described(objective)
    checks.check_reduction(reduction)
    ignore_index = checks.label("ignore_index", ignore_index)
    num_items = checks.number_of_items(num_items, reduction)
    for name, value in (("shift", shift), ("return_stats", return_stats)):
        checks.flag(name, value)
    if group is not None and (is_dtensor(weight) or is_dtensor(bias)):
        raise ValueError("group: weight and bias are to be this rank's own rows; pass weight.to_local()")
    given = {"labels": labels, "token_weight": token_weight, "class_weight": class_weight}
    refuse_dtensors(given | {"num_items": num_items}, "hidden")
    hidden, weight, bias = whole(hidden, weight, bias)
    _check_head(hidden, weight, bias, group is not None)
    outline = checks.Outline((*hidden.shape[:-1], weight.shape[0]), hidden.device)
    checks.check_labels(labels, outline)
    checks.check_token_weight(token_weight, labels, outline)
    settings = transform(logit_scale, softcap, temperature)
    settings["z_loss"] = checks.number("z_loss", z_loss, 0.0)
    settings["label_smoothing"] = checks.number("label_smoothing", label_smoothing, 0.0, 1.0)
    product = _product_dtype(hidden, weight, bias)
    chosen = choice.choose(backend, hidden.device, product)
    shard = shard_of(group, weight.shape[0], hidden.device, chosen, labels, ignore_index, class_weight)
    vocabulary = weight.shape[0] if shard is None else shard.size
    columns = vocabulary if shard is None else -(-shard.size // shard.ranks)
    summed = torch.is_grad_enabled() and weight.requires_grad
    budget = _budget(chunk_bytes, hidden, columns, product, summed)
    checks.check_class_weight(class_weight, outline, vocabulary, "class_weight")
    if chosen == "reference":
        options: dict[str, Any] = {"num_items": num_items, "shift": shift, "return_stats": return_stats}
        options |= {"objective": objective, "reduction": reduction, "ignore_index": ignore_index, **settings}
        options |= {"logit_scale": logit_scale, "softcap": softcap, "temperature": temperature}
        options |= {"token_weight": token_weight, "weight": class_weight}
        logits = torch.nn.functional.linear(hidden, weight, bias)
        return deft_loss(logits, labels, backend=backend, **options)

    class_weight = None if class_weight is None else class_weight.contiguous()
    call = _Call(hidden, weight, bias, aligned(labels, shift, ignore_index), ignore_index, product, budget)
    weighting = Weighting(reduction, token_weight, class_weight, num_items)
    if not isinstance(objective, Objective):
        if settings["label_smoothing"] > 0:
            raise ValueError(
                "label_smoothing: not available with an objective that is a function of RowStatistics"
            )
        spec = Spec(objectives.of_statistics(), **settings, statistics=True, backend=chosen, shard=shard)
        loss, stats = call.of_function(objective, spec, weighting, labels.shape)
        loss = loss.reshape(labels.shape) if reduction == "none" else loss
        return (loss, stats) if return_stats else loss
    spec = Spec(objective, **settings, statistics=return_stats, backend=chosen, shard=shard)
    loss, rows = call.of_objective(spec, weighting)
    loss = loss.reshape(labels.shape) if reduction == "none" else loss
    return (loss, statistics_record(rows, labels.shape, vocabulary)) if return_stats else loss


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
            loss, rows, *_ = hidden_operators.linear_loss_with_gradient(*args)
            return loss, rows
        args = (*self.inputs, self.labels, classes, *self._settings(spec))
        loss, rows = hidden_operators.linear_row_loss(*args)
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
        *vectors, rows = hidden_operators.linear_statistics(*args)
        logp, lse, collision, entropy, max_prob = (vector.reshape(shape) for vector in vectors)
        correct = rows[Field.CORRECT].reshape(shape) != 0
        predicted = predicted_classes(rows, shape, spec.vocabulary(self.inputs[1].shape[0]))
        stats = RowStatistics(logp, lse, collision, entropy, max_prob, correct, predicted=predicted)
        valid = self.labels != self.ignore_index
        losses = own_rows(objective, stats, weighting.class_weight, self.labels, valid, spec.z_loss)
        loss = weighting.reduce(losses, valid, self.labels)
        return loss, detached(stats)
