"""The linear call never holds all logits: no tensor has N * V elements, and no memory goes there."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from deft_kernels import fused_linear_deft_loss, objectives
from deft_kernels.core import head
from deft_kernels.operators import hidden as hidden_operators

# A chunk of 2 rows is 16 kB of fp32; N * V elements of one byte would be more. The row numbers that a block
# of the PyTorch backend keeps for itself, 2^21 / V, are fewer.
N, D, V = 10, 1, 2048
CHUNK = 2 * V * 4


def address(tensor: Tensor) -> int:
    """Of its storage, which a view shares."""
    return tensor.untyped_storage().data_ptr()


class Largest(TorchDispatchMode):
    """The most bytes of any new tensor that an operator returns, inside the package's own operators too."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.inside = 0, 0
        definitions = [value for value in vars(hidden_operators).values() if hasattr(value, "_init_fn")]
        self.bodies = {value._opoverload: value._init_fn for value in definitions}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        body = self.bodies.get(func)
        if body is None:
            out = func(*args, **(kwargs or {}))
        else:
            self.inside += 1
            with self:
                out = body(*args, **(kwargs or {}))
        given = {address(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor) and address(leaf) not in given]
        self.bytes = max([self.bytes, *(leaf.nbytes for leaf in made)])
        return out


def step(device: str, **keywords) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).to(device).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(device).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator).to(device)
    labels[::5] = -100
    loss = fused_linear_deft_loss(hidden, weight, labels, chunk_bytes=CHUNK, **keywords)
    loss.sum().backward()
    assert weight.grad.abs().sum() > 0 and hidden.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "keywords",
    [
        {"reduction": "mean"},
        {"reduction": "none"},
        {"objective": "cayley", "label_smoothing": 0.1, "z_loss": 0.1},
        {"objective": objectives.deft(1, detach=False), "softcap": 3.0},
        {"objective": objectives.eaft().within("p>=1e-6"), "temperature": 2.0},
        {"objective": lambda r: -r.logp * r.entropy},
    ],
    ids=["mean", "none", "cayley", "transforms", "band", "function"],
)
def test_no_tensor_has_n_times_v_elements(keywords, backend, device):
    """The largest is the chunk, 16 kB; N * V is 20,480, and the rows have 19 numbers each."""
    with Largest() as watch:
        step(device, backend=backend, **keywords)
    assert watch.inside >= 1
    assert watch.bytes == CHUNK < N * V


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_frozen_head_has_no_gradient_memory(reduction, device):
    """V * D numbers are 8 chunks here; none is made for a weight or a bias that wants no gradient."""
    hidden = torch.randn(N, 16, device=device, requires_grad=True)
    weight, bias = torch.randn(V, 16, device=device), torch.randn(V, device=device)
    labels = torch.arange(N, device=device)
    largest = []
    for trained in (False, True):
        weight.requires_grad_(trained)
        with Largest() as watch:
            loss = fused_linear_deft_loss(
                hidden, weight, labels, bias, reduction=reduction, chunk_bytes=CHUNK, backend="torch"
            )
            loss.sum().backward()
        largest.append(watch.bytes)
    assert largest == [CHUNK, weight.nbytes]


def test_the_watch_sees_whole_logits():
    """The test above can fail: with a budget for all rows, their logits are one tensor."""
    with Largest() as watch:
        loss = fused_linear_deft_loss(
            torch.randn(N, D), torch.randn(V, D), torch.zeros(N, dtype=torch.int64), chunk_bytes=10**9
        )
    assert loss > 0
    assert watch.bytes == 4 * N * V


RESIDENT = """
import sys, torch
from deft_kernels import fused_linear_deft_loss
torch.set_num_threads(1)
budget = int(sys.argv[1])
n, d, v = 4096, 8, 8192
def step(n, v, reduction):
    hidden, weight = torch.full((n, d), 0.5).requires_grad_(), torch.full((v, d), 0.25).requires_grad_()
    labels = torch.arange(n) % v
    fused_linear_deft_loss(hidden, weight, labels, chunk_bytes=budget, reduction=reduction).sum().backward()
step(4, 100, "none")
def peak():
    return int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
for reduction in ("mean", "none"):
    open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
    before = peak()
    step(n, v, reduction)
    print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_stays_at_the_budget():
    """4096 x 8192 fp32 logits are 128 MiB; a budget of 4 MiB must not grow past 24 (scratch, BLAS, rows)."""
    command = [sys.executable, "-c", RESIDENT, str(4 * 2**20)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    mean, none = (int(line) for line in printed.split())
    assert mean <= 24 * 2**20
    assert none <= 24 * 2**20


@pytest.mark.parametrize(
    ("rows", "device", "dtype", "summed", "expected"),
    [
        (8192, "meta", torch.bfloat16, True, 8192 * 131072 * 2),  # 2 GiB for one; several need 3
        (16384, "meta", torch.bfloat16, True, 2**30),  # 4 GiB for one
        (8192, "meta", torch.bfloat16, False, 2**30),  # a frozen head has no sum
        (2048, "meta", torch.bfloat16, False, 2048 * 131072 * 2),  # within a buffer anyway
        (8192, "meta", torch.float32, True, 2**30),  # fp32 is summed in place
        (8192, "cpu", torch.bfloat16, True, 32 * 2**20),
    ],
)
def test_one_chunk_where_that_is_the_least_memory(rows, device, dtype, summed, expected):
    hidden = torch.empty(rows if device == "meta" else 1, 4096, device=device)
    assert head.buffer_bytes(None, hidden, 131072, dtype, summed) == expected
    assert head.buffer_bytes(123, hidden, 131072, dtype, summed) == 123
