"""Gradients of a linear layer, added up over chunks of rows without a loss of precision."""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.groups import Shard, total
from ..core.head import HALF

# What a CPU widens to fp32 at a time, in elements: 4 MiB of fp32. Slices of a quarter and of four times the
# length took the same time (docs/linear.md).
SLICE_ELEMENTS = 2**20


def _sum_dtype(product: torch.dtype) -> torch.dtype:
    return torch.float32 if product in HALF else product


def _mixed_product(device: torch.device) -> bool:
    """Whether torch multiplies half-precision matrices into an fp32 one here (NVIDIA, not ROCm)."""
    return device.type == "cuda" and torch.version.hip is None


class HiddenGradient:
    """dhidden [N, D] = dlogits W, row by row; rows that no chunk covers are 0.

    If a head is split between ranks, each rank has a part of every row, and the parts cancel: in half
    precision they are kept and added in fp32, by one all-reduce of the whole, and the sum is cast once.
    """

    def __init__(self, hidden: Tensor, weight: Tensor, wanted: bool, shard: Shard | None = None):
        self.weight, self.wanted, self.dtype, self.shard = weight, wanted, hidden.dtype, shard
        sums = hidden.dtype if shard is None else _sum_dtype(hidden.dtype)
        self.total = torch.zeros(hidden.shape if wanted else (0,), dtype=sums, device=hidden.device)

    def put(self, rows: slice | Tensor, dlogits: Tensor) -> None:
        if not self.wanted:
            return
        if isinstance(rows, slice) and self.total.dtype == dlogits.dtype:
            torch.mm(dlogits, self.weight, out=self.total[rows])
        elif self.shard is not None and dlogits.dtype in HALF and _mixed_product(dlogits.device):
            self.total[rows] = torch.mm(dlogits, self.weight, out_dtype=torch.float32)
        else:
            self.total[rows] = torch.mm(dlogits, self.weight).to(self.total.dtype)

    def finish(self) -> Tensor:
        if self.wanted and self.shard is not None and self.shard.ranks > 1:
            total(self.total, self.shard.group)
        return self.total.to(self.dtype)


class WeightGradient:
    """dW [V, D] = sum over chunks of dlogits^T hidden, in fp32 for half-precision products; cast once.

    A single chunk needs no sum: its product, which the hardware accumulates in fp32, is the gradient.
    """

    def __init__(self, weight: Tensor, product: torch.dtype, single: bool, wanted: bool):
        self.dtype, self.wanted, self.empty = weight.dtype, wanted, True
        sums = weight.dtype if single and weight.dtype == product else _sum_dtype(product)
        self.total = torch.empty(weight.shape if wanted else (0,), dtype=sums, device=weight.device)

    def add(self, dlogits: Tensor, hidden: Tensor) -> None:
        if not self.wanted:
            return
        total = self.total
        if dlogits.dtype == total.dtype:
            if self.empty:
                torch.mm(dlogits.t(), hidden, out=total)
            else:
                total.addmm_(dlogits.t(), hidden)
        elif _mixed_product(total.device):
            if self.empty:
                torch.mm(dlogits.t(), hidden, out_dtype=total.dtype, out=total)
            else:
                torch.addmm(total, dlogits.t(), hidden, out_dtype=total.dtype, out=total)
        else:
            self._add_widened(dlogits, hidden.to(total.dtype))
        self.empty = False

    def _add_widened(self, dlogits: Tensor, hidden: Tensor) -> None:
        """Exact: half-precision factors fit fp32, and so do their products."""
        step = max(1, SLICE_ELEMENTS // dlogits.shape[0])
        for first in range(0, dlogits.shape[1], step):
            part = self.total[first : first + step]
            wide = dlogits[:, first : first + step].to(part.dtype)
            part.addmm_(wide.t(), hidden, beta=0 if self.empty else 1)

    def finish(self) -> Tensor:
        if self.wanted and self.empty:
            self.total.zero_()
        return self.total.to(self.dtype)


class BiasGradient:
    """dbias [V] = sum of the rows of dlogits, in fp32 for half-precision products; cast once."""

    def __init__(self, bias: Tensor, product: torch.dtype, wanted: bool):
        self.dtype, self.wanted = bias.dtype, wanted
        shape = bias.shape if wanted else (0,)
        self.total = torch.zeros(shape, dtype=_sum_dtype(product), device=bias.device)

    def add(self, dlogits: Tensor) -> None:
        if not self.wanted:
            return
        # By slices: on a CPU a sum in another dtype first copies what it sums.
        step = max(1, SLICE_ELEMENTS // dlogits.shape[0]) if dlogits.device.type == "cpu" else len(self.total)
        for first in range(0, len(self.total), step):
            part = dlogits[:, first : first + step]
            self.total[first : first + step] += part.sum(0, dtype=self.total.dtype)

    def finish(self) -> Tensor:
        return self.total.to(self.dtype)
