"""The keywords of the public calls: declared here, checked here, and then one frozen record.

A keyword is a line of one of the tables, with its type and its default: the type checker and the signature
that `help` shows take it from there. Its check is in `checked`, and its value goes into `Request`, the record
that the public calls pass on.
"""

# No `from __future__ import annotations`: the defaults are read from the annotations.

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from ..objectives import Objective, nll, of_statistics
from ..row_objectives import Anchor, RowObjective, Terms
from . import arguments, checks
from .agreement import fingerprint_of
from .groups import Shard, VocabShard
from .inputs import described
from .keywords import declarations
from .reduction import Reduction, Weighting
from .spec import Spec
from .statistics import RowLoss

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class OfObjective(TypedDict, total=False):
    """What is trained. Each annotation is the keyword's type and its default."""

    objective: Annotated[str | Objective | RowObjective | RowLoss, "deft"]
    reduction: Annotated[Reduction, "mean"]


class OfBatch(TypedDict, total=False):
    """What goes with the rows of one batch, and so with the call of a module, not its making."""

    token_weight: Annotated[Tensor | None, None]
    num_items: Annotated[Tensor | float | None, None]
    reference_logp: Annotated[Tensor | None, None]


class OfCaller(TypedDict, total=False):
    """What the trainer, its model or its ranks decide, where a trainer makes the call."""

    ignore_index: Annotated[int, -100]
    shift: Annotated[bool | int, False]
    logit_scale: Annotated[float, 1.0]
    softcap: Annotated[float | None, None]
    group: Annotated["ProcessGroup | VocabShard | None", None]


class OfUser(TypedDict, total=False):
    """What the user decides, whoever makes the call: every trainer that passes keywords on has these."""

    temperature: Annotated[float, 1.0]
    backend: Annotated[str, "auto"]


class OfRows(OfCaller, OfUser, total=False):
    """The keywords of `row_statistics`, which every call has."""


class OfZLoss(TypedDict, total=False):
    z_loss: Annotated[float, 0.0]


class OfSmoothing(TypedDict, total=False):
    label_smoothing: Annotated[float, 0.0]


class OfAnchor(TypedDict, total=False):
    anchor: Annotated[float, 0.0]


class OfLoss(OfObjective, OfRows, OfZLoss, OfSmoothing, OfAnchor, total=False):
    """What is trained, and of which rows."""


class OfBuffer(TypedDict, total=False):
    inplace: Annotated[bool, False]


class OfGradient(OfBuffer, total=False):
    """How the gradient by the logits is made."""

    grad_in_forward: Annotated[bool | None, None]


class OfLogits(OfLoss, OfGradient, total=False):
    """The keywords of `DEFTLoss`."""


class OfChunks(TypedDict, total=False):
    chunk_bytes: Annotated[int | None, None]
    skip_ignored: Annotated[bool, True]


class OfHidden(OfLoss, OfChunks, total=False):
    """The keywords of `FusedLinearDEFTLoss`."""


class RowsOfHidden(OfRows, OfChunks, total=False):
    """The keywords of `fused_linear_row_statistics`."""


class OfWeight(TypedDict, total=False):
    weight: Annotated[Tensor | None, None]


class OfClassWeight(TypedDict, total=False):
    """`weight`, in calls whose `weight` is the head's."""

    class_weight: Annotated[Tensor | None, None]


class LossOfLogits(OfLogits, OfBatch, OfWeight, total=False):
    """The keywords of `deft_loss`."""


class LossOfHidden(OfHidden, OfBatch, OfClassWeight, total=False):
    """The keywords of `fused_linear_deft_loss`."""


DEFAULTS = {
    name: default for table in (LossOfLogits, LossOfHidden) for name, _, default in declarations(table)
}


