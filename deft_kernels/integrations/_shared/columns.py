"""`Columns`: a channel and a weight for each token, brought from the data set past the trainer to the loss.

On the way are three things that know nothing of such columns: the trainer removes what the model's forward
does not take, the collator pads what it knows, and the trainer gives the rest to the model. So the columns
are named to the first, taken past the second, and taken out again before the third.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.arguments import names
from .running import RunningStatistics

CHANNEL, TOKEN_WEIGHT = "channel", "token_weight"
# Their names in a batch, where a column of the data set could have the name of a model's argument.
KEYS = {CHANNEL: "deft_kernels_channel", TOKEN_WEIGHT: "deft_kernels_token_weight"}
# What stands at padding, whose label does not count.
PADDING = {CHANNEL: 0, TOKEN_WEIGHT: 1.0}
DTYPES = {CHANNEL: torch.int64, TOKEN_WEIGHT: torch.float32}

AMONG_PIECES = (
    "columns: not available with shift_labels, which are a part of each sequence under context or sequence "
    "parallelism; a column of the data set is whole"
)


class Columns:
    """Columns of a data set that go with its tokens into the loss: to which kind of data a token belongs, and
    what it weighs.

        columns = Columns(channel="domain", channels=("code", "mathematics"), token_weight="trust")
        apply(trainer, columns=columns)

    A column holds one value for a sample, or a list with one for each token. The value of a token goes with
    it as a label: a loss that shifts the labels shifts the columns too.

    Args:
        channel: name of the column of channels. It holds names or their numbers.
        channels: the names, which `RunningStatistics` logs: nll/code and so on.
        token_weight: name of a column of numbers, which multiply the tokens' losses; the mean's denominator
            stays the number of tokens, as with `token_weight` of `deft_loss`.
    Raises: ValueError for no column, a channel without names or names without a channel. While it trains:
        ValueError that names the column for one that the data set does not have, for a value that is no
        channel or no finite number, and for a list that is not as long as its row.
    """

    def __init__(
        self, *, channel: str | None = None, channels: Sequence[str] = (), token_weight: str | None = None
    ):
        self.names = {
            keyword: _column(keyword, name)
            for keyword, name in ((CHANNEL, channel), (TOKEN_WEIGHT, token_weight))
            if name is not None
        }
        self.channels = names("channels", channels)
        if not self.names:
            raise ValueError("channel: None, and no token_weight either; name a column of the data set")
        if (channel is None) != (not self.channels):
            raise ValueError("channels: expected the names of the channels together with channel, the column")
        self._batch: dict[str, Tensor] | None = None

    def attach(self, trainer: Any) -> None:
        """Bring the columns of a transformers-style trainer's data sets to the loss, before it trains.

        For a loss that was given `columns=`; `apply(trainer, columns=)` calls it. The data set for evaluation
        needs the columns too. The trainer's data_collator and compute_loss are wrapped.
        Raises: TypeError for another object, ValueError for a trainer that has columns already.
        """
        if not (callable(getattr(trainer, "compute_loss", None)) and hasattr(trainer, "data_collator")):
            raise TypeError(f"trainer: expected a transformers Trainer, got {type(trainer).__name__}")
        if isinstance(trainer.data_collator, _Collator):
            raise ValueError("trainer: has columns already; call attach, or apply with columns=, once")
        if trainer.args.remove_unused_columns:
            _keep(trainer, self.names.values())
        trainer.data_collator = _Collator(trainer.data_collator, self)
        trainer.compute_loss = self._around(trainer.compute_loss)

    def of(self, labels: Tensor, shift: bool) -> tuple[Tensor | None, Tensor | None]:
        """(channel, token_weight) of the batch that the trainer is at, for a loss of these labels.

        channel: of the labels that are scored, so [..., T - 1] with shift; token_weight: [..., T], at the
        position that predicts the token.
        """
        if self._batch is None:
            raise RuntimeError(
                "columns: no trainer brings them to this loss; call columns.attach(trainer) before it "
                "trains. A training step of your own has to come through the trainer's compute_loss"
            )
        for keyword, rows in self._batch.items():
            if rows.shape != labels.shape:
                raise ValueError(
                    f"{keyword}: the column {self.names[keyword]!r} has shape {tuple(rows.shape)} in this "
                    f"batch, the labels have {tuple(labels.shape)}; what splits or lengthens the labels "
                    "after the collator (context parallelism, nn.DataParallel, prompt tuning) is not "
                    "available"
                )
        channel, weight = (self._batch.get(keyword) for keyword in (CHANNEL, TOKEN_WEIGHT))
        channel = None if channel is None else channel.to(labels.device)
        weight = None if weight is None else weight.to(labels.device)
        if shift:
            channel = None if channel is None else channel[..., 1:]
            weight = None if weight is None else torch.nn.functional.pad(weight[..., 1:], (0, 1), value=1.0)
        return channel, weight

    def _around(self, compute_loss: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(compute_loss)
        def with_columns(model: Any, inputs: Any, *args: Any, **keywords: Any) -> Any:
            rest = dict(inputs)
            self._batch = {keyword: rest.pop(KEYS[keyword]) for keyword in self.names}
            try:
                return compute_loss(model, rest, *args, **keywords)
            finally:
                self._batch = None

        return with_columns


def named_by(columns: Any) -> tuple[str, ...]:
    """The channels of a loss's columns."""
    if columns is not None and not isinstance(columns, Columns):
        raise TypeError(f"columns: expected Columns, got {type(columns).__name__}")
    return () if columns is None else columns.channels


