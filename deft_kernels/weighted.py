"""Objectives that weigh -logp by a function of the row's own statistics: `objectives.weighted`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .core import arguments
from .core.statistics import RowStatistics
from .row_objectives import RowObjective, Values


@dataclass(frozen=True, eq=False, kw_only=True)
class Weighted(RowObjective):
    """loss = w (-logp) with w = function(statistics, **inputs) held constant; see `objectives.weighted`."""

    function: Callable[..., Tensor]

    def values(self, stats: RowStatistics, inputs: Mapping[str, Tensor]) -> Values:
        given = [] if torch.compiler.is_compiling() else [*stats, *inputs.values()]
        # A trace would have to know the counters; tensors of inference mode have none.
        counted = [x for x in given if x is not None and not x.is_inference()]
        before = [x._version for x in counted]
        weights = self.function(stats, **inputs)
        if not isinstance(weights, Tensor) or weights.shape != stats.logp.shape:
            got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise ValueError(
                f"objective: {self.name}'s function must return one weight a row, shape "
                f"{tuple(stats.logp.shape)}, got {got}"
            )
        if weights.requires_grad:
            raise ValueError(
                f"objective: {self.name}'s weights require a gradient, but are held constant: detach, or "
                "pass a function of RowStatistics that returns the loss"
            )
        if [x._version for x in counted] != before:
            raise ValueError(f"objective: {self.name}'s function changes its arguments in place")
        weights = weights.to(stats.logp.dtype)
        # A target of probability 0 and weight 0: the limit of p ln p.
        loss = -weights * stats.logp.where(weights != 0, 0.0)
        return Values(loss, weights, torch.zeros_like(loss), weights)


def weighted(function: Callable[..., Tensor], *, name: str = "weighted", **row_inputs: Tensor) -> Weighted:
    """loss = w (-logp), gate w = function(r, **row_inputs), which is held constant.

    Unlike a function of differentiable statistics it needs no autograd over rows: every mode of the calls is
    available, and the linear call makes its gradients with three matrix products instead of four.

    function: takes `RowStatistics` r, detached, alpha and gate None, and the row inputs; returns one weight a
        row. It sees rows as a vector, in the linear call a chunk of them at a time: it may not mix rows. In
        place of an ignored row it sees one with probabilities 1/2, 1/4, 1/4, and row inputs of 1.
    row_inputs: tensors of the labels' shape (a reference model's logp, a weight of the data set). Like
        `token_weight`, the entry at t goes with the logits at t, whose label is labels[..., t + n] with
        shift=n.
    Statistics of a call show the weight as gate, and 0 as alpha.
    Raises: TypeError, ValueError for a function that cannot be called, inputs that are no tensors; in the
        call for inputs of another shape, weights of another shape, weights that require a gradient.

        entropic = objectives.weighted(lambda r: (1 + r.entropy))
        loss = deft_loss(logits, labels, objective=entropic)
    """
    if not callable(function):
        raise TypeError(f"function: expected a function of RowStatistics, got {arguments.kind_of(function)}")
    for key, value in row_inputs.items():
        if not isinstance(value, Tensor):
            raise TypeError(f"{key}: expected a Tensor of the labels' shape, got {arguments.kind_of(value)}")
        if value.is_complex():
            raise TypeError(f"{key}: expected a real dtype, got {value.dtype}")
    return Weighted(name=name, function=function, inputs=dict(row_inputs))


def chord() -> Weighted:
    """loss = phi (-logp), phi = p (1 - p) held constant: nothing for what is known or hopeless.

    Source: the token weight of CHORD, arXiv:2508.11408.
    """
    return weighted(_chord_weight, name="chord")


# Weights with a name, as a lambda cannot be pickled.
def _chord_weight(r: RowStatistics) -> Tensor:
    return r.logp.exp() * -torch.expm1(r.logp)


def infosft(threshold: float = 0.93) -> Weighted:
    """loss = w (-logp), w = p max(0, 1 - logit(p) / logit(threshold)) held constant.

    logit(p) = ln(p / (1 - p)). Most for tokens of medium probability, and nothing from p = threshold on.
    threshold: a probability above 1/2, `P` in the authors' code, whose default it is.
    Source: InfoSFT, arXiv:2605.14967; its constant C is logit(threshold), and its weight that of the authors'
    training code, divided by C.
    """
    threshold = arguments.number("threshold", threshold, 0.5, above=True)
    if threshold >= 1.0:
        raise ValueError(f"threshold: expected a probability below 1, got {threshold}")
    scale = 1.0 / (math.log(threshold) - math.log1p(-threshold))
    return weighted(partial(_infosft_weight, scale=scale), name="infosft")


def _infosft_weight(r: RowStatistics, scale: float) -> Tensor:
    p = r.logp.exp()
    # p logit(p), whose limit at p = 0 is 0; entr(p) is -p ln p.
    odds = -torch.special.entr(p) - p * torch.log(-torch.expm1(r.logp))
    return (p - scale * odds).clamp(min=0.0)


def dft_to_a_power(power: float, detach: bool) -> Weighted:
    """`objectives.dft` of a power that is not 1."""
    if not detach:
        raise ValueError(f"detach: False is for power=1, got power={power}")
    return weighted(partial(_dft_weight, power=power), name="dft")


def _dft_weight(r: RowStatistics, power: float) -> Tensor:
    return (power * r.logp).exp()


def mile(gamma: float = 1.0) -> Weighted:
    """loss = (1 + H)^gamma (-logp), H the row's Shannon entropy in nats, held constant.

    Source: MiLe Loss, arXiv:2310.19531.
    """
    gamma = arguments.number("gamma", gamma, 0.0)
    return weighted(partial(_mile_weight, gamma=gamma), name="mile")


def _mile_weight(r: RowStatistics, gamma: float) -> Tensor:
    return (1.0 + r.entropy) ** gamma
