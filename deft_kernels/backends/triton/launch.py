"""What the launches of one call share: tensors as the kernels address them, records, compiler options."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, cached_property, lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from ...core.spec import Spec, log2_scale
from ...core.statistics import Field
from ..choice import interpreted
from .records import Numbers, Options, Plan, Strides, static
from .tuning import Launch


@cache
def mode() -> str:
    """See `arithmetic`. Decided once, as Triton does when it decorates the kernels."""
    if interpreted():
        return "interpreted"
    return "generic" if torch.version.hip is not None else "ptx"


@cache
def options(mode: str, registers: int = 0) -> dict[str, Any]:
    """Compiler options. Contraction of products and sums is set explicitly: Triton 3.10 changes its default.

    registers: of a thread, at most; 0: as many as ptxas takes.
    """
    chosen: dict[str, Any] = {"enable_fp_fusion": True}
    if registers and mode == "ptx":
        chosen["maxnreg"] = registers
    return chosen


def registers(spec: Spec, *, reduces: bool = False) -> int:
    """What a kernel has to be offered beyond what ptxas takes by itself, 0 for nothing.

    It squeezes the longer loops of soft-capped or smoothed logits into 40 to 48, with 8 to 32 bytes spilled
    (sm_80, sm_90). With the search for the predicted class behind the loop of `statistics_kernel` (`reduces`)
    it makes 5 to 8 of a turn's 32 exponentials twice rather than hold them, 4 % more instructions (sm_90,
    sm_100). With 128 it does neither. Ahead of time, Triton 3.9: benchmarks/sass_report.py --options stats.
    """
    return 128 if spec.softcap > 0 or spec.label_smoothing > 0 or (reduces and spec.statistics) else 0


def lean(spec: Spec) -> bool:
    """Whether the loops hold nothing beyond logp and sum p^2, so that wide programs have registers enough."""
    heavy = spec.needs_entropy or spec.squares or spec.logs or spec.peaks
    return not (heavy or spec.softcap > 0 or spec.label_smoothing > 0)


def kernel_for(kernel: Any, vocabulary: int) -> Any:
    """The kernel; for V = 1 one to which V is not a constant, which Triton 3.6 fails to compile."""
    return kernel if vocabulary > 1 or mode() == "interpreted" else _unspecialised(kernel)


@cache
def _unspecialised(kernel: Any) -> Any:
    return triton.jit(kernel.fn, do_not_specialize=[*kernel.do_not_specialize, "vocabulary"])


@cache
def warp() -> int:
    return 64 if torch.version.hip is not None else 32


@cache
def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# The statistic through which the gate is differentiated, where it is not held constant.
THROUGH = {
    "cayley": "logp",
    "prob": "logp",
    "collision": "collision",
    "shannon": "entropy",
    "entropy": "entropy",
    "max_prob": "max_prob",
}


class Variants:
    """What the kernels of a loss are told: numbers, compiler options, and the options of each kernel.

    slices: of slice_kernel.  states: combine_kernel.  finish: finish_kernel.  batch: its launch for the
    statistics alone, before the batch's mean is known.  rows: statistics_kernel and fused_kernel.
    gradient: gradient_kernel.
    """

    def __init__(self, spec: Spec, vocabulary: int, weighted: bool, mode: str):
        o = spec.objective
        moves = not o.detach and o.family != "none"
        through = THROUGH.get(o.focus, "held") if moves else "held"
        states = Options(
            mode,
            smoothed=spec.label_smoothing > 0,
            entropy=spec.needs_entropy,
            ties=spec.peaks,
            predicted=spec.statistics,
        )
        finish = states._replace(
            weighted=weighted,
            focus="fixed" if o.family == "none" else o.focus,
            family=o.family,
            through=through,
            banded=o.has_band,
            z_loss=spec.z_loss > 0,
        )
        softcap = spec.softcap > 0
        self.states = static(states)
        self.slices = static(states._replace(softcap=softcap, weighted=weighted))
        self.finish = static(finish)
        self.batch = static(finish._replace(focus="fixed", family="none", through="held"))
        self.rows = static(
            finish._replace(
                softcap=softcap,
                squares=through == "collision",
                logs=through == "entropy",
                peaks=through == "max_prob",
            )
        )
        self.gradient = static(
            Options(
                mode,
                softcap=softcap,
                smoothed=states.smoothed,
                weighted=weighted,
                squares=spec.squares,
                logs=spec.logs,
                peaks=spec.peaks,
            )
        )
        self.numbers = Numbers(
            k=log2_scale(spec.temperature),
            temperature=spec.temperature,
            softcap=spec.softcap,
            alpha=o.alpha,
            eps=o.eps,
            power=o.power,
            scale=1.0 / math.log(o.top_k),
            floor=0.5 * (o.mean_prob or 0.0),
            low=o.low,
            high=o.high,
            z_loss=spec.z_loss,
            smoothing=spec.label_smoothing,
            spread=spec.label_smoothing / vocabulary / spec.temperature,
        )
        self.mode, self.registers = mode, registers(spec)
        self.compiler = options(mode, self.registers)
        self.compiler_of_reductions = options(mode, registers(spec, reduces=True))

    def compiler_of(self, launch: Launch) -> dict[str, Any]:
        """Of the fused kernel, whose entry in the table may ask for registers."""
        return options(self.mode, launch.registers or self.registers)


# Made once: to make the records takes the host longer than a launch. Triton also looks them up among those
# that it has compiled for, which is quick where they are the same objects.
variants = lru_cache(maxsize=256)(Variants)


@lru_cache(maxsize=256)
def plan_of(launch: Launch, peel: bool = False) -> Plan:
    return static(Plan(launch.lanes, launch.width, peel, launch.tail, launch.near, launch.deep))


def strides_of(logits: Tensor) -> Strides:
    if logits.is_contiguous():
        return Strides(1, logits.shape[-1], 0)
    dims = [d for d in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if d[0] != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if not merged:
        return Strides(1, logits.shape[-1], 0)
    if len(merged) == 1:
        return Strides(1, merged[0][1], 0)
    if 0 in logits.shape[:-1]:
        # No row lies anywhere, and dimensions of size 0 merge with no other.
        return Strides(1, logits.shape[-1], 0)
    (_, outer), (inner, stride) = merged
    return Strides(inner, outer, stride)


def out_strides_of(out: Tensor, inner: int) -> Strides:
    """Strides of the output's rows under the logits' own split of the row number."""
    own = strides_of(out)
    if own.inner == inner:
        return own
    # The output is contiguous where the logits are not: one stride serves both parts.
    assert own.inner == 1
    return Strides(inner, own.outer * inner, own.outer)


def peel(width: int, *rows: tuple[Tensor, Strides]) -> bool:
    """Whether to peel a head off every row, so that its loads and stores are 16 bytes wide.

    Not needed where all strides are multiples of 16 elements, which Triton sees by itself; not possible where
    rows of the tensors lie differently to a 16-byte boundary.
    """
    first = rows[0][1]
    wide = True
    for tensor, strides in rows:
        if tensor.data_ptr() % 16:
            return False
        if (strides.outer - first.outer) % width or (strides.stride - first.stride) % width:
            return False
        wide = wide and strides.outer % 16 == 0 and strides.stride % 16 == 0
    return not wide


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @wraps(launcher)
    def guarded(logits: Tensor, *args: Any, **keywords: Any) -> Any:
        if not logits.is_cuda or logits.device.index == torch.cuda.current_device():
            return launcher(logits, *args, **keywords)
        with torch.cuda.device(logits.device):
            return launcher(logits, *args, **keywords)

    return guarded


class Call:
    """What the launches of one call share. vocabulary: V, where the first tensor is not logits."""

    def __init__(
        self,
        logits: Tensor,
        labels: Tensor,
        class_weight: Tensor | None,
        spec: Spec,
        vocabulary: int | None = None,
    ):
        self.logits, self.labels, self.spec = logits, labels, spec
        self.count, self.device = labels.numel(), logits.device
        self.vocabulary = logits.shape[-1] if vocabulary is None else vocabulary
        self.weighted = class_weight is not None
        self.class_weight = logits if class_weight is None else class_weight
        self.variants = variants(spec, self.vocabulary, self.weighted, mode())
        self.strides = strides_of(logits)

    # Of the statistics alone: a backward launches no sum of the class weights.
    @cached_property
    def weight_total(self) -> Tensor:
        return self.class_weight.float().sum() if self.weighted else self.logits

    def buffers(self) -> tuple[Tensor, Tensor]:
        rows = torch.empty(len(Field), self.count, dtype=torch.float32, device=self.device)
        return rows, torch.empty(self.count, dtype=torch.float32, device=self.device)
