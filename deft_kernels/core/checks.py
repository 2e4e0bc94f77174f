"""Checks of what the host can see, before any launch: each error names the argument and what it accepts."""

from __future__ import annotations

import itertools
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .arguments import kind_of, real

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


def validating() -> bool:
    """Whether checks are wanted for which the host has to wait."""
    return os.environ.get("DEFT_KERNELS_VALIDATE", "0") == "1"


def check_floats(tensor: Any, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(tensor).__name__}")
    if tensor.dtype not in FLOATS:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
    check_dense(tensor, name)


def check_dense(tensor: Tensor, name: str) -> None:
    """Checked before any shape is read, which a nested tensor does not have."""
    if tensor.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; for tensors of a jagged layout pass the "
            "values() of each, all rows in one"
        )
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tensor.layout}")


def check_logits(logits: Any, *, part: bool = False) -> None:
    """part: of a vocabulary split between ranks, of which one may have no column at all."""
    check_floats(logits, "logits")
    if logits.dim() == 0:
        raise ValueError("logits: expected shape [..., V], got a scalar")
    if logits.shape[-1] == 0 and not part:
        raise ValueError(f"logits: the vocabulary (last dimension) is empty, shape {tuple(logits.shape)}")


def check_no_transform(
    tensor: Tensor, name: str = "logits", instead: str = 'backend="reference" has it'
) -> None:
    """Operators have a backward only. A forward-mode tangent would be dropped without an error, and
    torch.func's transforms that differentiate would fail with an error of torch that does not name the
    reason.
    """
    if forward_ad.unpack_dual(tensor).tangent is not None:
        raise RuntimeError(f"{name}: forward-mode differentiation is not supported; {instead}")
    if torch._C._are_functorch_transforms_active() and _differentiated(tensor):
        raise RuntimeError(
            f"{name}: torch.func.grad, vjp, jacrev and hessian are not supported, tensor.backward() and "
            f"torch.autograd are; {instead}"
        )


def _differentiated(tensor: Tensor) -> bool:
    """Whether a transform of torch.func takes a derivative by `tensor`; False where a trace cannot ask."""
    if torch.compiler.is_compiling():
        return False
    from torch._C._functorch import TransformType, get_interpreter_stack

    kinds = [level.key() for level in get_interpreter_stack() or ()]
    if not torch.is_grad_enabled() or TransformType.Grad not in kinds:
        return False
    # Inside vmap requires_grad of a batched tensor is False, whatever it is outside.
    return tensor.requires_grad or TransformType.Vmap in kinds


class Outline(NamedTuple):
    """What the checks need of logits, where no logits exist."""

    shape: tuple[int, ...]
    device: torch.device


def check_labels(labels: Any, logits: Tensor | Outline) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a Tensor, got {type(labels).__name__}")
    if labels.dtype not in INTEGERS:
        hint = " (class probabilities are not supported)" if labels.is_floating_point() else ""
        raise TypeError(f"labels: expected an integer dtype such as int64, got {labels.dtype}{hint}")
    check_dense(labels, "labels")
    if labels.shape != logits.shape[:-1]:
        shape = tuple(logits.shape)
        hint = ""
        if isinstance(logits, Tensor) and len(shape) > 2 and labels.shape == (shape[0], *shape[2:]):
            hint = (
                "; for logits [N, C, ...] as in F.cross_entropy move the classes last: logits.movedim(1, -1)"
            )
        raise ValueError(
            f"labels: expected shape {shape[:-1]}, the logits' {shape} without "
            f"the vocabulary, got {tuple(labels.shape)}{hint}"
        )
    _same_device("labels", labels, logits)


def _same_device(name: str, tensor: Tensor, logits: Tensor | Outline) -> None:
    if tensor.device != logits.device:
        raise ValueError(f"{name}: is on {tensor.device}, the logits are on {logits.device}")


def all_count(labels: Tensor, vocabulary: int, ignore_index: int) -> bool:
    """Whether every label on the host is a class and none is ignored, as far as their bounds tell."""
    if labels.numel() == 0:
        return False
    least, most = (bound.item() for bound in labels.aminmax())
    return least >= 0 and most < vocabulary and not least <= ignore_index <= most


def check_label_range(labels: Tensor, vocabulary: int, ignore_index: int) -> None:
    """IndexError for a label outside [0, V), where the host can see it without waiting for a device."""
    if (labels.device.type != "cpu" and not validating()) or _unseen(labels):
        return
    if labels.device.type == "cpu" and all_count(labels, vocabulary, ignore_index):
        return
    wrong = ((labels < 0) | (labels >= vocabulary)) & (labels != ignore_index)
    if bool(wrong.any()):
        position = int(wrong.nonzero()[0])
        raise IndexError(
            f"labels: {int(labels[position])} at flat position {position} is outside [0, {vocabulary}) "
            f"and is not ignore_index ({ignore_index})"
        )


def _unseen(tensor: Tensor) -> bool:
    """Whether no host can read the values: in a trace, and where torch.func.vmap has one tensor for many."""
    if torch.compiler.is_compiling():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(tensor):
        if functorch.is_batchedtensor(tensor):
            return True
        tensor = functorch.get_unwrapped(tensor)
    return False


