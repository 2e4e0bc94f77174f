"""What the launches of one call share: tensors as the kernels address them, scalars, constexprs, options."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from functools import cached_property, lru_cache, wraps
from typing import Any

import torch
import triton
from torch import Tensor

from ...core.spec import Spec, log2_scale
from ...core.statistics import Field
from ..choice import interpreted
from . import finish, objectives
from .arithmetic import GENERIC, INTERPRETED, PTX


def mode() -> int:
    if interpreted():
        return INTERPRETED.value
    return GENERIC.value if torch.version.hip is not None else PTX.value


def options(mode: int, wide: bool) -> dict[str, Any]:
    """Compiler options. Contraction of products and sums is said aloud: Triton 3.10 changes its default.

    wide: let ptxas take 128 registers, see the function.
    """
    chosen: dict[str, Any] = {"enable_fp_fusion": True}
    if wide and mode == PTX.value:
        chosen["maxnreg"] = 128
    return chosen


def wide(spec: Spec, *, reduces: bool = False) -> bool:
    """Whether a kernel has to be offered more registers than ptxas takes by itself.

    It squeezes the longer loops of soft-capped or smoothed logits into 40 to 48, with 8 to 32 bytes spilled
    (sm_80, sm_90). With the search for the predicted class behind the loop of `statistics_kernel` (`reduces`)
    it makes 5 to 8 of a turn's 32 exponentials twice rather than hold them, 4 % more instructions (sm_90,
    sm_100). With 128 it does neither. Ahead of time, Triton 3.9: benchmarks/sass_report.py --options stats.
    """
    return spec.softcap > 0 or spec.label_smoothing > 0 or (reduces and spec.statistics)


def lean(spec: Spec) -> bool:
    """Whether the loops hold nothing beyond logp and sum p^2, so that wide programs have registers enough."""
    heavy = spec.needs_entropy or spec.squares or spec.logs or spec.peaks
    return not (heavy or spec.softcap > 0 or spec.label_smoothing > 0)


@lru_cache(maxsize=8)
def kernel_for(kernel: Any, vocabulary: int) -> Any:
    """The kernel; for V = 1 one to which V is not a constant, which Triton 3.6 fails to compile."""
    if vocabulary > 1 or interpreted():
        return kernel
    return triton.jit(kernel.fn, do_not_specialize=["vocabulary"])


def warp() -> int:
    return 64 if torch.version.hip is not None else 32


def processors(device: torch.device) -> int:
    if device.type == "cpu":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


# Made once a Spec: anew at each launch they take the host longer than the launch.
@lru_cache(maxsize=256)
def objective_constants(spec: Spec) -> dict[str, Any]:
    """The constexprs that say which objective it is."""
    o = spec.objective
    through = finish.HELD
    if not o.detach and o.family != "none":
        by = {
            "cayley": finish.BY_LOGP,
            "prob": finish.BY_LOGP,
            "collision": finish.BY_COLLISION,
            "shannon": finish.BY_ENTROPY,
            "entropy": finish.BY_ENTROPY,
            "max_prob": finish.BY_MAX_PROB,
        }
        through = by.get(o.focus, finish.HELD)
    return {
        "FOCUS": objectives.FOCI[o.focus],
        "FAMILY": objectives.FAMILIES[o.family],
        "THROUGH": through.value,
        "IS_WEIGHT": o.family == "weighted",
        "BANDED": o.has_band,
        "Z_LOSS": spec.z_loss > 0,
        "SMOOTHED": spec.label_smoothing > 0,
        "ENTROPY": spec.needs_entropy,
        "PREDICTED": spec.statistics,
    }


@lru_cache(maxsize=256)
def objective_scalars(spec: Spec) -> dict[str, float]:
    o = spec.objective
    return {
        "alpha": o.alpha,
        "eps": o.eps,
        "power": o.power,
        "scale": 1.0 / math.log(o.top_k),
        "low": o.low,
        "high": o.high,
        "z_loss": spec.z_loss,
        "smoothing": spec.label_smoothing,
    }


def strides_of(logits: Tensor) -> tuple[int, int, int]:
    """(inner, outer, stride): row r lies at (r // inner) outer + (r % inner) stride."""
    dims = [d for d in zip(logits.shape[:-1], logits.stride()[:-1], strict=True) if d[0] != 1]
    merged: list[tuple[int, int]] = []
    for size, stride in dims:
        if merged and merged[-1][1] == size * stride:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    if not merged:
        return 1, logits.shape[-1], 0
    if len(merged) == 1:
        return 1, merged[0][1], 0
    if 0 in logits.shape[:-1]:
        # No row lies anywhere, and dimensions of size 0 merge with no other.
        return 1, logits.shape[-1], 0
    (_, outer), (inner, stride) = merged
    return inner, outer, stride


def out_strides_of(out: Tensor, inner: int) -> tuple[int, int]:
    """Strides of the output's rows under the logits' own split of the row number."""
    own_inner, outer, stride = strides_of(out)
    if own_inner == inner:
        return outer, stride
    # The output is contiguous where the logits are not: one stride serves both parts.
    assert own_inner == 1
    return outer * inner, outer


def peel(width: int, tensors: tuple[Tensor, ...], strides: tuple[tuple[int, int], ...]) -> bool:
    """Whether to peel a head off every row, so that its loads and stores are 16 bytes wide.

    Not needed where all strides are multiples of 16 elements, which Triton sees by itself; not possible where
    rows of the tensors lie differently to a 16-byte boundary.
    """
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return False
    alike = len({(outer % width, inner % width) for outer, inner in strides}) == 1
    return alike and any(stride % 16 for pair in strides for stride in pair)


def on_device(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """Triton launches on the current device, which need not be the one that holds the tensors."""

    @wraps(launcher)
    def guarded(logits: Tensor, *args: Any, **keywords: Any) -> Any:
        with torch.cuda.device(logits.device) if logits.is_cuda else nullcontext():
            return launcher(logits, *args, **keywords)

    return guarded


class Call:
    """What the launches of one call share."""

    def __init__(self, logits: Tensor, labels: Tensor, class_weight: Tensor | None, spec: Spec):
        self.logits, self.labels, self.spec = logits, labels, spec
        self.count, self.vocabulary = labels.numel(), logits.shape[-1]
        self.device, self.mode, self.k = logits.device, mode(), log2_scale(spec.temperature)
        self.weighted = class_weight is not None
        self.class_weight = logits if class_weight is None else class_weight
        self.softcap = spec.softcap > 0
        self.options = options(self.mode, wide(spec))
        self.inner, *strides = strides_of(logits)
        self.strides = (strides[0], strides[1])

    # Of the statistics alone: a backward builds none of these, and launches no sum of the class weights.
    @cached_property
    def constants(self) -> dict[str, Any]:
        return objective_constants(self.spec)

    @cached_property
    def scalars(self) -> dict[str, float]:
        return objective_scalars(self.spec)

    @cached_property
    def weight_total(self) -> Tensor:
        return self.class_weight.float().sum() if self.weighted else self.logits

    def buffers(self) -> tuple[Tensor, Tensor]:
        rows = torch.empty(len(Field), self.count, dtype=torch.float32, device=self.device)
        return rows, torch.empty(self.count, dtype=torch.float32, device=self.device)

    def position(self) -> dict[str, int]:
        return {"inner": self.inner, "stride_outer": self.strides[0], "stride_inner": self.strides[1]}