class Request(NamedTuple):
    """What a call asks for, its keywords checked as far as they can be without its tensors.

    objective: a description, a formula of rows, or a function of RowStatistics.
    class_weight: `weight` in calls over logits.
    shift: positions between a logit and its label, 0 where they are aligned already.
    softcap, temperature: z = softcap tanh(logits / softcap) / temperature, `logit_scale` folded in; a softcap
    of 0 is none.
    """

    objective: Objective | RowObjective | RowLoss
    reduction: Reduction
    ignore_index: int
    token_weight: Tensor | None
    class_weight: Tensor | None
    num_items: Tensor | float | None
    reference_logp: Tensor | None
    shift: int
    softcap: float
    temperature: float
    z_loss: float
    label_smoothing: float
    anchor: float
    inplace: bool
    grad_in_forward: bool | None
    chunk_bytes: int | None
    skip_ignored: bool
    return_stats: bool
    group: Any
    backend: str

    def terms(self) -> Terms | None:
        """What formulas of the rows train, None for nothing; a function of RowStatistics has none."""
        objective = self.objective if isinstance(self.objective, RowObjective) else None
        anchor = None if self.reference_logp is None else Anchor(self.anchor, self.reference_logp)
        return None if objective is None and anchor is None else Terms(objective, anchor)

    def spec(self, backend: str, shard: Shard | None) -> Spec:
        """What the operators have to know of it, the objective being no function. backend: the one chosen."""
        objective, statistics = self.objective, self.return_stats
        if isinstance(objective, RowObjective):
            statistics = statistics or objective.needs_statistics
            # Of its statistics and of the rows that count: what it trains is put in their place.
            objective = replace(nll(), low=objective.low, high=objective.high)
        assert isinstance(objective, Objective)
        return Spec(
            objective,
            self.softcap,
            self.temperature,
            self.z_loss,
            self.label_smoothing,
            self.anchor,
            statistics,
            self.inplace,
            backend,
            shard,
            self.skip_ignored,
            self._formula(),
        )

    def _formula(self) -> str:
        """For the ranks of a group to compare: its name, and under validation what is given with the rows."""
        if self.group is None:
            return ""
        terms = self.terms()
        if terms is None:
            return ""
        name = "" if terms.objective is None else terms.objective.name
        if not checks.validating() or torch.compiler.is_compiling():
            return name
        return " ".join([name, *(str(fingerprint_of(x.reshape(-1))) for x in terms.tensors().values())])

    def spec_of_statistics(self, backend: str, shard: Shard | None) -> Spec:
        """Of `row_statistics`: what acts on the logits, and every statistic."""
        return Spec(
            of_statistics(),
            softcap=self.softcap,
            temperature=self.temperature,
            statistics=True,
            backend=backend,
            shard=shard,
            skip_ignored=self.skip_ignored,
        )

    def weighting(self) -> Weighting:
        return Weighting(self.reduction, self.token_weight, self.class_weight, self.num_items)

    def for_reference(self) -> dict[str, Any]:
        """The keywords of `reference.loss`."""
        return {
            "objective": self.objective,
            "reduction": self.reduction,
            "ignore_index": self.ignore_index,
            "token_weight": self.token_weight,
            "weight": self.class_weight,
            "num_items": self.num_items,
            "softcap": self.softcap or None,
            "temperature": self.temperature,
            "z_loss": self.z_loss,
            "label_smoothing": self.label_smoothing,
            "anchor": self.anchor,
            "reference_logp": self.reference_logp,
        }


def checked(keywords: Mapping[str, Any], return_stats: bool = False) -> Request:
    """The record of a call's keywords, all of which it has.

    Raises: TypeError, ValueError that name the keyword, for a value that no call can honour.
    """
    given = {**DEFAULTS, **keywords}
    reduction: Any = arguments.one_of("reduction", given["reduction"], arguments.REDUCTIONS)
    scale = arguments.number("logit_scale", given["logit_scale"], 0.0, above=True)
    cap, anchor = given["softcap"], arguments.number("anchor", given["anchor"], 0.0)
    checks.check_anchor(anchor, given["reference_logp"])
    in_forward, chunk_bytes = given["grad_in_forward"], given["chunk_bytes"]
    request = Request(
        described(given["objective"]),
        reduction,
        arguments.label("ignore_index", given["ignore_index"]),
        given["token_weight"],
        given["weight"] if given["class_weight"] is None else given["class_weight"],
        checks.number_of_items(given["num_items"], reduction),
        given["reference_logp"],
        arguments.positions("shift", given["shift"]),
        # Both divided by the scale, so that no kernel multiplies by it.
        0.0 if cap is None else arguments.number("softcap", cap, 0.0, above=True) / scale,
        arguments.number("temperature", given["temperature"], 0.0, above=True) / scale,
        arguments.number("z_loss", given["z_loss"], 0.0),
        arguments.number("label_smoothing", given["label_smoothing"], 0.0, 1.0),
        anchor,
        arguments.flag("inplace", given["inplace"]),
        None if in_forward is None else arguments.flag("grad_in_forward", in_forward),
        None if chunk_bytes is None else arguments.bytes_of("chunk_bytes", chunk_bytes),
        arguments.flag("skip_ignored", given["skip_ignored"]),
        arguments.flag("return_stats", return_stats),
        given["group"],
        arguments.one_of("backend", given["backend"], arguments.BACKENDS),
    )
    arguments.check_quotient("temperature", request.temperature)
    if cap is not None:
        arguments.check_quotient("softcap", request.softcap)
    return request


def check_values(keywords: Mapping[str, Any]) -> None:
    """Of keywords that are written before the first batch comes, so that a wrong one raises where it stands.

    Raises: as `checked`, but for what needs a keyword of `OfBatch` beside it.
    """
    checked({**keywords, "anchor": 0.0}, keywords.get("return_stats", False))
    arguments.number("anchor", keywords.get("anchor", 0.0), 0.0)
    for name in ("weight", "class_weight"):
        checks.check_weights(keywords.get(name), name)
