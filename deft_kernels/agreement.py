"""Whether the ranks of a group agree on what they make together, and an error on all of them if not.

    gathered    every all-gather of states carries one row more: where each rank's columns lie, and a checksum
                of all columns and settings. No message of its own.
    compare     with DEFT_KERNELS_VALIDATE=1, before anything else is sent: one all-gather of a digest, whose
                size does not depend on the call, so that it also tells ranks whose calls do not fit together
    in_step     around a public call: again where the columns have moved, and under validation the others are
                told of a rank that raises before the digest

The checksum adds up: with g a hash of settings, V and a column's index, a rank sends g(end) - g(start) of
its columns, and the sum over all ranks is g(V) - g(0) exactly where they follow each other from 0 to V and
the settings are the same. A device compares it without the host waiting; where it differs, losses are NaN.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .parallel import Shard, VocabShard, all_gather, group_of, remember
from .spec import Spec

# The row that goes with the states; as many numbers as the smallest state has.
START, WIDTH, SIZE, FLAGS, CHECKSUM = range(5)
LOOKS, ASKED = 1, 2  # flags: the host reads the others' rows; the place was asked for, not given

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# What the digest compares, in the order of the message. A 0 is what a call does not know, and fits anything.
DIGEST = (
    "the call",
    "the number of rows",
    "the dtype",
    "labels",
    "ignore_index",
    "objective",
    "softcap, temperature, z_loss or label_smoothing",
    "weight (class weights)",
    "reduction, token_weight or num_items",
    "the size of hidden",
    "chunk_bytes",
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


class ColumnsMoved(ValueError):
    """The ranks hold other columns than when they last asked each other; all know the new ones now."""


def validating() -> bool:
    return os.environ.get("DEFT_KERNELS_VALIDATE", "0") == "1"


def _hash(value: Any) -> int:
    """The same number in every process, from 1 to 2^31 - 1."""
    data = value if isinstance(value, bytes) else repr(value).encode()
    return (zlib.crc32(data) & 0x7FFFFFFF) or 1


def _hash_of(tensor: Tensor) -> int:
    return _hash(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())


def _objective(spec: Spec) -> tuple[Any, ...]:
    """Without the batch's mean p, which the linear call fills in, and the group it is taken over."""
    o = spec.objective
    return o.family, o.focus, o.alpha, o.eps, o.power, o.top_k, o.detach, o.low, o.high


def _settings(spec: Spec) -> tuple[float, ...]:
    return spec.softcap, spec.temperature, spec.z_loss, spec.label_smoothing


@lru_cache(maxsize=256)
def _terms(spec: Spec, ignore_index: int) -> int:
    return _hash((_objective(spec), _settings(spec), ignore_index))


def _g(terms: tuple[int, ...], column: int) -> int:
    return _hash((terms, column))


class Header(NamedTuple):
    """What goes with a rank's states, and what the checksums of all ranks have to add up to."""

    words: tuple[int, ...]
    total: int


@lru_cache(maxsize=256)
def _header(shard: Shard, width: int, terms: tuple[int, int], looks: bool) -> Header:
    start, size = shard.start, shard.size
    flags = LOOKS * looks + ASKED * (shard.width >= 0)
    seed = (*terms, size)
    checksum = _g(seed, start + width) - _g(seed, start)
    return Header((start, width, size, flags, checksum), _g(seed, size) - _g(seed, 0))


