"""The records of the kernels: what belongs together, under one name.

Triton takes a NamedTuple as an argument of a kernel and of its own functions, and as what they return, field
by field: a record costs no instruction. `Options` and `Plan` hold constexprs (`static` makes them), so that
an `if` on one of their fields is decided when a kernel is compiled. Parameters that hold one are not
annotated: under `tl.constexpr` Triton 3.6 hands out the fields as plain Python values, and fails on them.
"""

from typing import Any, NamedTuple, TypeVar

import triton.language as tl

from ...core.statistics import Field

R = TypeVar("R", bound=tuple[Any, ...])


def static(record: R) -> R:
    """The record with its fields as constexprs."""
    return type(record)(*map(tl.constexpr, record))


# Arguments of kernels

# Integers that change from call to call and only say where a row's scalars lie, or which label counts for
# nothing. Triton would compile a kernel anew where one of them is 1, or a multiple of 16.
UNSPECIALISED = (
    "n_rows",
    "splits",
    "ignore_index",
    "dloss_stride",
    "scale_stride",
    "stride_outer",
    "stride_inner",
)


class Strides(NamedTuple):
    """Row r lies at (r // inner) outer + (r % inner) stride, in elements."""

    inner: Any
    outer: Any
    stride: Any


class Numbers(NamedTuple):
    """Of one loss, fp32, the same for every row."""

    k: Any  # log2(e) / temperature
    temperature: Any
    softcap: Any
    alpha: Any
    eps: Any
    power: Any
    scale: Any  # 1 / ln top_k
    floor: Any  # of the Cayley focus index, where it does not wait for the batch
    low: Any
    high: Any
    z_loss: Any
    smoothing: Any
    spread: Any  # smoothing / (V temperature)


class Options(NamedTuple):
    """Which variant a kernel is. A kernel gets those that it reads, the others as they stand here: so
    objectives share the kernels in which they do not differ."""

    mode: str  # see `arithmetic`
    # Of the logits and their reduction.
    softcap: bool = False
    smoothed: bool = False
    weighted: bool = False
    entropy: bool = False
    ties: bool = False  # count the columns with the largest logit
    predicted: bool = False  # find the first of them
    # Of the objective, see `objectives` and `finish`.
    focus: str = "fixed"
    family: str = "none"
    through: str = "held"  # the statistic through which the gate is differentiated; held: none
    banded: bool = False
    z_loss: bool = False
    # Of the gradient: its terms in p^2, in p log p, and at the largest logit.
    squares: bool = False
    logs: bool = False
    peaks: bool = False


class Plan(NamedTuple):
    """A program: `lanes` threads, each with `width` columns a load. The rest is told by `launch.peel` (rows
    begin off a 16-byte boundary) and `tuning.Launch`."""

    lanes: int
    width: int
    peel: bool = False
    tail: bool = False
    near: bool = False
    deep: bool = False


# Inside of kernels


class Matrix(NamedTuple):
    """Rows of logits, or of their gradient."""

    ptr: Any
    strides: Strides
    vocabulary: Any


class Row(NamedTuple):
    """The columns [start, stop) of a row, counted from where `ptr` points."""

    ptr: Any
    class_weight: Any  # of column 0, where weights are given
    start: Any
    stop: Any


class State(NamedTuple):
    """Of a row's softmax, over some of its columns; see `state`."""

    peak: Any
    offset: Any
    s: Any
    u: Any
    t: Any
    zsum: Any


class Reduced(NamedTuple):
    """All that is kept of the columns of a row."""

    state: State
    z_target: Any  # the target's logit, soft-capped; NaN for a label out of range, so that the row shows it
    ties: Any
    predicted: Any  # 1 + the first column with the largest logit; 0 for none, or where nobody asks


class Statistics(NamedTuple):
    """Of a whole row: what `statistics.RowStatistics` shows, and what its numbers came from."""

    logp: Any
    p: Any  # of the target
    lse: Any
    collision: Any
    entropy: Any
    max_prob: Any
    s: Any  # sum of all 2^x_j
    log_sum: Any  # lse - peak / temperature
    x_peak: Any


class Weights(NamedTuple):
    target: Any  # w_y
    total: Any  # sum of w


class Saved(NamedTuple):
    """The packed buffer [len(Field), N] between forward and backward."""

    fields: Any
    n_rows: Any  # int64, as a field's place times it need not fit 32 bits


class Gradient(NamedTuple):
    """What the pass over a row needs to write its gradient:

    dL/dz_j = e_j (a + b e_j + c x_j) + peak_grad [z_j = peak] - spread w_j,  x_j = k z_j - offset,
    e_j = 2^x_j, and `target` in the label's column.
    """

    offset: Any
    peak: Any
    a: Any
    b: Any
    c: Any
    peak_grad: Any
    target: Any
    spread: Any


class Fields(NamedTuple):
    """A row's numbers in the packed buffer, in the order of `core.statistics.Field`."""

    logp: Any
    lse: Any
    collision: Any
    entropy: Any
    max_prob: Any
    correct: Any
    alpha: Any
    gate: Any
    kept: Any
    offset: Any
    sum: Any
    peak: Any
    ties: Any
    predicted: Any
    a: Any
    b: Any
    c: Any
    peak_grad: Any
    target: Any


assert Fields._fields == tuple(field.name.lower() for field in Field)

# The places of the fields in the buffer, for kernels: `FIELD.value.kept`. One constant for all of them, as
# each costs the host half a microsecond a launch (see `arithmetic`).
FIELD = tl.constexpr(Fields(*range(len(Field))))
