"""Checks of what the host can see, before any launch: each error names the argument and what it accepts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
REDUCTIONS = ("mean", "sum", "none")


def check_floats(tensor: Any, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")


def check_logits(logits: Any, *, part: bool = False) -> None:
    """part: of a vocabulary split between ranks, of which one may have no column at all."""
    check_floats(logits, "logits")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape [..., V], got a scalar")
    if logits.shape[-1] == 0 and not part:
        raise ValueError(f"logits: the vocabulary (last dimension) is empty, shape {tuple(logits.shape)}")


def check_no_tangent(tensor: Tensor, name: str = "logits") -> None:
    """Operators have a backward only; a forward-mode tangent would be dropped without a word."""
    if getattr(forward_ad, "_current_level", -1) < 0:
        return
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(
            f'{name}: forward-mode differentiation is not supported; backend="reference" has it'
        )


class Outline(NamedTuple):
    """What the checks ask of logits, where there are none."""

    shape: tuple[int, ...]
    device: torch.device


def check_labels(labels: Any, logits: Tensor | Outline) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        hint = " (class probabilities are not supported)" if labels.is_floating_point() else ""
        raise TypeError(f"labels: expected an integer dtype such as int64, got {labels.dtype}{hint}")
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"labels: expected shape {tuple(logits.shape[:-1])}, the logits' {tuple(logits.shape)} without "
            f"the vocabulary, got {tuple(labels.shape)}"
        )
    _same_device("labels", labels, logits)


def _same_device(name: str, tensor: Tensor, logits: Tensor | Outline) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name}: is on {tensor.device}, the logits are on {logits.device}")


def check_reduction(reduction: Any) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction: expected one of {', '.join(REDUCTIONS)}, got {reduction!r}")


def check_ignore_index(ignore_index: Any) -> None:
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, (int, torch.SymInt)):
        raise TypeError(f"ignore_index: expected an int, got {type(ignore_index).__name__}")


def check_ignorable(labels: Tensor, ignore_index: int) -> None:
    """uint8 makes 156 of -100: rows meant to be ignored would train that class."""
    if labels.dtype == torch.int64:
        return
    least, most = torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max
    if not least <= ignore_index <= most:
        raise ValueError(
            f"labels: {labels.dtype} holds {least} to {most} and so no ignore_index of {ignore_index}; give "
            f"labels of int64 or an ignore_index in that range"
        )


def flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")
    return value


def number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> float:
    """`value` as a float within [low, high], or (low, high] with `above`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    # In comparisons, which torch.compile can trace for a symbolic float; NaN fails the first.
    if not low <= value <= high or abs(value) == math.inf or (above and value == low):
        raise ValueError(
            f"{name}: expected a finite number in {'(' if above else '['}{low}, {high}], got {value}"
        )
    return float(value)


def check_token_weight(token_weight: Any, labels: Tensor, logits: Tensor | Outline) -> None:
    if token_weight is None:
        return
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"token_weight: expected a Tensor, got {type(token_weight).__name__}")
    if not (token_weight.is_floating_point() or token_weight.dtype in (torch.bool, *INTEGERS)):
        raise TypeError(f"token_weight: expected a real dtype, got {token_weight.dtype}")
    if token_weight.shape != labels.shape:
        raise ValueError(
            f"token_weight: expected the labels' shape {tuple(labels.shape)}, got {tuple(token_weight.shape)}"
        )
    _same_device("token_weight", token_weight, logits)


def check_class_weight(weight: Any, logits: Tensor | Outline, vocabulary: int, name: str = "weight") -> None:
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {weight.dtype}")
    if weight.shape != (vocabulary,):
        raise ValueError(
            f"{name}: expected one weight a class, shape ({vocabulary},), got {tuple(weight.shape)}"
        )
    if weight.requires_grad:
        raise ValueError(f"{name}: class weights are not differentiated; detach them")
    _same_device(name, weight, logits)


def check_num_items(num_items: Any, reduction: str) -> None:
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f'num_items: replaces the denominator of reduction="mean", given with {reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one element, got shape {tuple(num_items.shape)}")
        return
    if isinstance(num_items, bool) or not isinstance(num_items, (int, float, torch.SymInt)):
        raise TypeError(f"num_items: expected a number or a Tensor, got {type(num_items).__name__}")
    if not num_items > 0:
        raise ValueError(f"num_items: expected a positive number, got {num_items}")


def check_inplace(logits: Tensor) -> None:
    """An in-place gradient needs every logit to have storage of its own."""
    reach = 0
    for stride, size in sorted(zip(logits.stride(), logits.shape, strict=True)):
        if size > 1:
            if stride <= reach:
                raise ValueError("inplace: the logits are a view whose rows share storage; clone them")
            reach += stride * (size - 1)
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError("inplace: needs logits that are contiguous along the vocabulary")
