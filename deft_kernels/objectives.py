"""The objectives: one row of the table is one frozen description, read by every backend.

Every objective is a function of a row's statistics: `logp`, the log-probability of the target; the
collision probability S = sum p^2 = exp(-H_2); the Shannon entropy H; the largest probability max p. All
logarithms are natural, so entropies are in nats. `p` is exp(logp); `alpha` is the focus index, the
exponent of the trust gate; the gate is what multiplies the cross-entropy error (p - onehot).

    name            loss                       gate            alpha or weight
    nll             -logp                      1               alpha = 0; also "ce" and "cross_entropy"
    neg_prob        1 - p                      p               alpha = 1
    tsallis(alpha)  (1 - p^alpha) / alpha      p^alpha         fixed; q = 1 - alpha
    deft(order)     (1 - p^alpha) / alpha      p^alpha         alpha = exp(-H_order), order 2, 1 or inf
    cayley          (1 - p^alpha) / alpha      p^alpha         alpha from p and the batch's mean p
    rational(alpha) -logp / (1 - alpha logp)   (1-alpha logp)^-2   fixed, or "collision"
    dft             w (-logp)                  w = p
    eaft            w (-logp)                  w = (H / ln top_k)^power

Sources: DEFT, Cayley and the deformed-log family: arXiv:2602.11424; -p, thresholds: arXiv:2510.00526;
DFT: arXiv:2508.05629; EAFT: arXiv:2601.02151; Tsallis q-logarithm: doi:10.1007/BF01016429.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from torch import Tensor

from .core.arguments import flag, kind_of, number, one_of
from .core.bands import bounds
from .core.groups import group_name
from .row_objectives import RowObjective as RowObjective
from .row_objectives import tsallis_of_rows as _tsallis_of_rows
from .weighted import Weighted as Weighted
from .weighted import chord as chord
from .weighted import dft_to_a_power as _dft_to_a_power
from .weighted import infosft as infosft
from .weighted import mile as mile
from .weighted import weighted as weighted

Focus = Literal[
    "fixed", "collision", "shannon", "max_prob", "cayley", "prob", "entropy", "statistics", "statistics+max"
]
Family = Literal["deformed", "rational", "weighted", "none"]
# Which focus a family can have; there is no formula for any other.
FOCI: dict[Family, tuple[Focus, ...]] = {
    "deformed": ("fixed", "collision", "shannon", "max_prob", "cayley"),
    "rational": ("fixed", "collision"),
    "weighted": ("prob", "entropy"),
    "none": ("statistics", "statistics+max"),
}


@dataclass(frozen=True)
class Objective:
    """Description of an objective; make one with the functions of this module.

    name: for display; the rest decides. A field that the formula does not read has to keep its default.
    family: how a row's loss follows from (logp, focus): "deformed" is the Tsallis logarithm, "rational" the
        log(x)/(1+(q-1)log(x)) form, "weighted" a weight on -logp.
    focus: where the focus index (or the weight) comes from.
    detach: hold the gate constant (the paper's choice); False differentiates through it exactly.
    low, high: rows with p outside [low, high] are dropped: zero loss, zero gradient, not counted by a mean.
    mean_prob: `cayley` only: the batch's mean p, when it is known; None computes it from the batch.
    batch_group: name of the process group whose ranks make up that batch; empty for this process alone.
    Raises: ValueError, TypeError for what describes no objective, naming the field.
    """

    name: str
    family: Family
    focus: Focus
    alpha: float = 0.0
    eps: float = 0.0
    power: float = 1.0
    top_k: float = 20.0
    detach: bool = True
    low: float = 0.0
    high: float = 1.0
    mean_prob: float | None = None
    batch_group: str = ""

    def __post_init__(self) -> None:
        one_of("family", self.family, FOCI)
        if not isinstance(self.focus, str) or self.focus not in FOCI[self.family]:
            known = ", ".join(FOCI[self.family])
            raise ValueError(f"focus: {self.family!r} has none called {self.focus!r}; known: {known}")
        flag("detach", self.detach)
        if not isinstance(self.batch_group, str):
            raise TypeError(f"batch_group: expected the name of a group, got {kind_of(self.batch_group)}")
        number("alpha", self.alpha, 0.0)
        number("eps", self.eps, 0.0)
        number("power", self.power, 0.0, above=True)
        number("top_k", self.top_k, 1.0, above=True)
        number("low", self.low, 0.0, 1.0)
        number("high", self.high, self.low, 1.0)
        moving = self.family == "deformed" and self.focus != "fixed"
        entropy = self.focus == "entropy"
        cayley = self.focus == "cayley"
        # For dft alpha is the exponent of its weight, 1.
        alpha = 1.0 if self.focus == "prob" else 0.0
        unread = {
            "alpha": self.focus != "fixed" and self.alpha != alpha,
            "eps": not moving and self.eps != 0.0,
            "power": not entropy and self.power != 1.0,
            "top_k": not entropy and self.top_k != 20.0,
            "mean_prob": not cayley and self.mean_prob is not None,
            "batch_group": not cayley and self.batch_group != "",
        }
        for name, given in unread.items():
            if given:
                raise ValueError(
                    f"{name}: not read by family {self.family!r} with focus {self.focus!r}, "
                    f"got {getattr(self, name)!r}"
                )
        if self.mean_prob is not None:
            number("mean_prob", self.mean_prob, 0.0, 1.0)
            if self.batch_group:
                raise ValueError("batch_group: mean_prob is given, there is nothing to take the mean of")

    @property
    def needs_entropy(self) -> bool:
        return self.focus in ("shannon", "entropy", "statistics", "statistics+max")

    @property
    def needs_batch(self) -> bool:
        """Whether a row's loss depends on the other rows (the Cayley floor)."""
        return self.focus == "cayley" and self.mean_prob is None

    @property
    def has_band(self) -> bool:
        return self.low > 0.0 or self.high < 1.0

    def within(self, keep: str | tuple[float, float]) -> Objective:
        """The same objective, restricted to rows whose target probability lies in a band.

        keep: "p>=0.1", "p<=0.5", "0.1<=p<=0.5", or (low, high). Both ends belong to the band.
        Source: the Only-Top-P and Only-Bottom-P baselines of arXiv:2510.00526.
        Raises: ValueError for a text that is no band, or bounds that are not 0 <= low <= high <= 1.
        """
        low, high = bounds(keep)
        return replace(self, low=low, high=high)


def nll() -> Objective:
    """Cross-entropy: loss = -logp, gate 1."""
    return Objective("nll", "deformed", "fixed", alpha=0.0)


def neg_prob() -> Objective:
    """loss = 1 - p, gate p; the "-p" objective of arXiv:2510.00526, shifted by 1 to be non-negative."""
    return Objective("neg_prob", "deformed", "fixed", alpha=1.0)


@overload
def tsallis(alpha: Tensor) -> RowObjective: ...
@overload
def tsallis(alpha: float | None = None, *, q: float | None = None) -> Objective: ...
def tsallis(alpha: float | Tensor | None = None, *, q: float | None = None) -> Objective | RowObjective:
    """loss = (1 - p^alpha) / alpha = -ln_q(p) with q = 1 - alpha, gate p^alpha.

    alpha: a number >= 0 that fp32 holds; 0 is `nll`, 1 is `neg_prob`. Give alpha or q, not both. What the
        authors' trainer calls GeneralFamily-q is tsallis(alpha=q). Or a floating tensor, held constant: of
        the labels' shape, a focus index for each token, 0 and 1 choosing `nll` or `neg_prob` token by token;
        or of no dimension, one that may change from call to call without another compilation and without
        the host waiting. Like `token_weight`, the entry at t goes with the logits at t, whose label is
        labels[..., t + n] with shift=n. Statistics show it as alpha. Where it is NaN, so is its row.
    Raises: ValueError when both or neither are given, or alpha is negative or infinite (a tensor: in the
        call, on a CPU and with DEFT_KERNELS_VALIDATE=1 on a device; else its rows are NaN) or requires a
        gradient; TypeError for a tensor of integers.
    """
    if (alpha is None) == (q is None):
        raise ValueError("alpha, q: give exactly one of them (q = 1 - alpha)")
    if isinstance(alpha, Tensor):
        return _tsallis_of_rows(alpha)
    value = number("alpha", alpha, 0.0) if alpha is not None else 1.0 - number("q", q, -math.inf, 1.0)
    return Objective("tsallis", "deformed", "fixed", alpha=value)


def deft(order: float = 2, *, detach: bool = True, eps: float = 0.0) -> Objective:
    """loss = (1 - p^alpha) / (alpha + eps), alpha = exp(-H_order), H_order the Renyi entropy of the row.

    order: 2 (default): alpha = sum p^2; 1: alpha = exp(-H), Shannon; math.inf: alpha = max p.
    detach: hold alpha constant (the paper's choice). False: exact gradient, alpha differentiated too.
    eps: 0 is exact; 1e-6 is what the authors' trainer adds to the denominator, which damps loss and
        gradient by alpha / (alpha + eps): 13 % for a uniform row at V = 151,936.
    Source: arXiv:2602.11424. Raises: ValueError for another order.
    """
    foci: dict[float, Focus] = {2.0: "collision", 1.0: "shannon", math.inf: "max_prob"}
    if isinstance(order, bool) or not isinstance(order, numbers.Real) or order not in foci:
        raise ValueError(f"order: expected 1, 2 or math.inf, got {order!r}")
    eps = number("eps", eps, 0.0)
    return Objective("deft", "deformed", foci[float(order)], detach=flag("detach", detach), eps=eps)


def cayley(
    *, detach: bool = True, eps: float = 0.0, mean_prob: float | None = None, batch_group: Any = None
) -> Objective:
    """loss = (1 - p^alpha) / (alpha + eps), alpha on the Cayley focus trajectory.

    With the uncertainty radius r = 1 - p: alpha_local = (1 - r)/(1 + r) = p/(2 - p); floor = mean_prob / 2;
    alpha = floor + (1 - floor) alpha_local, clamped to [0.001, 1].

    mean_prob: mean of p over the rows that are not ignored; None computes it from the batch. That costs no
        extra read of the logits, but a row's loss then depends on its batch. It is always held constant.
    batch_group: a torch.distributed group (data-parallel ranks) over whose rows the mean is taken, by one
        all-reduce of two numbers in the forward, in which every rank of the group has to take part; None
        takes the mean over this process's rows. The loss's own mean is always over this process's rows: see
        `num_items`.
    detach: False differentiates through alpha_local (the floor stays constant).
    eps: 1e-8 is what the authors' trainer adds: to r, to 1 + r and to alpha.
    Source: arXiv:2602.11424.
    """
    if mean_prob is not None:
        if batch_group is not None:
            raise ValueError("batch_group: mean_prob is given, there is nothing to take the mean of")
        mean_prob = number("mean_prob", mean_prob, 0.0, 1.0)
    name = "" if batch_group is None else group_name(batch_group, "batch_group")
    eps, detach = number("eps", eps, 0.0), flag("detach", detach)
    return Objective(
        "cayley", "deformed", "cayley", 0.0, eps, detach=detach, mean_prob=mean_prob, batch_group=name
    )


def rational(alpha: float | str = "collision", *, detach: bool = True) -> Objective:
    """loss = -logp / (1 - alpha logp), gate (1 - alpha logp)^-2: log(x) / (1 + (q-1) log(x)), q = 1 - alpha.

    alpha: a number >= 0, or "collision" for alpha = sum p^2 (then `detach` as in `deft`).
    """
    detach = flag("detach", detach)
    if isinstance(alpha, str):
        if alpha != "collision":
            raise ValueError(f"alpha: expected a number or 'collision', got {alpha!r}")
        return Objective("rational", "rational", "collision", detach=detach)
    alpha = number("alpha", alpha, 0.0)
    # At alpha = 0 it is -logp. The deformed logarithm has that case; this formula divides by alpha.
    return Objective("rational", "rational" if alpha > 0 else "deformed", "fixed", alpha=alpha, detach=detach)


@overload
def dft(*, detach: bool = True) -> Objective: ...
@overload
def dft(power: float) -> Weighted: ...
def dft(power: float = 1.0, *, detach: bool = True) -> Objective | Weighted:
    """loss = p^power (-logp), the weight held constant: the gradient of `tsallis(power)`, another loss value.

    Of a power that is not 1 `weighted`. A target with p = 0 has loss 0, the limit. Source: arXiv:2508.05629.
    """
    if number("power", power, 0.0, above=True) != 1.0:
        return _dft_to_a_power(power, flag("detach", detach))
    return Objective("dft", "weighted", "prob", alpha=1.0, detach=flag("detach", detach))


def eaft(power: float = 1.0, *, top_k: float = 20, detach: bool = True) -> Objective:
    """loss = w (-logp), w = (H / ln top_k)^power held constant, H the row's Shannon entropy in nats.

    H is exact over the whole vocabulary, where the public implementations use the top 20 logits and divide
    by ln 20 (LLaMA-Factory: by 3, which is ln 20 rounded: top_k=math.exp(3)). Source: arXiv:2601.02151.
    """
    power = number("power", power, 0.0, above=True)
    top_k = number("top_k", top_k, 1.0, above=True)
    return Objective("eaft", "weighted", "entropy", power=power, top_k=top_k, detach=flag("detach", detach))


def of_statistics(with_max: bool = True) -> Objective:
    """No loss at all: the row statistics themselves, each differentiable (`row_statistics`)."""
    focus: Focus = "statistics+max" if flag("with_max", with_max) else "statistics"
    return Objective("statistics", "none", focus, detach=False)


TABLE: dict[str, Callable[..., Objective]] = {
    "nll": nll,
    "ce": nll,
    "cross_entropy": nll,
    "neg_prob": neg_prob,
    "-p": neg_prob,
    "tsallis": tsallis,
    "deft": deft,
    "cayley": cayley,
    "rational": rational,
    "dft": dft,
    "eaft": eaft,
}

# What makes an objective, and is none.
BUILDERS: tuple[Callable[..., Any], ...] = (*TABLE.values(), chord, infosft, mile, weighted)

# Made once: making one would cost every call 2 us.
NAMED = {name: build() for name, build in TABLE.items() if build is not tsallis}


def resolve(objective: str | Objective) -> Objective:
    """The description behind a name; a description passes through.

    Raises: ValueError for an unknown name, TypeError for another type.
    """
    if isinstance(objective, Objective):
        if objective.family == "none":
            raise ValueError('objective: family "none" has no loss; it belongs to `row_statistics`')
        return objective
    if not isinstance(objective, str):
        raise TypeError(
            f"objective: expected a name or an Objective, such as objectives.deft(), got {kind_of(objective)}"
        )
    if objective not in TABLE:
        raise ValueError(f"objective: unknown name {objective!r}; known: {', '.join(sorted(TABLE))}")
    if objective == "tsallis":
        raise ValueError("objective: 'tsallis' needs its alpha: pass objectives.tsallis(alpha)")
    return NAMED[objective]
