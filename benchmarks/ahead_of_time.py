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
from deft_kernels.backends.states import state_size
from deft_kernels.backends.triton import gradient_kernels, kernels, launch, tuning
from deft_kernels.backends.triton.records import Numbers, Strides
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
NARROW = 32000  # has entries of its own in the launch table

# The kernels' parameters, by name.
RECORDS: dict[str, Any] = {"strides": Strides, "out_strides": Strides, "numbers": Numbers}
POINTERS = {
    "labels": "*i64",
    **dict.fromkeys(("class_weight", "weight_total", "mean_prob", "rows", "loss"), "*fp32"),
    **dict.fromkeys(("states", "joined", "row_scale", "dloss", "upstream"), "*fp32"),
}
INTEGERS = {
    **dict.fromkeys(("n_rows", "vocabulary", "span", "ignore_index", "splits"), "i32"),
    **dict.fromkeys(("dloss_stride", "scale_stride", "stride_inner", "stride"), "i32"),
    **dict.fromkeys(("stride_outer", "outer"), "i64"),
}
ALIGNED = {"vocabulary", "span", "outer", "stride"}


@dataclass(frozen=True)
class Variant:
    kernel: str
    objective: str
    dtype: str
    arch: str
    options: str = ""  # of: softcap, smoothing, weights, zloss, peel, stats, ones, narrow


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
    vocabulary = 1 if "ones" in options else NARROW if "narrow" in options else VOCABULARY
    if variant.kernel == "gradient":
        plan = tuning.gradient(vocabulary, itemsize, warp)
    elif variant.kernel == "fused":
        plan = tuning.fused(vocabulary, itemsize, launch.lean(spec), warp)
    else:
        plan = tuning.statistics(vocabulary, itemsize, spec.needs_entropy, warp)
    mode = "generic" if hip else "ptx"
    variants = launch.variants(spec, vocabulary, "weights" in options, mode)
    kernel, record = {
        "statistics": (kernels.statistics_kernel, variants.rows),
        "statistics-stored": (kernels.slice_kernel, variants.slices),
        "combine": (kernels.combine_kernel, variants.states),
        "finish": (kernels.finish_kernel, variants.finish),
        "gradient": (gradient_kernels.gradient_kernel, variants.gradient),
        "fused": (kernels.fused_kernel, variants.rows),
    }[variant.kernel]
    constants: dict[str, Any] = {
        "OPTIONS": record,
        "PLAN": launch.plan_of(plan, "peel" in options),
        "SIZE": state_size(spec),
        "BATCH": False,
        "SPLITS": 8,
        "UPSTREAM": False,
    }
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], list[Any]] = {}

    def declare(name: str, *path: int) -> Any:
        """The type of an argument, or of a field of one that is a record, as a launch would find it."""
        if name in constants:
            constexprs[path] = constants[name]
            return "constexpr"
        if name in POINTERS or name in ("logits", "dlogits"):
            attributes[path] = [["tt.divisibility", 16]]
            return POINTERS.get(name, f"*{variant.dtype}")
        if name in kernel.do_not_specialize:
            return INTEGERS[name]
        if name == "inner" or (name in INTEGERS and name != "vocabulary" and "ones" in options):
            # Triton specialises on an integer that is 1; `inner` is for ordinary rows, all are at N = V = 1
            # but the vocabulary (see `launch.kernel_for`).
            constexprs[path] = 1
            return "constexpr"
        if name in INTEGERS:
            if name in ALIGNED and (name == "span" or "peel" not in options):
                attributes[path] = [["tt.divisibility", 16]]
            return INTEGERS[name]
        return "fp32"

    for index, name in enumerate(kernel.arg_names):
        if name in ("OPTIONS", "PLAN"):
            fields = constants[name]
            signature[name] = type(fields)(*["constexpr"] * len(fields))
            constexprs |= {(index, place): value for place, value in enumerate(fields)}
        elif name in RECORDS:
            fields = RECORDS[name]._fields
            signature[name] = RECORDS[name](*(declare(f, index, i) for i, f in enumerate(fields)))
        else:
            signature[name] = declare(name, index)
    compiled = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    chosen = variants.compiler_of(plan)
    if variant.kernel.startswith("statistics"):
        chosen = variants.compiler_of_reductions
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
