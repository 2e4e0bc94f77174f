"""What a call costs the host: forward and backward with launches that do nothing, and small calls on a CPU.

    pytest benchmarks/test_host.py -s

On a GPU a step is as fast as its host where the tensors are small. Here Triton's own dispatch runs, without a
GPU, down to a launcher that does nothing (`tests/ptx/host.py`); Liger's Functions are treated the same, and
`F.cross_entropy` runs on the CPU. All take turns in one process and one thread: compare by ratios. A figure
is the lower decile of the rounds: what is above it is other load.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deft_kernels import deft_loss, fused_linear_deft_loss
from deft_kernels.backends import choice

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

pytestmark = pytest.mark.filterwarnings("ignore")

TINY = os.environ.get("DEFT_KERNELS_BENCH_TINY", "0") == "1"
ROUNDS = 5 if TINY else 400
MODES = {
    "default": {},
    "in place": {"inplace": True},
    "in forward": {"grad_in_forward": True},
    "in place, in forward": {"inplace": True, "grad_in_forward": True},
}
# Ratio to F.cross_entropy of a step on the CPU, and to Liger's of one whose launches do nothing: what was
# measured (docs/cpu.md, docs/kernels.md), with room for a machine that is not quiet.
CPU_BOUNDS = {(4, 16): 11.0, (64, 256): 9.0}
LIGER_BOUND = 1.8


def microseconds(steps: dict[str, Callable[[], None]], rounds: int = ROUNDS) -> dict[str, float]:
    """Of each step, in turns."""
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            begin = time.perf_counter()
            step()
            taken[name].append(time.perf_counter() - begin)
    return {name: sorted(times)[len(times) // 10] * 1e6 for name, times in taken.items()}


def show(title: str, found: dict[str, float], base: str) -> None:
    print(f"\n{title}")
    for name, time_of in found.items():
        print(f"  {name:24} {time_of:8.0f} us {time_of / found[base]:8.2f}")


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@contextmanager
def idle(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Kernels are compiled, specialised and dispatched, and not launched."""
    pytest.importorskip("triton")
    if choice.interpreted() or torch.cuda.is_available():
        pytest.skip("needs compiled kernels and no GPU")
    from ptx.host import Idle

    with Idle(90).active():
        monkeypatch.setattr(choice, "_device_obstacle", lambda *_: None)
        yield


def step_of(leaf: Tensor, loss: Callable[[Tensor], Tensor]) -> Callable[[], None]:
    def step() -> None:
        leaf.grad = None
        loss(leaf).backward()

    return step


@pytest.mark.usefixtures("one_thread")
def test_launches_that_do_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    labels = torch.randint(0, 128, (8,))
    leaf = torch.randn(8, 128).requires_grad_()
    hidden, head = torch.randn(8, 64).requires_grad_(), torch.randn(128, 64).requires_grad_()
    steps = {
        "F.cross_entropy (CPU)": step_of(leaf, lambda z: F.cross_entropy(z, labels)),
        "Liger": step_of(leaf, lambda z: functional.liger_cross_entropy(z * 1.0, labels)),
    }
    for name, mode in MODES.items():
        steps[name] = step_of(leaf, lambda z, m=mode: deft_loss(z * 1.0, labels, backend="triton", **m))
    linear = {
        "Liger, linear": step_of(
            hidden, lambda h: functional.liger_fused_linear_cross_entropy(h, head, labels)
        ),
        "linear": step_of(
            hidden, lambda h: fused_linear_deft_loss(h, head, labels, backend="triton")
        ),
    }  # fmt: skip
    with idle(monkeypatch):
        found, of_hidden = microseconds(steps), microseconds(linear)
    show("launches that do nothing, over Liger's", found, "Liger")
    show("the same, from hidden states", of_hidden, "Liger, linear")
    if not TINY:
        assert max(found[name] for name in MODES) <= LIGER_BOUND * found["Liger"]
        assert of_hidden["linear"] <= LIGER_BOUND * of_hidden["Liger, linear"]


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize(("n", "vocabulary"), CPU_BOUNDS)
def test_small_calls_on_a_cpu(n: int, vocabulary: int) -> None:
    labels = torch.randint(0, vocabulary, (n,))
    leaf = torch.randn(n, vocabulary).requires_grad_()
    found = microseconds({
        "F.cross_entropy": step_of(leaf, lambda z: F.cross_entropy(z, labels)),
        "deft_loss": step_of(leaf, lambda z: deft_loss(z, labels)),
    })  # fmt: skip
    show(f"CPU, fp32, {n} x {vocabulary}", found, "F.cross_entropy")
    if not TINY:
        assert found["deft_loss"] <= CPU_BOUNDS[n, vocabulary] * found["F.cross_entropy"]