def _row(words: tuple[int, ...], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The words as the bits of a row of states, [1, size]."""
    integers = torch.int64 if dtype == torch.float64 else torch.int32
    return torch.tensor([[*words, *[0] * (size - len(words))]], dtype=integers, device=device).view(dtype)


_kept_row = lru_cache(maxsize=256)(_row)


def _on_host(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for a device."""
    return device.type == "cpu"


def gathered(
    states: Tensor, shard: Shard, width: int, labels: Tensor, ignore_index: int, spec: Spec
) -> Tensor:
    """States [N, size] of every rank, [ranks, N, size], by one all-gather; by none for a single rank.

    Raises, where the host can look without waiting, and on all ranks: ValueError for columns that overlap or
    leave some out, labels or settings that differ; ColumnsMoved. Elsewhere all states become NaN.
    """
    if shard.ranks == 1 or states.numel() == 0:
        return states.expand(shard.ranks, *states.shape)
    on_host = _on_host(states.device)
    looks = on_host or validating() or shard.width not in (-1, width)
    terms = _terms(spec, ignore_index), _hash_of(labels) if on_host else 0
    header = _header(shard, width, terms, looks)
    # Kept on a device, as a CUDA graph cannot copy it from the host.
    row = (_row if on_host else _kept_row)(header.words, states.shape[1], states.dtype, states.device)
    everything = all_gather(torch.cat([states, row]), group_of(shard.group))
    states, rows = everything[:, :-1], everything[:, -1]
    words = rows.view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    if looks:
        _check(words.tolist(), header.total, shard)
    else:
        # The sums alone: a state's peak goes through a maximum, which need not keep a NaN.
        states[..., 1:4].masked_fill_(words[:, CHECKSUM].sum() != header.total, float("nan"))
    return states


def _check(table: list[list[int]], total: int, shard: Shard) -> None:
    if not covered(table):
        _moved_or_wrong(table, shard)
    if sum(row[CHECKSUM] for row in table) != total:
        raise ValueError(
            "group: the ranks differ in labels, ignore_index, objective or settings, which have to be the "
            "same; DEFT_KERNELS_VALIDATE=1 says in which"
        )


def covered(table: list[list[int]]) -> bool:
    """Whether the ranks' columns follow each other from 0 to V, in any order of the ranks."""
    end = 0
    for start, width, *_ in sorted(row for row in table if row[WIDTH] > 0):
        if start != end:
            return False
        end = start + width
    return all(row[SIZE] == end for row in table)


def _moved_or_wrong(table: list[list[int]], shard: Shard) -> None:
    widths = tuple(row[WIDTH] for row in table)
    if all(row[FLAGS] & ASKED for row in table):
        if all(row[FLAGS] & LOOKS for row in table):
            remember(group_of(shard.group), widths)
            raise ColumnsMoved(
                f"group: the ranks hold {widths} columns, others than when they last asked each other; "
                "compiled code keeps the columns it was traced with: pass a VocabShard"
            )
        raise ValueError(
            f"group: the ranks hold {widths} columns, and only some of them others than when they last asked "
            "each other, so that the rest go on and get NaN; vocabularies of several sizes want a VocabShard"
        )
    places = ", ".join(
        f"rank {rank} has [{row[START]}, {row[START] + row[WIDTH]}) of {row[SIZE]}"
        for rank, row in enumerate(table)
    )
    raise ValueError(f"group: the ranks' columns overlap or leave some out: {places}")


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
        "labels": _hash_of(labels),
        "ignore_index": _hash(ignore_index),
        "objective": _hash((_objective(spec), spec.objective.mean_prob)),
        "softcap, temperature, z_loss or label_smoothing": _hash(_settings(spec)),
        "weight (class weights)": 1 if class_weight is None else _hash_of(class_weight),
        "reduction, token_weight or num_items": 0 if row_scale is None else _hash_of(row_scale),
        "the size of hidden": 0 if hidden is None else hidden.shape[-1],
        "chunk_bytes": budget,
        "which gradients are wanted": 0 if hidden is None else 1 + wanted,
    }
    place = (shard.start, width, shard.size, LOOKS + ASKED * (shard.width >= 0))
    table = _exchange(group_of(shard.group), labels.device, [*place, *digest.values()])
    if len({row[4] for row in table}) == 1 and not covered(table):
        _moved_or_wrong(table, shard)
    differing = [name for i, name in enumerate(DIGEST, 4) if len({row[i] for row in table} - {0}) > 1]
    if differing:
        raise ValueError(
            f"group: the ranks differ in {'; '.join(_described(name, table) for name in differing)}"
        )


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
    failed = [rank for rank, row in enumerate(table) if row[FLAGS] == FAILED]
    if failed:
        raise RuntimeError(
            f"group: rank {failed[0]} raised an error in this call, which says what is wrong there"
        )
    return table


def _asked(group: Any, width: int, device: torch.device) -> None:
    """Under validation the columns are asked for before each call, so that nothing remembered is outdated."""
    question = [0, width, 0, LOOKS + ASKED, len(CALLS)]
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
    device = tensor.device if known else torch.device("cpu")
    _Step.compared = False
    try:
        if bare is group and known:
            _asked(group, tensor.shape[dim], device)
        return call(*args, **keywords)
    except Exception:
        if not _Step.compared:
            # Its own failure is raised below.
            with suppress(RuntimeError):
                _exchange(bare, device, [0, 0, 0, FAILED])
        raise
