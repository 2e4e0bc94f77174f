"""`Recording`: what a recorder has summed, on the host; saved and loaded without pickle."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from ..core.arguments import one_of
from ..core.arguments import path as path_of
from .bins import ALPHA, ENTROPY, P
from .npz import read, write
from .sample import INTEGERS, NUMBERS

VERSION = 1
# Columns of the series: how many tokens, then sum and sum of squares of each.
AVERAGED = ("p", "alpha", "gate", "entropy", "nll")
MOMENTS = ("count", *(name + part for name in AVERAGED for part in ("", "^2")))


@dataclass(frozen=True)
class Recording:
    """C channels, M objectives, and the bins of `bins`; counts and sums are float64.

    objectives: [M] names.  channels: [C] names.
    gate_of: whose gate `series` and `values` hold: "the loss", or an objective's name; empty without rows.
    seed: of the sample.  stride: steps in a slot of the series.
    left_out: rows that held a NaN, or a channel that there is not.
    p_entropy, p_alpha, alpha_entropy: [C, bins, bins], tokens.
    mass: [M, C, bins of p, bins of H], the sum of gradient norms: `gradient_norm`.
    totals: [M, C, 4], sums of gate, gate^2, focus index, focus index^2.
    series: [slots, C, 11]: tokens of each interval of steps, then sum and sum of squares of p, alpha, gate,
        entropy (nats) and -logp (nats).
    tokens: [n, 4] int64: id, step, channel, label, sorted by id.
    values: [n, 5]: logp, entropy, alpha, max p, gate of the same.
    """

    objectives: tuple[str, ...]
    channels: tuple[str, ...]
    gate_of: str
    seed: int
    stride: int
    left_out: int
    p_entropy: np.ndarray
    p_alpha: np.ndarray
    alpha_entropy: np.ndarray
    mass: np.ndarray
    totals: np.ndarray
    series: np.ndarray
    tokens: np.ndarray
    values: np.ndarray

    @property
    def count(self) -> int:
        """Tokens in all."""
        return int(self.p_entropy.sum())

    def of(self, channel: str | None) -> list[int]:
        """The numbers of a channel, or of all. Raises: ValueError for a name that is none."""
        if channel is None:
            return list(range(len(self.channels)))
        return [self.channels.index(one_of("channel", channel, self.channels))]

    def number(self, objective: str) -> int:
        return self.objectives.index(one_of("objective", objective, self.objectives))

    def token(self, name: str) -> np.ndarray:
        """One column of the sample: "id", "step", "channel", "label", "logp", "entropy", "alpha", ..."""
        if one_of("name", name, (*INTEGERS, *NUMBERS)) in INTEGERS:
            return self.tokens[:, INTEGERS.index(name)]
        return self.values[:, NUMBERS.index(name)]

    def histogram(self, of: str, channel: str | None = None) -> np.ndarray:
        """Tokens in each bin of "p", "alpha" or "entropy"."""
        tables = {"p": ("p_entropy", 1), "alpha": ("p_alpha", 0), "entropy": ("p_entropy", 0)}
        table, axis = tables[one_of("of", of, tables)]
        counts: np.ndarray = getattr(self, table)[self.of(channel)].sum(0)
        return counts.sum(axis)

    def over_time(self, of: str, channel: str | None = None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(first step of each interval that has tokens, mean, standard deviation over its tokens)."""
        table = self.series[:, self.of(channel)].sum(1)
        taken = table[:, 0] > 0
        count, place = table[taken, 0], MOMENTS.index(one_of("of", of, AVERAGED))
        # A target of probability 0 makes the mean of -logp infinite, and its spread none.
        with np.errstate(invalid="ignore"):
            mean, square = table[taken, place] / count, table[taken, place + 1] / count
            spread = np.sqrt(np.maximum(square - mean * mean, 0.0))
        return np.flatnonzero(taken) * self.stride, mean, spread

    def mean(self, of: str, channel: str | None = None) -> float:
        """Over all tokens; NaN without any."""
        table = self.series[:, self.of(channel)].sum((0, 1))
        place = MOMENTS.index(one_of("of", of, AVERAGED))
        return float(table[place] / table[0]) if table[0] else float("nan")

    def save(self, path: str | Path) -> None:
        """Raises: OSError, naming the file and the field that could not be written; no file is left half
        written, and one that was there before stays as it was."""
        values = {"version": np.array(VERSION)}
        values |= {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}
        write(path_of("path", path), values)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Raises: ValueError for a file of another version, cut short, or with a field that is missing or
        wrong, naming the file and the field; OSError where it cannot be opened."""
        path = path_of("path", path)
        with read(path) as field:
            version = field("version")
            if version.shape != () or version.dtype.kind != "i" or version != VERSION:
                raise ValueError(f"{path}: version: is {version}, this package reads {VERSION}")
            found = {entry.name: field(entry.name) for entry in fields(cls)}
        for name, kinds in {"objectives": "U", "channels": "U", "gate_of": "U", "tokens": "i"}.items():
            if found[name].dtype.kind not in kinds:
                raise ValueError(f"{path}: {name}: holds {found[name].dtype}")
        for name in ("seed", "stride", "left_out"):
            if found[name].shape != () or found[name].dtype.kind != "i":
                raise ValueError(f"{path}: {name}: expected one integer, got {found[name]!r:.40}")
        _check_tables(path, found)
        texts = {name: tuple(str(text) for text in found[name]) for name in ("objectives", "channels")}
        plain = {name: found[name].item() for name in ("gate_of", "seed", "stride", "left_out")}
        return cls(**{**found, **texts, **plain})


def _check_tables(path: Path, found: dict[str, np.ndarray]) -> None:
    if found["objectives"].ndim != 1 or found["channels"].ndim != 1:
        raise ValueError(f"{path}: objectives, channels: expected one dimension")
    m, c = len(found["objectives"]), len(found["channels"])
    shapes = {
        "p_entropy": (c, P.number, ENTROPY.number),
        "p_alpha": (c, P.number, ALPHA.number),
        "alpha_entropy": (c, ALPHA.number, ENTROPY.number),
        "mass": (m, c, P.number, ENTROPY.number),
        "totals": (m, c, 4),
        "series": (*found["series"].shape[:1], c, len(MOMENTS)),
        "tokens": (*found["tokens"].shape[:1], len(INTEGERS)),
        "values": (*found["tokens"].shape[:1], len(NUMBERS)),
    }
    for name, shape in shapes.items():
        table = found[name]
        if table.shape != shape:
            raise ValueError(f"{path}: {name}: expected shape {shape}, got {table.shape}")
        if name == "tokens":
            continue
        if table.dtype != np.float64:
            raise ValueError(f"{path}: {name}: expected float64, got {table.dtype}")
        if np.isnan(table).any():
            raise ValueError(f"{path}: {name}: holds NaN")
        if name in ("p_entropy", "p_alpha", "alpha_entropy", "mass") and (table < 0).any():
            raise ValueError(f"{path}: {name}: holds a number below 0")
    if found["stride"] < 1:
        raise ValueError(f"{path}: stride: expected at least 1, got {found['stride']}")
