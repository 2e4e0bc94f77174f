"""Small calls on the CPU: nothing that they make is large enough for PyTorch to share it between threads.

Joining threads takes microseconds on a quiet machine and milliseconds beside a busy process.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deft_kernels import objectives
from deft_kernels.backends.pytorch import backend
from deft_kernels.core.spec import Spec

# at::internal::GRAIN_SIZE: a pointwise operation on fewer numbers stays in its thread.
GRAIN = 2**15


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("objective", ["deft", "eaft", "cayley"])
@pytest.mark.parametrize(("n", "vocabulary"), [(4, 16), (64, 256), (1000, 1)])
def test_nothing_large_is_made(n, vocabulary, objective, dtype):
    logits = torch.randn(n, vocabulary).to(dtype)
    labels, scale = torch.zeros(n, dtype=torch.int64), torch.ones(n)
    spec = Spec(objectives.resolve(objective))
    with Largest() as largest:
        _, rows = backend.row_loss(logits, labels, None, -100, spec)
        backend.gradient(logits, labels, None, rows, scale, spec, torch.empty_like(logits))
        if not spec.objective.needs_batch:
            backend.row_loss_with_gradient(logits, labels, scale, None, -100, spec, torch.empty_like(logits))
    assert n * vocabulary <= largest.numbers <= max(rows.numel(), n * vocabulary) < GRAIN
