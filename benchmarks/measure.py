"""Time, bytes and peak memory of losses over the same logits, taken in turns in one process.

What is compared is interleaved, round by round, with a copy of the logits among it: other load on the
machine, a clock that moves and a cold cache then fall on all alike, and ratios within a run mean something.
Inputs are random and never come out of the last-level cache: buffers that are small beside it are rotated.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor

Loss = Callable[[Tensor, Tensor], Tensor]
PHASES = ("forward", "backward", "both")
COPY_STREAMS = 2  # reads once, writes once


@dataclass(frozen=True)
class Case:
    phase: str
    n: int
    vocabulary: int
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.phase}-{str(self.dtype)[6:]}-{self.n}x{self.vocabulary}"

    @property
    def stream(self) -> int:
        """Bytes of one read or write of the logits."""
        return self.n * self.vocabulary * self.dtype.itemsize


@dataclass
class Measured:
    """seconds: one a round.  copy: of the same rounds.  peak: bytes beyond the logits, gradient included.
    failure: why there is nothing, when there is nothing."""

    seconds: list[float] = field(default_factory=list)
    copy: list[float] = field(default_factory=list)
    peak: int | None = None
    failure: str | None = None

    def record(self, case: Case, streams: int) -> dict[str, object]:
        """What is kept of a measurement; `streams` is what the mode cannot do without."""
        found: dict[str, object] = {
            "phase": case.phase, "n": case.n, "v": case.vocabulary, "dtype": str(case.dtype)[6:],
        }  # fmt: skip
        if self.failure is not None:
            return found | {"failure": self.failure}
        taken, copied = median(self.seconds), median(self.copy)
        low, _, high = quantiles(self.seconds, n=4) if len(self.seconds) > 1 else self.seconds * 3
        moved = streams * case.stream
        return found | {
            "rounds": len(self.seconds), "ms": taken * 1e3, "ms_quartiles": [low * 1e3, high * 1e3],
            "streams": streams, "bytes": moved, "gb_per_s": moved / taken / 1e9,
            "copy_ms": copied * 1e3, "ratio_to_copy": taken / copied,
            "copy_gb_per_s": COPY_STREAMS * case.stream / copied / 1e9, "peak_bytes": self.peak,
        }  # fmt: skip


def last_level_cache(device: torch.device) -> int:
    """Bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("*/size")]
    return max((int(size[:-1]) * 1024 for size in sizes if size.endswith("K")), default=32 * 2**20)


class Inputs:
    """Logits and labels of a case; sets that fill four caches. `restored` undoes an in-place gradient."""

    def __init__(self, case: Case, device: torch.device, sets: int | None = None):
        self.case = case
        generator = torch.Generator(device).manual_seed(0)
        if sets is None:
            sets = max(1, math.ceil(4 * last_level_cache(device) / case.stream)) if case.stream else 1
        shape = (case.n, case.vocabulary)
        self.labels = torch.randint(0, case.vocabulary, (case.n,), generator=generator, device=device)
        self.pristine = torch.randn(shape, generator=generator, device=device).mul_(3).to(case.dtype)
        self.copied = torch.empty_like(self.pristine)
        self.sets = [self.pristine.clone().requires_grad_() for _ in range(min(sets, 8))]
        self._next = cycle(self.sets)

    def next(self) -> Tensor:
        return next(self._next)

    def restored(self, logits: Tensor) -> None:
        logits.grad = None
        logits.detach().copy_(self.pristine)


# Cycles that a GPU waits before it begins what is timed, about 3 ms. The host queues its launches
# meanwhile, as in a training step, where it runs ahead; otherwise small shapes would measure the host.
HEAD_START = 6_000_000


def clock(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds that `run` takes: of a GPU's time what it is busy with the work, of a CPU's all."""
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(device)
        torch.cuda._sleep(HEAD_START)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1e3
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def once(loss: Loss, case: Case, inputs: Inputs, device: torch.device) -> float:
    """Seconds of one call in the case's phase; what is not of that phase is not timed."""
    logits = inputs.next()
    if case.phase == "backward":
        value = loss(logits, inputs.labels)
        taken = clock(device, lambda: value.backward())
        del value
    elif case.phase == "forward":
        taken = clock(device, lambda: loss(logits, inputs.labels))
    else:
        taken = clock(device, lambda: loss(logits, inputs.labels).backward())
    inputs.restored(logits)
    return taken


def peak(device: torch.device, run: Callable[[], object]) -> int:
    """Most bytes of tensors alive during `run`, beyond those alive before."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True, acc_events=True) as profile:
        run()
    events = profile.profiler.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    alive = most = 0
    for _, change in sorted(changes):
        alive += change
        most = max(most, alive)
    return most


def compare(
    losses: dict[str, Loss],
    case: Case,
    device: torch.device,
    rounds: tuple[int, int],
    seconds: float,
    tolerated: Sequence[str] = (),
    memory: bool = True,
) -> dict[str, Measured]:
    """Measure `losses` in turns: at least rounds[0] rounds, then until rounds[1] or `seconds` are over.

    memory: whether to measure the peak too. Out of memory is a result; any other exception is one only for
    the names in `tolerated`.
    """
    inputs = Inputs(case, device)
    found = {name: Measured() for name in losses}

    def attempt(name: str, run: Callable[[], object]) -> None:
        try:
            run()
        except (torch.OutOfMemoryError, MemoryError):
            found[name].failure = "out of memory"
        except Exception as error:
            if name not in tolerated:
                raise
            found[name].failure = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
        if found[name].failure is not None:
            _release(inputs, device)

    def standing() -> Iterator[str]:
        return (name for name in losses if found[name].failure is None)

    for name in losses:
        # Twice: the first call compiles, and the second runs what the first one made of the allocator.
        attempt(name, lambda loss=losses[name]: [once(loss, case, inputs, device) for _ in range(2)])

    def measure_peak(name: str) -> None:
        logits = inputs.next()

        def whole() -> None:
            value = losses[name](logits, inputs.labels)
            if case.phase != "forward":
                value.backward()

        found[name].peak = peak(device, whole)
        inputs.restored(logits)

    for name in list(standing()) if memory else ():
        attempt(name, lambda name=name: measure_peak(name))
    times = {name: measured.seconds for name, measured in found.items()}
    begun = time.perf_counter()
    for turn in range(rounds[1]):
        if turn >= rounds[0] and time.perf_counter() - begun > seconds:
            break
        copied = clock(device, lambda: inputs.copied.copy_(inputs.next().detach()))
        order = list(standing())
        for name in order if turn % 2 == 0 else reversed(order):
            attempt(name, lambda name=name: times[name].append(once(losses[name], case, inputs, device)))
            found[name].copy.append(copied)
    return found


def _release(inputs: Inputs, device: torch.device) -> None:
    for logits in inputs.sets:
        inputs.restored(logits)
    if device.type == "cuda":
        torch.cuda.empty_cache()
