"""Do the ranks of a group agree on what they compute together? If not, all of them raise.

Every all-gather of states has one extra row, so that no other message is needed: where each rank's columns
lie, and a checksum of all columns, labels and settings. It cannot tell what makes the messages' sizes differ
(rows, dtypes); `validation` can.

The checksum adds up: with g a hash of settings, V and a column's index, a rank sends g(end) - g(start) of
its columns, and the sum over all ranks is g(V) - g(0) exactly where they follow each other from 0 to V and
the settings are the same. A device compares it without the host waiting; where it differs, losses are NaN.
"""

from __future__ import annotations

import zlib
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import validating as validating
from .groups import Shard, all_gather, group_of, remember
from .spec import Spec

# The extra row; as many numbers as the smallest state has.
START, WIDTH, SIZE, ASKED, CHECKSUM = range(5)  # ASKED: 1 where the place was asked for, not given


class ColumnsMoved(ValueError):
    """The ranks hold other columns than when they last asked each other; all know the new ones now."""


def fingerprint(value: Any) -> int:
    """The same number in every process, from 1 to 2^31 - 1."""
    data = value if isinstance(value, bytes) else repr(value).encode()
    return (zlib.crc32(data) & 0x7FFFFFFF) or 1


def fingerprint_of(tensor: Tensor) -> int:
    return fingerprint(tensor.detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())


def objective_terms(spec: Spec) -> tuple[Any, ...]:
    """Without the batch's mean p, which the linear call fills in, and the group it is taken over."""
    o = spec.objective
    return o.family, o.focus, o.alpha, o.eps, o.power, o.top_k, o.detach, o.low, o.high, spec.formula


@lru_cache(maxsize=256)
def _terms(spec: Spec, ignore_index: int) -> int:
    return fingerprint((objective_terms(spec), spec.settings(), ignore_index))


def _g(terms: tuple[int, ...], column: int) -> int:
    return fingerprint((terms, column))


class Header(NamedTuple):
    """The words of a rank's extra row, and what the checksums of all ranks have to add up to."""

    words: tuple[int, ...]
    total: int


@lru_cache(maxsize=256)
def _header(shard: Shard, width: int, terms: tuple[int, int]) -> Header:
    start, size = shard.start, shard.size
    seed = (*terms, size)
    checksum = _g(seed, start + width) - _g(seed, start)
    return Header((start, width, size, int(shard.width >= 0), checksum), _g(seed, size) - _g(seed, 0))


def _row(header: Header, looks: bool, states: Tensor) -> Tensor:
    """The header as the bits of a row of states, [1, size].

    A rank that does not check on the host sends its checksum alone: a device fills it in, which a CUDA graph
    can repeat.
    """
    size = states.shape[1]
    integers = torch.int64 if states.dtype == torch.float64 else torch.int32
    if not looks:
        row = torch.full((1, size), header.words[CHECKSUM], dtype=integers, device=states.device)
    else:
        words = [*header.words, *[0] * (size - len(header.words))]
        row = torch.tensor([words], dtype=integers, device=states.device)
    return row.view(states.dtype)


def _on_host(device: torch.device) -> bool:
    """Whether the host can read a tensor there without waiting for a device."""
    return device.type == "cpu"


def gathered(
    states: Tensor, shard: Shard, width: int, labels: Tensor, ignore_index: int, spec: Spec
) -> Tensor:
    """States [N, size] of every rank, [ranks, N, size], by one all-gather; by none for a single rank.

    Raises, where the host can check without waiting, and on all ranks: ValueError for columns that overlap or
    leave some out, labels or settings that differ; ColumnsMoved. Where it cannot, all states become NaN.
    """
    if shard.ranks == 1 or states.numel() == 0:
        return states.expand(shard.ranks, *states.shape)
    on_host = _on_host(states.device)
    looks = on_host or validating() or shard.width not in (-1, width)
    terms = _terms(spec, ignore_index), fingerprint_of(labels) if on_host else 0
    header = _header(shard, width, terms)
    message = torch.cat([states, _row(header, looks, states)])
    everything = all_gather(message, group_of(shard.group))
    states, rows = everything[:, :-1], everything[:, -1]
    words = rows.view(torch.int64 if rows.dtype == torch.float64 else torch.int32)
    if looks:
        _check(words.tolist(), header.total, shard, width)
    else:
        # Only the sums: a maximum is taken of the peaks, which may lose a NaN.
        states[..., 1:4].masked_fill_(words[:, CHECKSUM].sum() != header.total, float("nan"))
    return states


def _check(table: list[list[int]], total: int, shard: Shard, width: int) -> None:
    differ = sum(row[CHECKSUM] for row in table) != total
    # A rank that does not check fills its row with one number. No other rank does: if its start is V it has
    # no columns, and their checksum is 0.
    if any(row[START] == row[SIZE] == row[CHECKSUM] for row in table):
        if differ:
            raise ValueError(
                f"group: this rank holds {width} columns, {shard.width} when the ranks last asked each "
                "other, and others hold as many as then, so that they go on and get NaN; vocabularies of "
                "several sizes want a VocabShard"
            )
        return
    if not covered(table):
        moved_or_wrong(table, shard)
    if differ:
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


def moved_or_wrong(table: list[list[int]], shard: Shard) -> None:
    widths = tuple(row[WIDTH] for row in table)
    if all(row[ASKED] for row in table):
        remember(group_of(shard.group), widths)
        raise ColumnsMoved(
            f"group: the ranks hold {widths} columns, others than when they last asked each other; compiled "
            "code keeps the columns it was traced with: pass a VocabShard"
        )
    places = ", ".join(
        f"rank {rank} has [{row[START]}, {row[START] + row[WIDTH]}) of {row[SIZE]}"
        for rank, row in enumerate(table)
    )
    raise ValueError(f"group: the ranks' columns overlap or leave some out: {places}")
