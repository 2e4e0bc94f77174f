"""With DEFT_KERNELS_VALIDATE=1: a digest of all that the ranks of a group have to agree on, before each call.

compare     one all-gather, of the same size whatever the call, so that it also tells ranks whose calls do
            not fit together, and an error on every rank that names what differs
in_step     around a public call: tells the others of a rank that raises before the digest; and, under
            validation or not, makes the call again where the columns have moved
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

from . import checks
from .agreement import (
    ASKED,
    WIDTH,
    ColumnsMoved,
    covered,
    fingerprint,
    fingerprint_of,
    moved_or_wrong,
    objective_terms,
    validating,
)
from .groups import Shard, VocabShard, all_gather, group_of, remember
from .spec import Spec

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the digest compares, in the order of the message. A 0 stands for what a call does not know, and agrees
# with anything.
DIGEST = (
    "the call",
    "the number of rows",
    "the dtype",
    "labels",
    "ignore_index",
    "objective, its row inputs or reference_logp",
    "softcap, temperature, z_loss, label_smoothing or anchor",
    "weight (class weights)",
    "reduction, token_weight or num_items",
    "return_stats",
    "the size of hidden",
    "chunk_bytes",
    "skip_ignored",
    "which gradients are wanted",
)
CALLS = (
    "logits",
    "hidden, gradient in the forward",
    "hidden, gradient in the backward",
    "a question for the columns",
)
FAILED = -1

Call = TypeVar("Call", bound=Callable[..., Any])


class _Step:
    """Whether this process has taken part in the digest of the call that it is in."""

    compared = True


def compare(
    shard: Shard | None,
    width: int,
    labels: Tensor,
    dtype: torch.dtype,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    *,
    row_scale: Tensor | None = None,
    hidden: Tensor | None = None,
    gradient_in_forward: bool = False,
    budget: int = 0,
    wanted: bool = False,
) -> None:
    """Under validation, of every call with a group: what all ranks have to agree on, in one all-gather.

    Raises on every rank: ValueError that names what differs; ColumnsMoved.
    """
    if shard is None or not validating() or shard.ranks == 1:
        return
    call = CALLS[0] if hidden is None else CALLS[1] if gradient_in_forward else CALLS[2]
    digest = {
        "the call": CALLS.index(call) + 1,
        "the number of rows": labels.numel() + 1,
        "the dtype": DTYPES.index(dtype) + 1,
        "labels": fingerprint_of(labels),
        "ignore_index": fingerprint(ignore_index),
        "objective, its row inputs or reference_logp": fingerprint(
            (objective_terms(spec), spec.objective.mean_prob)
        ),
        "softcap, temperature, z_loss, label_smoothing or anchor": fingerprint(spec.settings()),
        "weight (class weights)": 1 if class_weight is None else fingerprint_of(class_weight),
        "reduction, token_weight or num_items": 0 if row_scale is None else fingerprint_of(row_scale),
        "return_stats": 1 + spec.statistics,
        "the size of hidden": 0 if hidden is None else hidden.shape[-1],
        "chunk_bytes": budget,
        "skip_ignored": 0 if hidden is None else 1 + spec.skip_ignored,
        "which gradients are wanted": 0 if hidden is None else 1 + wanted,
    }
    place = (shard.start, width, shard.size, int(shard.width >= 0))
    table = _exchange(group_of(shard.group), labels.device, [*place, *digest.values()])
    if len({row[4] for row in table}) == 1 and not covered(table):
        moved_or_wrong(table, shard)
    differing = [name for i, name in enumerate(DIGEST, 4) if len({row[i] for row in table} - {0}) > 1]
    if differing:
        raise ValueError(
            f"group: the ranks differ in {'; '.join(_described(name, table) for name in differing)}"
        )


def admit(
    logits: Tensor,
    labels: Tensor,
    class_weight: Tensor | None,
    ignore_index: int,
    spec: Spec,
    row_scale: Tensor | None = None,
) -> None:
    """Before anything is sent or computed: what the ranks have to agree on, and the labels' range."""
    width = logits.shape[-1]
    args = (labels, logits.dtype, class_weight, ignore_index, spec)
    compare(spec.shard, width, *args, row_scale=row_scale)
    checks.check_label_range(labels, spec.vocabulary(width), ignore_index)


def _described(name: str, table: list[list[int]]) -> str:
    values = [row[4 + DIGEST.index(name)] for row in table]
    if name == "the call":
        return f"{name} ({', '.join(CALLS[value - 1] for value in values)})"
    if name == "the number of rows":
        return f"{name} ({', '.join(str(value - 1) for value in values)})"
    if name == "the dtype":
        return f"{name} ({', '.join(str(DTYPES[value - 1]) for value in values)})"
    return (
        f"{name} ({', '.join(map(str, values))})" if name in ("the size of hidden", "chunk_bytes") else name
    )


def _exchange(group: Any, device: torch.device, words: list[int]) -> list[list[int]]:
    """Every rank's words, [ranks, 4 + len(DIGEST)]; an error where one has failed before it came here."""
    _Step.compared = True
    padded = [*words, *[0] * (4 + len(DIGEST) - len(words))]
    table: list[list[int]] = all_gather(torch.tensor(padded, device=device), group).tolist()
    failed = [rank for rank, row in enumerate(table) if row[ASKED] == FAILED]
    if failed:
        raise RuntimeError(
            f"group: rank {failed[0]} raised an error in this call, which says what is wrong there"
        )
    return table


def _asked(group: Any, width: int, device: torch.device) -> None:
    """With validation the ranks ask for the columns before each call, so that no outdated answer is used."""
    question = [0, width, 0, 1, len(CALLS)]
    table = _exchange(group, device, question)
    if any(row[4] != len(CALLS) for row in table):
        raise ValueError("group: some ranks give a ProcessGroup, others a VocabShard or make another call")
    remember(group, tuple(row[WIDTH] for row in table))
    _Step.compared = False


def in_step(name: str, position: int, dim: int) -> Callable[[Call], Call]:
    """For a public call with `group=`, whose argument `name`, at `position`, has the columns along `dim`."""

    def around(call: Call) -> Call:
        @wraps(call)
        def wrapped(*args: Any, **keywords: Any) -> Any:
            group = keywords.get("group")
            if group is None or torch.compiler.is_compiling():
                return call(*args, **keywords)
            if validating():
                tensor = args[position] if position < len(args) else keywords.get(name)
                return _validated(call, group, tensor, dim, args, keywords)
            try:
                return call(*args, **keywords)
            except ColumnsMoved:
                return call(*args, **keywords)

        return wrapped  # type: ignore[return-value]

    return around


def _validated(
    call: Any, group: Any, tensor: Any, dim: int, args: tuple[Any, ...], keywords: dict[str, Any]
) -> Any:
    from torch.distributed import ProcessGroup

    bare = group.group if isinstance(group, VocabShard) else group
    if not isinstance(bare, ProcessGroup) or bare.size() == 1:
        return call(*args, **keywords)
    known = isinstance(tensor, Tensor) and tensor.dim() > 0
    tensors = (x for x in (tensor, *args, *keywords.values()) if isinstance(x, Tensor))
    device = next((x.device for x in tensors), torch.device("cpu"))
    _Step.compared = False
    try:
        if bare is group and known:
            _asked(group, tensor.shape[dim], device)
        return call(*args, **keywords)
    except Exception:
        if not _Step.compared:
            # It raises, as this rank has failed; the error itself is raised below.
            with suppress(RuntimeError):
                _exchange(bare, device, [0, 0, 0, FAILED])
        raise
