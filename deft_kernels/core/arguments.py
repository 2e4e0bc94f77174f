"""Arguments that are no tensors: each error names the argument and what it accepts."""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

REDUCTIONS = ("mean", "sum", "none")
# Of single precision, in which kernels take their numbers; for float64 logits too.
LARGEST = torch.finfo(torch.float32).max
SMALLEST = torch.finfo(torch.float32).tiny
BACKENDS = ("auto", "triton", "torch", "reference")


def kind_of(value: Any) -> str:
    """The type's name for a message, with its module where that is not Python's own: numpy.bool."""
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"


def one_of(name: str, value: Any, known: Collection[str]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r:.80}")
    return value


def integer(name: str, value: Any) -> Any:
    """`value`, NumPy's integers too, as an int; one that torch.compile made symbolic stays as it is."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name}: expected an int, got {kind_of(value)}")
    return int(value)


def bytes_of(name: str, value: Any) -> int:
    size: int = integer(name, value)
    if size < 1:
        raise ValueError(f"{name}: expected a positive number of bytes, got {size}")
    return size


def label(name: str, value: Any) -> Any:
    """`value` as an int that a label can have."""
    value = integer(name, value)
    if not -(2**63) <= value < 2**63:
        raise ValueError(f"{name}: expected an int64, as labels are, got {value}")
    return value


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {kind_of(value)}")
    return value


def positions(name: str, value: Any) -> Any:
    """`value`, a bool or an int, as a number of positions; one that torch.compile made symbolic stays so."""
    if isinstance(value, bool):
        return int(value)
    if not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name}: expected True, False or a number of positions, got {kind_of(value)}")
    count: Any = value if isinstance(value, torch.SymInt) else int(value)
    if not count >= 0:
        raise ValueError(f"{name}: expected a number of positions that is not negative, got {count}")
    return count


def real(name: str, value: Any) -> Any:
    """`value`, NumPy's numbers too, as an int or float; one that torch.compile made symbolic stays so."""
    if isinstance(value, (int, float, torch.SymInt)) and not isinstance(value, bool):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name}: expected a number, got {kind_of(value)}")
    return float(value)


def number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """`value` as a float within [low, high], or (low, high] with `above`."""
    value = real(name, value)
    # In comparisons, which torch.compile can trace for a symbolic float; NaN fails the first.
    if not low <= value <= high or abs(value) > LARGEST or (above and value == low):
        low, high = max(low, -LARGEST), min(high, LARGEST)
        raise ValueError(
            f"{name}: expected a finite number in {'(' if above else '['}{low:.6g}, {high:.6g}], got {value}"
        )
    return float(value)


def check_quotient(name: str, value: float) -> None:
    """Of a number with logit_scale folded in: it needs a reciprocal in single precision."""
    if not SMALLEST <= value <= LARGEST:
        raise ValueError(
            f"{name}: expected {name} / logit_scale in [{SMALLEST:.6g}, {LARGEST:.6g}], got {value:.6g}"
        )


def names(name: str, value: Any) -> tuple[str, ...]:
    """Texts that differ, perhaps none."""
    try:
        found = () if isinstance(value, str) else tuple(value)
    except (TypeError, RuntimeError):
        raise TypeError(f"{name}: expected names that differ, got {kind_of(value)}") from None
    texts = not isinstance(value, str) and all(isinstance(text, str) and text for text in found)
    if not texts or len(set(found)) != len(found):
        raise ValueError(f"{name}: expected names that differ, got {value!r:.80}")
    return found


def device(name: str, value: Any) -> torch.device:
    try:
        return torch.device(value)
    except (TypeError, ValueError, RuntimeError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"{name}: expected a device, got {value!r:.80} ({error})") from error


def path(name: str, value: Any) -> Path:
    try:
        return Path(value)
    except TypeError as error:
        raise TypeError(f"{name}: expected a path, got {kind_of(value)}") from error
