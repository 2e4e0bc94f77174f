"""The public calls over hidden states, whose logits are never whole: `fused_linear_deft_loss`,
`fused_linear_row_statistics`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, overload

import torch
from torch import Tensor
from typing_extensions import Unpack

from .backends import choice
from .core import checks
from .core.groups import Shard
from .core.head import buffer_bytes, check_head, check_no_transforms, product_dtype
from .core.inputs import aligned, shard_of
from .core.keywords import named, showing
from .core.reduction import Weighting, in_forward_obstacle, own_rows
from .core.settings import LossOfHidden, Request, RowsOfHidden, checked
from .core.spec import Spec
from .core.statistics import Field, RowStatistics, detached, differentiable_record, statistics_record
from .core.validation import in_step
from .dtensors import is_dtensor, refuse_dtensors, whole
from .functional import Loss, loss_of_logits, statistics_of_logits
from .objectives import Objective
from .operators import functions
from .operators import hidden as hidden_operators
from .operators import terms as terms_operators
from .operators.eager import watched
from .row_objectives import RowObjective, Terms


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
    """`deft_loss` of a linear layer's logits, from the layer's input; all logits never exist at once.

        deft_loss(logit_scale * F.linear(hidden, weight, bias), labels, weight=class_weight, ...)

    Rows that do not count are left out before the first matrix product. The others pass through one buffer of
    logits, chunk by chunk, where each chunk's gradient overwrites its logits.

    Args:
        hidden: [..., D], fp32, bf16, fp16 or fp64.
        weight: [V, D], the lm_head, of hidden's dtype unless under autocast; a DTensor is gathered, and its
            gradient averaged over the ranks.
        labels: [...], integer. Rows whose label is `ignore_index` do not count.
        bias: [V].
        class_weight: [V], the `weight` of `deft_loss`.
        logit_scale: a positive number that multiplies the logits (Cohere's logit_scale, 1 / Granite's
            logits_scaling), before softcap and temperature.
        chunk_bytes: size of the buffer of logits; a chunk holds at least one row. None: 32 MiB on a CPU. On a
            GPU one chunk, if that takes no more memory than 1 GiB and the fp32 sum of dW that several chunks
            need; otherwise 1 GiB.
        skip_ignored: leave rows that do not count out of the products. On a GPU the host has to wait for
            their number; False multiplies every row, and the host waits for nothing.
        group: torch.distributed ranks that split the head: weight is [V_r, D] and bias [V_r], this rank's
            rows of them; hidden is the same on every rank, and so is everything else (see `deft_loss`). Every
            rank's gradient of hidden is the whole one.
        objective, reduction, ignore_index, token_weight, num_items, shift, softcap, temperature, z_loss,
        label_smoothing, anchor, reference_logp, return_stats, backend: as in `deft_loss`. With
        backend="reference" nothing is chunked.

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
    Limits: first derivatives only. On a GPU the host waits once for the number of rows that count, unless
        skip_ignored is False, and once for cayley's mean p.
    Source: DEFT, arXiv:2602.11424.
    """
    request = checked(keywords, return_stats)
    call = _Call.of(hidden, weight, bias, labels, request)
    terms = request.terms()
    if terms is not None:
        terms.check(labels)
    if call.backend == "reference":
        return loss_of_logits(call.logits(), labels, request)
    weighting, objective = request.weighting(), request.objective
    stats: RowStatistics | None = None
    if not isinstance(objective, Objective | RowObjective):
        if request.label_smoothing > 0:
            raise ValueError(
                "label_smoothing: not available with an objective that is a function of RowStatistics"
            )
        stats = call.statistics(request)
        valid = call.labels != request.ignore_index
        args = (weighting.class_weight, call.labels, valid, request.z_loss, terms)
        rows = own_rows(objective, stats, *args)
        loss, stats = weighting.reduce(rows, valid, call.labels), detached(stats)
    else:
        spec = request.spec(call.backend, call.shard)
        if terms is None:
            loss, packed = call.of_objective(spec, weighting)
        else:
            loss, packed = call.of_terms(terms, spec, weighting)
        if return_stats:
            stats = statistics_record(packed, labels.shape, call.vocabulary)
    loss = loss.reshape(labels.shape) if request.reduction == "none" else loss
    return loss if stats is None or not return_stats else (loss, stats)


@named
@in_step("weight", 1, 0)
@showing(RowsOfHidden)
def fused_linear_row_statistics(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    bias: Tensor | None = None,
    **keywords: Unpack[RowsOfHidden],
) -> RowStatistics:
    """`row_statistics` of a linear layer's logits, from the layer's input; all logits never exist at once.

        row_statistics(logit_scale * F.linear(hidden, weight, bias), labels, ...)

    Log-probabilities, entropies and the other statistics of every token, differentiable in hidden, weight and
    bias, as policy gradients and distillation need them:

        r = fused_linear_row_statistics(hidden, head.weight, labels)
        ratio = (r.logp - old_logp).exp()
        loss = -(ratio * advantage).mean() - 0.01 * r.entropy.mean()

    Args: hidden, weight, labels, bias, chunk_bytes, skip_ignored as in `fused_linear_deft_loss`; the others
        as in `row_statistics`.
    Returns: as `row_statistics`; the logits are those that F.linear would give, in its dtype, and gradients
        have the dtypes of hidden, weight and bias, the latter two summed in fp32 and cast once.
    Raises: as `fused_linear_deft_loss`.
    Memory: as there: one buffer of logits, 19 numbers a row. Matrix products: 1 forward, and in the backward
        the logits once more and 2 for the gradients.
        With a group: one all-gather of 7 numbers a row for each chunk of the forward, and one all-reduce of
        hidden's gradient.
    Limits: first derivatives only. On a GPU the host waits once for the number of rows that count, unless
        skip_ignored is False.
    Source: docs/mathematics.md; examples in docs/recipes.md.
    """
    request = checked(keywords)
    call = _Call.of(hidden, weight, bias, labels, request)
    if call.backend == "reference":
        return statistics_of_logits(call.logits(), labels, request)
    return call.statistics(request)


class _Call:
    """A checked call: what its operators share."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        request: Request,
        backend: str,
        shard: Shard | None,
        product: torch.dtype,
    ):
        self.backend, self.shard, self.product = backend, shard, product
        self.shape, self.ignore_index = labels.shape, request.ignore_index
        self.vocabulary = weight.shape[0] if shard is None else shard.size
        columns = self.vocabulary if shard is None else -(-shard.size // shard.ranks)
        grad = torch.is_grad_enabled()
        summed = grad and weight.requires_grad
        self.budget = buffer_bytes(request.chunk_bytes, hidden, columns, product, summed)
        self.hidden = hidden
        self.inputs = (hidden.reshape(-1, hidden.shape[-1]), weight, bias)
        self.wanted = [grad and tensor is not None and tensor.requires_grad for tensor in self.inputs]
        self.labels = aligned(labels, request.shift, request.ignore_index)

    @classmethod
    def of(cls, hidden: Any, weight: Any, bias: Any, labels: Any, request: Request) -> _Call:
        """Raises where the arguments and the request do not fit together."""
        if request.group is not None and (is_dtensor(weight) or is_dtensor(bias)):
            raise ValueError("group: weight and bias are to be this rank's own rows; pass weight.to_local()")
        class_weight, token_weight = request.class_weight, request.token_weight
        terms = request.terms()
        given = {"labels": labels, "token_weight": token_weight, "class_weight": class_weight}
        given |= {"num_items": request.num_items} | ({} if terms is None else terms.tensors())
        refuse_dtensors(given, "hidden")
        hidden, weight, bias = whole(hidden, weight, bias)
        check_head(hidden, weight, bias, request.group is not None)
        outline = checks.Outline((*hidden.shape[:-1], weight.shape[0]), hidden.device)
        checks.check_labels(labels, outline)
        checks.check_token_weight(token_weight, labels, outline)
        product = product_dtype(hidden, weight, bias)
        backend = choice.choose(request.backend, hidden.device, product)
        if backend != "reference":
            check_no_transforms(hidden, weight, bias)
        place = (weight.shape[0], hidden.device, backend, labels, request.ignore_index, class_weight)
        call = cls(hidden, weight, bias, labels, request, backend, shard_of(request.group, *place), product)
        checks.check_class_weight(class_weight, outline, call.vocabulary, "class_weight")
        return call

    def logits(self) -> Tensor:
        return torch.nn.functional.linear(self.hidden, *self.inputs[1:])

    def _settings(self, spec: Spec) -> tuple[Any, ...]:
        return (self.wanted, self.product, self.budget, self.ignore_index, *spec.encode())

    def of_objective(self, spec: Spec, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(loss, rows); the loss [N] for "none"."""
        classes = weighting.class_weight
        if self._in_forward(spec, weighting):
            args = (*self.inputs, self.labels, self._scale(weighting), classes, *self._settings(spec))
            loss, rows, *_ = hidden_operators.loss_with_gradient(*args)
            return loss, rows
        args = (*self.inputs, self.labels, classes, *self._settings(spec))
        loss, rows = hidden_operators.row_loss(*args)
        return weighting.reduce(loss, rows[Field.KEPT] != 0, self.labels), rows

    def _scale(self, weighting: Weighting) -> Tensor:
        """d loss / d row of a mean or a sum, [N]."""
        by_kernel = self.backend == "triton" and weighting.counts_rows and not watched(self.labels)
        args = (weighting, self.labels, self.ignore_index, self.product)
        return functions.row_scale(*args, by_kernel=by_kernel)

    def _in_forward(self, spec: Spec, weighting: Weighting) -> bool:
        if not any(self.wanted) or self.product == torch.float16:
            return False
        # The operator makes the extra pass for cayley's mean, so the rows wait for nothing here.
        if spec.objective.needs_batch:
            spec = replace(spec, objective=replace(spec.objective, mean_prob=0.0, batch_group=""))
        return in_forward_obstacle(spec, weighting) is None

    def of_terms(self, terms: Terms, spec: Spec, weighting: Weighting) -> tuple[Tensor, Tensor]:
        """(loss, rows); with three products in plain eager calls, with four where somebody traces."""
        classes, ignore_index = weighting.class_weight, self.ignore_index
        tensors = [x for x in (*self.inputs, self.labels, classes) if x is not None]
        if self._in_forward(spec, weighting) and not watched(*tensors):
            loss, rows, *_ = terms_operators.LinearLossWithGradient.apply(
                *self.inputs,
                self.labels,
                self._scale(weighting),
                classes,
                terms,
                self.wanted,
                self.product,
                self.budget,
                ignore_index,
                spec,
            )
            return loss, rows
        with torch.no_grad():
            inputs = [None if x is None else x.detach() for x in self.inputs]
            plain, rows = hidden_operators.row_loss(*inputs, self.labels, classes, *self._settings(spec))
        own = terms_operators.values_of(terms, rows, self.labels, ignore_index, self.vocabulary)
        args = (*self.inputs, self.labels, classes, rows, plain, own)
        losses, rows = terms_operators.linear_row_loss(
            *args, self.wanted, self.product, self.budget, *spec.encode()
        )
        return weighting.reduce(losses, rows[Field.KEPT] != 0, self.labels), rows

    def statistics(self, request: Request) -> RowStatistics:
        """Every row's statistics, differentiable."""
        spec = request.spec_of_statistics(self.backend, self.shard)
        outputs = hidden_operators.statistics(*self.inputs, self.labels, *self._settings(spec))
        return differentiable_record(outputs, self.shape, self.vocabulary)
