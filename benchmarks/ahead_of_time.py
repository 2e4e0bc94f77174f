"""The package's kernels compiled for a GPU that is not here, as their launchers would launch them."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deft_kernels import objectives
from deft_kernels.backends.triton import kernels, launch, tuning
from deft_kernels.backends.triton.arithmetic import GENERIC, PTX
from deft_kernels.core.spec import Spec

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
OBJECTIVES = {
    "nll": objectives.nll(),
    "neg_prob": objectives.neg_prob(),
    "tsallis": objectives.tsallis(0.5),
    "deft": objectives.deft(),
    "deft-shannon": objectives.deft(1),
    "deft-max": objectives.deft(float("inf")),
    "deft-exact": objectives.deft(detach=False),
    "deft-shannon-exact": objectives.deft(1, detach=False),
    "deft-max-exact": objectives.deft(float("inf"), detach=False),
    "cayley": objectives.cayley(mean_prob=0.5),
    "rational": objectives.rational(),
    "dft": objectives.dft(),
    "eaft": objectives.eaft(),
    "band": objectives.deft().within("p>=0.1"),
    "statistics": objectives.of_statistics(),
    "statistics-without-max": objectives.of_statistics(with_max=False),
}
KERNELS = ("statistics", "statistics-stored", "combine", "finish", "gradient", "fused")
VOCABULARY = 128256


@dataclass(frozen=True)
class Variant:
    kernel: str
    objective: str
    dtype: str
    arch: str
    options: str = ""  # of: softcap, smoothing, weights, zloss, peel, stats, ones


@dataclass(frozen=True)
class Compiled:
    usage: sass.Usage
    code: str  # disassembled; empty for AMD GPUs, whose loops are not read
    num_warps: int


def _spec(variant: Variant) -> Spec:
    options = variant.options.split(",")
    return Spec(
        OBJECTIVES[variant.objective],
        softcap=30.0 if "softcap" in options else 0.0,
        z_loss=1e-4 if "zloss" in options else 0.0,
        label_smoothing=0.1 if "smoothing" in options else 0.0,
        statistics="stats" in options,
    )


def source(variant: Variant) -> tuple[ASTSource, dict[str, Any]]:
    """What `triton.compile` needs: constexprs as the launchers pass them, pointers 16-byte aligned."""
    spec, options = _spec(variant), variant.options.split(",")
    itemsize, hip = ITEMSIZE[variant.dtype], TARGETS[variant.arch].backend == "hip"
    warp = 64 if hip else 32
    vocabulary = 1 if "ones" in options else VOCABULARY
    if variant.kernel == "gradient":
        plan = tuning.gradient(vocabulary, itemsize, warp)
    elif variant.kernel == "fused":
        plan = tuning.fused(vocabulary, itemsize, launch.lean(spec), warp)
    else:
        plan = tuning.statistics(vocabulary, itemsize, spec.needs_entropy, warp)
    kernel = {
        "statistics": kernels.statistics_kernel,
        "statistics-stored": kernels.statistics_kernel,
        "combine": kernels.combine_kernel,
        "finish": kernels.finish_kernel,
        "gradient": kernels.gradient_kernel,
        "fused": kernels.fused_kernel,
    }[variant.kernel]
    constants: dict[str, Any] = dict(launch.objective_constants(spec))
    constants |= {
        "WEIGHTED": "weights" in options,
        "SOFTCAP": spec.softcap > 0,
        "TIES": spec.peaks,
        "STORED": variant.kernel == "statistics-stored",
        "PEEL": "peel" in options,
        "TAIL": plan.tail,
        "NEAR": plan.near,
        "LANES": plan.lanes,
        "WIDTH": plan.width,
        "MODE": GENERIC.value if hip else PTX.value,
        "BATCH": False,
        "SPLITS": 8,
        "UPSTREAM": False,
        "SQUARES": spec.squares,
        "LOGS": spec.logs,
        "PEAKS": spec.peaks,
    }
    numbers = ("rows", "loss", "states", "weight_total", "row_scale", "dloss", "upstream", "joined")
    pointer = dict.fromkeys(numbers, "*fp32")
    pointer |= {"logits": f"*{variant.dtype}", "dlogits": f"*{variant.dtype}", "labels": "*i64"}
    pointer["class_weight"] = "*fp32"
    if variant.kernel == "finish":
        pointer["floor"] = "fp32"
    integers = {
        "n_rows", "inner", "stride_outer", "stride_inner", "out_outer", "out_inner", "vocabulary", "span",
        "ignore_index", "dloss_stride", "scale_stride", "splits",
    }  # fmt: skip
    wide = {"stride_outer", "out_outer"}
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}
    aligned = {"stride_outer", "stride_inner", "out_outer", "out_inner", "vocabulary", "span", "n_rows"}
    if "peel" in options:
        aligned = {"span"}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            constexprs[(index,)] = constants[name]
        elif name in pointer:
            signature[name] = pointer[name]
            if pointer[name].startswith("*"):
                attributes[(index,)] = [["tt.divisibility", 16]]
        elif name == "inner" or (name in integers - {"vocabulary"} and "ones" in options):
            # Triton specialises on an integer that is 1; `inner` is for ordinary rows, all are at N = V = 1
            # but the vocabulary (see `launch.kernel_for`).
            signature[name] = "constexpr"
            constexprs[(index,)] = 1
        elif name in integers:
            signature[name] = "i64" if name in wide else "i32"
            if name in aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    compiled = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    chosen = launch.options(
        constants["MODE"], launch.wide(spec, reduces=variant.kernel.startswith("statistics"))
    )
    return compiled, {"num_warps": 1 if variant.kernel in ("combine", "finish") else plan.num_warps, **chosen}


def compile_variant(variant: Variant) -> Compiled:
    program, options = source(variant)
    return build(program, TARGETS[variant.arch], options)


def build(program: ASTSource, target: GPUTarget, options: dict[str, Any]) -> Compiled:
    compiled = triton.compile(program, target=target, options=options)
    if target.backend != "hip":
        code = sass.disassemble(compiled.asm["cubin"])
        usage = sass.usage(compiled.asm["cubin"], code, compiled.metadata.shared)
        return Compiled(usage, code, options["num_warps"])
    text = compiled.asm["amdgcn"]

    def field(name: str) -> int:
        return max([int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)] or [0])

    spills = field("vgpr_spill_count") + field("sgpr_spill_count")
    registers, stack = field("vgpr_count"), field("private_segment_fixed_size")
    return Compiled(sass.Usage(registers, spills, stack, compiled.metadata.shared), "", options["num_warps"])