def check_ignorable(labels: Tensor, ignore_index: int) -> None:
    """In uint8 -100 is 156: rows that should be ignored would train that class."""
    if labels.dtype == torch.int64:
        return
    least, most = torch.iinfo(labels.dtype).min, torch.iinfo(labels.dtype).max
    if not least <= ignore_index <= most:
        raise ValueError(
            f"labels: {labels.dtype} holds {least} to {most} and so no ignore_index of {ignore_index}; give "
            f"labels of int64 or an ignore_index in that range"
        )


def check_token_weight(token_weight: Any, labels: Tensor, logits: Tensor | Outline) -> None:
    if token_weight is None:
        return
    if not isinstance(token_weight, Tensor):
        raise TypeError(f"token_weight: expected a Tensor, got {type(token_weight).__name__}")
    if not (token_weight.is_floating_point() or token_weight.dtype in (torch.bool, *INTEGERS)):
        raise TypeError(f"token_weight: expected a real dtype, got {token_weight.dtype}")
    check_dense(token_weight, "token_weight")
    if token_weight.shape != labels.shape:
        raise ValueError(
            f"token_weight: expected the labels' shape {tuple(labels.shape)}, got {tuple(token_weight.shape)}"
        )
    _same_device("token_weight", token_weight, logits)


def check_anchor(anchor: float, reference_logp: Any) -> None:
    """What can be said without the labels."""
    if reference_logp is None:
        if anchor > 0:
            raise ValueError("anchor: needs reference_logp, the reference model's log p of each target")
        return
    if not isinstance(reference_logp, Tensor):
        raise TypeError(f"reference_logp: expected a Tensor, got {kind_of(reference_logp)}")
    if not reference_logp.is_floating_point():
        raise TypeError(f"reference_logp: expected a floating dtype, got {reference_logp.dtype}")
    check_dense(reference_logp, "reference_logp")
    if reference_logp.requires_grad:
        raise ValueError("reference_logp: requires a gradient, but is held constant; detach it")
    if anchor == 0:
        raise ValueError("reference_logp: needs anchor, the factor of the distance from it, above 0")


def check_weights(weight: Any, name: str) -> None:
    """What can be said of class weights without the vocabulary."""
    if weight is None:
        return
    if not isinstance(weight, Tensor):
        raise TypeError(f"{name}: expected a Tensor, got {type(weight).__name__}")
    if not weight.is_floating_point():
        raise TypeError(f"{name}: expected a floating dtype, got {weight.dtype}")
    check_dense(weight, name)
    if weight.requires_grad:
        raise ValueError(f"{name}: class weights are not differentiated; detach them")
    if weight.dim() != 1:
        raise ValueError(f"{name}: expected one weight a class, shape (V,), got {tuple(weight.shape)}")


def check_class_weight(weight: Any, logits: Tensor | Outline, vocabulary: int, name: str = "weight") -> None:
    if weight is None:
        return
    check_weights(weight, name)
    if weight.shape != (vocabulary,):
        raise ValueError(
            f"{name}: expected one weight a class, shape ({vocabulary},), got {tuple(weight.shape)}"
        )
    _same_device(name, weight, logits)


def number_of_items(num_items: Any, reduction: str) -> Any:
    """`num_items` as None, a number or a tensor of one element."""
    if num_items is None:
        return None
    if reduction != "mean":
        raise ValueError(f'num_items: replaces the denominator of reduction="mean", given with {reduction!r}')
    if isinstance(num_items, Tensor):
        check_dense(num_items, "num_items")
        if num_items.numel() != 1:
            raise ValueError(f"num_items: expected one element, got shape {tuple(num_items.shape)}")
        if num_items.is_complex():
            raise TypeError(f"num_items: expected a real dtype, got {num_items.dtype}")
        # Where the host sees it without waiting; 0 is a batch with nothing to count.
        if num_items.device.type == "cpu" and type(num_items) is Tensor and not _unseen(num_items):
            value = num_items.detach().item()
            if not 0 <= value < 2**63:
                raise ValueError(f"num_items: expected a number below 2^63 that is not negative, got {value}")
        return num_items
    num_items = real("num_items", num_items)
    if not 0 < num_items < 2**63:
        raise ValueError(f"num_items: expected a positive number below 2^63, got {num_items!s:.20}")
    return num_items


def row_strides(logits: Tensor) -> int:
    """How many strides lead from row to row, those of dimensions that make one stretch counted once."""
    rows = zip(logits.shape[:-1], logits.stride()[:-1], strict=True)
    dims = [(size, stride) for size, stride in rows if size != 1]
    return len(dims) - sum(outer == size * inner for (_, outer), (size, inner) in itertools.pairwise(dims))


def check_inplace(logits: Tensor) -> None:
    """An in-place gradient needs every logit to have storage of its own, which no call copies."""
    # Also a rank without rows or columns, whatever its strides: it goes along with the others.
    if logits.is_contiguous():
        return
    dims = [(size, stride) for size, stride in zip(logits.shape, logits.stride(), strict=True) if size > 1]
    for i, (_, stride) in enumerate(dims):
        # Not sorted, which torch.compile cannot do with sizes that change.
        within = [other for j, other in enumerate(dims) if j != i and other[1] <= stride]
        if stride <= sum(inner * (size - 1) for size, inner in within):
            raise ValueError("inplace: the logits are a view whose rows share storage; clone them")
    if logits.stride(-1) != 1 and logits.shape[-1] > 1:
        raise ValueError("inplace: needs logits that are contiguous along the vocabulary")
    if row_strides(logits) > 2:
        raise ValueError(
            "inplace: needs rows with at most two strides between them, or the gradient would overwrite a "
            "copy; pass logits.contiguous()"
        )
