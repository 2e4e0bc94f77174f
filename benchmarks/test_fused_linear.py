"""Forward and backward from hidden states against `F.linear` and `F.cross_entropy`, in turns in one process.

    pytest benchmarks -k linear -s

Holds the promises of the linear call on a CPU, at (N, D, V) = (1024, 512, 32000) in fp32: at most 1.05 of the
eager pair's time, at most 0.45 of it with 70 % of the rows ignored, at most 0.35 of its peak memory beyond
the inputs. Beside them stand PyTorch's chunked `F.linear_cross_entropy` (torch >= 2.13) and TRL's chunked
log-prob head, where they are installed. With DEFT_KERNELS_BENCH_TINY=1 the shapes are small and only the
running of it is tested.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from statistics import median

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from deft_kernels import fused_linear_deft_loss, gated_loss

TINY = os.environ.get("DEFT_KERNELS_BENCH_TINY", "0") == "1"
# The promise's shape: a small model's width with a Llama 2 vocabulary; fp32 logits of 131 MB.
N, D, V = (64, 16, 500) if TINY else (1024, 512, 32000)
ROUNDS = 1 if TINY else 9
IGNORED = (0.0, 0.7)
# TRL's own tile of the vocabulary (trl.trainer.utils, 1.16).
TRL_TILE = 32768

EAGER, OURS = "F.linear, F.cross_entropy", "fused_linear_deft_loss"

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return fused_linear_deft_loss(hidden, weight, labels)


def recomputed(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    rows = fused_linear_deft_loss(hidden, weight, labels, reduction="none")
    return rows.sum() / (labels != -100).sum()


def peers() -> dict[str, Loss | str]:
    """Each peer's call, or why it is skipped."""
    found: dict[str, Loss | str] = {}
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()

        def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            return F.linear_cross_entropy(hidden, weight, labels, ignore_index=-100, options=options)

        found["F.linear_cross_entropy, chunked"] = chunked
    else:
        found["F.linear_cross_entropy, chunked"] = f"needs torch 2.13, this is {torch.__version__}"
    try:
        from trl.kernels import ChunkedLogProbFunction
    except (ImportError, RuntimeError) as error:  # the second where one of trl's own imports is missing
        found["TRL chunked log-prob head, deft"] = f"not installed ({error})"
    else:

        def trl(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
            valid = labels != -100
            args = (labels.clamp(min=0), 1.0, TRL_TILE, None, 1.0, ("log_sum_sq_probs",))
            logp, _, squares, _, _ = ChunkedLogProbFunction.apply(hidden, weight, None, *args)
            return torch.where(valid, gated_loss(logp, squares), 0.0).sum() / valid.sum()

        found["TRL chunked log-prob head, deft"] = trl
    return found


def problem(ignored: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(N, D, generator=generator).requires_grad_()
    weight = torch.randn(V, D, generator=generator).mul_(3 * D**-0.5).requires_grad_()
    labels = torch.randint(0, V, (N,), generator=generator)
    labels[torch.rand(N, generator=generator) < ignored] = -100
    return hidden, weight, labels


def step(loss: Loss, hidden: Tensor, weight: Tensor, labels: Tensor) -> None:
    hidden.grad = weight.grad = None
    loss(hidden, weight, labels).backward()


def interleaved(calls: dict[str, Loss], ignored: float, rounds: int) -> dict[str, float]:
    """Median milliseconds of each, taken in turns."""
    tensors = problem(ignored)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(rounds + 1):
        for name, loss in calls.items():
            start = time.perf_counter()
            step(loss, *tensors)
            if round_:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: median(taken) for name, taken in times.items()}


def shown(taken: dict[str, float], ignored: float) -> str:
    base = taken[EAGER]
    lines = [f"\n({N}, {D}, {V}) float32, {ignored:.0%} of the rows ignored"]
    lines += [f"  {name:33} {ms:8.1f} ms, ratio {ms / base:.2f}" for name, ms in taken.items()]
    return "\n".join(lines)


@pytest.mark.parametrize(("ignored", "promised"), [(0.0, 1.05), (0.7, 0.45)])
def test_linear_ratio_to_eager(ignored: float, promised: float, capsys: pytest.CaptureFixture[str]) -> None:
    taken = interleaved({EAGER: eager, OURS: ours}, ignored, ROUNDS)
    with capsys.disabled():
        print(shown(taken, ignored))
    if not TINY:
        assert taken[OURS] <= promised * taken[EAGER]


@pytest.mark.parametrize("ignored", IGNORED)
def test_linear_beside_peers(ignored: float, capsys: pytest.CaptureFixture[str]) -> None:
    """Nothing is promised of these; fewer rounds, as one of them takes seconds."""
    calls = {EAGER: eager, OURS: ours, f"{OURS}, none": recomputed}
    found = peers()
    calls |= {name: call for name, call in found.items() if not isinstance(call, str)}
    taken = interleaved(calls, ignored, min(3, ROUNDS))
    with capsys.disabled():
        print(shown(taken, ignored))
        for name, reason in found.items():
            if isinstance(reason, str):
                print(f"  {name:33} skipped: {reason}")


PEAK = """
import sys, torch
sys.path.insert(0, sys.argv[2])
import test_fused_linear
loss = getattr(test_fused_linear, sys.argv[1])
small = torch.randn(4, 8).requires_grad_(), torch.randn(100, 8).requires_grad_()
loss(*small, torch.zeros(4, dtype=torch.int64)).backward()  # imports, threads, allocator
tensors = test_fused_linear.problem(0.0)
def peak():
    status = open("/proc/self/status").read()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
test_fused_linear.step(loss, *tensors)
print(peak() - before)
"""


def peak(name: str) -> int:
    """Peak resident bytes above the inputs, of a process of its own."""
    command = [sys.executable, "-c", PEAK, name, os.path.dirname(__file__)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_linear_memory_beyond_the_inputs(capsys: pytest.CaptureFixture[str]) -> None:
    """The gradients count: 64 MiB of weight gradient in each."""
    taken = {name: peak(name) for name in ("eager", "ours", "recomputed")[: 2 if TINY else 3]}
    with capsys.disabled():
        shown = ", ".join(f"{name} {size / 2**20:.0f} MiB" for name, size in taken.items())
        print(f"\n({N}, {D}, {V}) float32, peak beyond the inputs: {shown}", end="")
        print(f", ratio {taken['ours'] / taken['eager']:.2f}")
    if not TINY:
        assert taken["ours"] <= 0.35 * taken["eager"]


@pytest.mark.parametrize("loss", [eager, ours, recomputed], ids=["eager", "fused", "fused none"])
@pytest.mark.parametrize("ignored", IGNORED)
def test_linear_time(benchmark, loss: Loss, ignored: float) -> None:
    """The same, as records of pytest-benchmark; compare ratios above, not these across machines."""
    tensors = problem(ignored)
    benchmark.extra_info |= {"N": N, "D": D, "V": V, "flops": 6 * N * D * V}
    benchmark.pedantic(step, args=(loss, *tensors), rounds=ROUNDS, warmup_rounds=1)
