"""A linear head whose logits are made in chunks: its checks, its products' dtype, the size of a chunk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import checks

HALF = (torch.bfloat16, torch.float16)
# Bytes of the chunk buffer; docs/linear.md has the measurements, on a CPU and on an H200.
CHUNK_BYTES: dict[str, int] = {"cpu": 32 * 2**20}
CHUNK_BYTES_ELSEWHERE = 2**30


def check_head(hidden: Any, weight: Any, bias: Any, part: bool) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is None and name == "bias":
            continue
        checks.check_floats(tensor, name)
        if name != "hidden" and tensor.device != hidden.device:
            raise ValueError(f"{name}: is on {tensor.device}, hidden is on {hidden.device}")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden: expected shape [..., D] with D > 0, got {tuple(hidden.shape)}")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"weight: expected shape [V, {hidden.shape[-1]}], as hidden is {tuple(hidden.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if weight.shape[0] == 0 and not part:
        raise ValueError(f"weight: the vocabulary (first dimension) is empty, shape {tuple(weight.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias: expected shape ({weight.shape[0]},), got {tuple(bias.shape)}")


def check_no_transforms(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    for name, tensor in (("hidden", hidden), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            checks.check_no_transform(tensor, name)


def product_dtype(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> torch.dtype:
    """The dtype `F.linear` would multiply in: autocast's, which leaves float64 alone, or the tensors' own."""
    others = (("weight", weight),) if bias is None else (("weight", weight), ("bias", bias))
    kind = hidden.device.type
    # The meta device has no autocast, and raises when asked for it.
    if (
        kind != "meta"
        and torch.is_autocast_enabled(kind)
        and torch.float64 not in (hidden.dtype, weight.dtype)
    ):
        return torch.get_autocast_dtype(kind)
    for name, tensor in others:
        if tensor.dtype != hidden.dtype:
            raise TypeError(f"{name}: is {tensor.dtype}, hidden is {hidden.dtype}; cast one, or use autocast")
    return hidden.dtype


def buffer_bytes(
    chunk_bytes: int | None, hidden: Tensor, columns: int, product: torch.dtype, summed: bool
) -> int:
    """Bytes of the chunk buffer. columns: of the logits, as every rank counts them.

    summed: several chunks would need the weight's gradient in fp32 beside them. If a single chunk takes no
    more than a buffer and that sum, there is one chunk: less peak memory, and no sum to read and write.
    """
    if chunk_bytes is None:
        if hidden.device.type in CHUNK_BYTES:
            return CHUNK_BYTES[hidden.device.type]
        one = hidden.numel() // hidden.shape[-1] * columns * product.itemsize
        sums = 4 * columns * hidden.shape[-1] if summed and product in HALF else 0
        return max(one, 1) if one <= CHUNK_BYTES_ELSEWHERE + sums else CHUNK_BYTES_ELSEWHERE
    return chunk_bytes