def checked_columns(columns: Any, statistics: RunningStatistics | None) -> Columns | None:
    """Those of a loss, if they and its statistics have the same channels."""
    named = named_by(columns)
    if named and statistics is None:
        raise ValueError(
            "statistics: None, and columns has channels; pass RunningStatistics(columns.channels)"
        )
    if statistics is not None and statistics.channels != named:
        raise ValueError(
            f"statistics: its channels are {', '.join(statistics.channels) or 'none'}, those of columns "
            f"{', '.join(named) or 'none'}; pass RunningStatistics(columns.channels)"
        )
    checked: Columns | None = columns
    return checked


def _column(keyword: str, name: Any) -> str:
    if not isinstance(name, str) or not name:
        raise TypeError(f"{keyword}: expected the name of a column, got {name!r}")
    return name


def _keep(trainer: Any, names: Iterable[str]) -> None:
    """So that the trainer does not remove these columns."""
    try:
        trainer._set_signature_columns_if_needed()
        kept = trainer._signature_columns
    except AttributeError as error:
        raise RuntimeError(
            "remove_unused_columns: this version of transformers removes columns by another way; set "
            "remove_unused_columns=False"
        ) from error
    kept.extend(name for name in names if name not in kept)


class _Collator:
    """A collator that never sees the columns, and then lays them as it has laid the labels."""

    def __init__(self, collate: Callable[[list[Any]], Any], columns: Columns):
        self.collate, self.names, self.channels = collate, columns.names, columns.channels

    def __call__(self, examples: list[Any]) -> Any:
        taken = {keyword: [self._value(e, keyword) for e in examples] for keyword in self.names}
        lengths = [len(e["labels"] if "labels" in e else e.get("input_ids", ())) for e in examples]
        own = set(self.names.values())
        batch = self.collate([{k: v for k, v in e.items() if k not in own} for e in examples])
        like = batch["labels"] if "labels" in batch else batch["input_ids"]
        for keyword, values in taken.items():
            batch[KEYS[keyword]] = self._laid(keyword, values, lengths, like, batch.get("attention_mask"))
        return batch

    def _value(self, example: Any, keyword: str) -> Any:
        """A number, or a list of numbers."""
        name = self.names[keyword]
        if not isinstance(example, Mapping) or name not in example:
            known = ", ".join(map(str, example)) if isinstance(example, Mapping) else type(example).__name__
            raise ValueError(
                f"{keyword}: the data set has no column {name!r} where the collator sees it, only {known}"
            )
        value = example[name]
        if isinstance(value, (Tensor, np.ndarray)):
            value = value.tolist()
        if isinstance(value, (list, tuple)):
            return [self._number(keyword, x) for x in value]
        return self._number(keyword, value)

    def _number(self, keyword: str, value: Any) -> Any:
        if keyword == CHANNEL:
            if isinstance(value, str) and value in self.channels:
                return self.channels.index(value)
            known = range(len(self.channels))
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool) and value in known:
                return int(value)
            names = ", ".join(self.channels)
            raise ValueError(f"channel: {value!r} in the column {self.names[CHANNEL]!r} is none of {names}")
        finite = isinstance(value, (int, float, np.number)) and math.isfinite(value)
        if not finite:
            raise ValueError(
                f"token_weight: expected finite numbers in the column {self.names[keyword]!r}, got {value!r}"
            )
        return float(value)

    def _laid(
        self, keyword: str, values: list[Any], lengths: list[int], like: Tensor, mask: Tensor | None
    ) -> Tensor:
        """[B, T] as the labels: by rows, by the places in the attention mask, or one row after another."""
        dtype, of_samples = DTYPES[keyword], not any(isinstance(value, list) for value in values)
        if of_samples and len(like) == len(values):
            return torch.tensor(values, dtype=dtype).unsqueeze(-1).expand(like.shape).contiguous()
        rows = [
            value if isinstance(value, list) else [value] * n
            for value, n in zip(values, lengths, strict=True)
        ]
        for row, n in zip(rows, lengths, strict=True):
            if len(row) != n:
                raise ValueError(
                    f"{keyword}: the column {self.names[keyword]!r} has {len(row)} values for a row of {n} "
                    "tokens; expected one for the sample, or one for each token of the row as the collator "
                    "sees it, truncated"
                )
        flat = torch.tensor([x for row in rows for x in row], dtype=dtype)
        laid = torch.full(like.shape, PADDING[keyword], dtype=dtype)
        whole = like.dim() == 2 and len(like) == len(rows)
        if whole and all(n == like.shape[1] for n in lengths):
            return flat.reshape(like.shape)
        if whole and mask is not None and mask.shape == like.shape:
            places = mask != 0
            if places.sum(-1).tolist() == lengths:
                laid[places] = flat
                return laid
        elif len(like) == 1 and len(flat) <= like.shape[1] and mask is None:
            laid[0, : len(flat)] = flat
            return laid
        raise ValueError(
            f"{keyword}: the collator made labels of shape {tuple(like.shape)} from rows of {lengths} "
            "tokens, and nothing says which token went where; expected padding that the attention_mask "
            "shows, or rows one after another"
        )
