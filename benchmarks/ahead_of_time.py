"""Compile the package's kernels for a GPU that is not here, and count what came out.

    python benchmarks/ahead_of_time.py --arch 90 --dtype bf16

Compilation and disassembly come with Triton's wheel (ptxas, cuobjdump, nvdisasm); no GPU and no CUDA toolkit
is needed. Counts are of the innermost loops, found as backward branches in the machine code.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from deft_kernels import objectives
from deft_kernels.kernels import launch, row_kernels, table
from deft_kernels.kernels.device import GENERIC, PTX
from deft_kernels.spec import Spec

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ITEMSIZE = {"bf16": 2, "fp16": 2, "fp32": 4}
OBJECTIVES = {
    "nll": objectives.nll(),
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
}
KERNELS = ("statistics", "statistics-stored", "finish", "gradient", "fused")
VOCABULARY = 128256


@dataclass(frozen=True)
class Variant:
    kernel: str
    objective: str
    dtype: str
    arch: str
    options: str = ""  # of: softcap, smoothing, weights, zloss, peel, stats, ones


@dataclass
class Loop:
    instructions: int
    logits: int
    barriers: int
    shuffles: int
    exponentials: int
    widest_load: int

    @property
    def per_logit(self) -> float:
        return self.instructions / self.logits


@dataclass
class Report:
    variant: Variant
    registers: int
    spill_bytes: int
    stack_bytes: int
    shared_bytes: int
    loops: list[Loop]


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
    plans = {"gradient": table.gradient, "fused": table.fused}
    vocabulary = 1 if "ones" in options else VOCABULARY
    plan = plans.get(variant.kernel, table.statistics)(vocabulary, itemsize, warp)
    kernel = {
        "statistics": row_kernels.statistics_kernel,
        "statistics-stored": row_kernels.statistics_kernel,
        "finish": row_kernels.finish_kernel,
        "gradient": row_kernels.gradient_kernel,
        "fused": row_kernels.fused_kernel,
    }[variant.kernel]
    constants: dict[str, Any] = dict(launch.objective_constants(spec))
    constants |= {
        "WEIGHTED": "weights" in options,
        "SOFTCAP": spec.softcap > 0,
        "TIES": spec.peaks,
        "STORED": variant.kernel == "statistics-stored",
        "PEEL": "peel" in options,
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
    numbers = ("rows", "loss", "states", "weight_total", "row_scale", "dloss", "upstream")
    pointer = dict.fromkeys(numbers, "*fp32")
    pointer |= {"logits": f"*{variant.dtype}", "dlogits": f"*{variant.dtype}", "labels": "*i64"}
    pointer["class_weight"] = "*fp32"
    if variant.kernel == "finish":
        pointer["floor"] = "fp32"
    integers = {
        "n_rows", "inner", "stride_outer", "stride_inner", "out_outer", "out_inner", "vocabulary", "span",
        "ignore_index", "dloss_stride", "splits",
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
            # but the vocabulary (see `launch`).
            signature[name] = "constexpr"
            constexprs[(index,)] = 1
        elif name in integers:
            signature[name] = "i64" if name in wide else "i32"
            if name in aligned:
                attributes[(index,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    compiled = ASTSource(kernel, signature=signature, constexprs=constexprs, attrs=attributes)
    transformed = spec.softcap > 0 or spec.label_smoothing > 0
    chosen = launch.options(constants["MODE"], transformed)
    return compiled, {"num_warps": 1 if variant.kernel == "finish" else plan.num_warps, **chosen}


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def disassemble(cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [_tool("nvdisasm"), "-c", file.name], check=True, capture_output=True, text=True
        ).stdout


def _instructions(sass: str) -> list[tuple[str, str]]:
    """(label or empty, instruction) in order."""
    found: list[tuple[str, str]] = []
    for line in sass.splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            found.append((label[1], ""))
            continue
        text = re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line)
        if text:
            found.append(("", text[1].strip()))
    return found


def loops(sass: str) -> list[list[str]]:
    """Bodies of the innermost loops: from a label to the branch back to it, with no loop inside."""
    code = _instructions(sass)
    position = {label: index for index, (label, _) in enumerate(code) if label}
    spans = []
    for index, (_, text) in enumerate(code):
        branch = re.search(r"BRA(?:\.\S+)?\s.*?\(?`?\(?(\.L_x_\d+)", text) if "BRA" in text else None
        if branch and position.get(branch[1], index) < index:
            spans.append((position[branch[1]], index))
    inner = [a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans)]
    return [[text for _, text in code[start : stop + 1] if text] for start, stop in inner]


def _main_loops(variant: Variant, sass: str, width: int) -> list[Loop]:
    """The unmasked loops over the vocabulary; the masked heads and tails are told by their fewer loads."""
    result = []
    for body in loops(sass):
        loads = [text for text in body if re.search(r"\bLDG\.", text)]
        exponentials = sum("MUFU.EX2" in text for text in body)
        wide = [text for text in loads if ".128" in text]
        if len(wide) < 2 or exponentials < width * 2:
            continue
        result.append(
            Loop(
                instructions=len(body),
                logits=len(wide) * width,
                barriers=sum("BAR." in text for text in body),
                shuffles=sum("SHFL" in text for text in body),
                exponentials=exponentials,
                widest_load=128 if wide else 32,
            )
        )
    return result


def compile_variant(variant: Variant) -> Report:
    compiled_source, options = source(variant)
    target = TARGETS[variant.arch]
    compiled = triton.compile(compiled_source, target=target, options=options)
    if target.backend == "hip":
        text = compiled.asm["amdgcn"]

        def field(name: str) -> int:
            return max([int(n) for n in re.findall(rf"\.{name}:\s+(\d+)", text)] or [0])

        spills = field("vgpr_spill_count") + field("sgpr_spill_count")
        return Report(
            variant,
            field("vgpr_count"),
            spills,
            field("private_segment_fixed_size"),
            compiled.metadata.shared,
            [],
        )
    cubin = compiled.asm["cubin"]
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    numbers = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    sass = disassemble(cubin)
    spilled = len(re.findall(r"\b(?:LDL|STL)\b", sass)) * 4 + numbers.get("LOCAL", 0)
    width = 16 // ITEMSIZE[variant.dtype]
    return Report(
        variant,
        numbers["REG"],
        spilled,
        numbers["STACK"],
        numbers.get("SHARED", 0),
        _main_loops(variant, sass, width),
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["90"], choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=["bf16"], choices=list(ITEMSIZE))
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--objective", nargs="+", default=["deft"], choices=list(OBJECTIVES))
    parser.add_argument(
        "--options", default="", help="comma-separated: softcap, smoothing, weights, zloss, peel, stats, ones"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    records = []
    for arch in args.arch:
        for dtype in args.dtype:
            for kernel in args.kernel:
                for objective in args.objective:
                    report = compile_variant(Variant(kernel, objective, dtype, arch, args.options))
                    records.append(asdict(report))
                    if not args.json:
                        shown = ", ".join(
                            f"{loop.per_logit:.2f} instructions/logit ({loop.barriers} barriers, "
                            f"{loop.shuffles} shuffles)"
                            for loop in report.loops
                        )
                        print(
                            f"{arch:7} {dtype:5} {kernel:18} {objective:18} {report.registers:4} registers "
                            f"{report.spill_bytes:3} spilled {report.stack_bytes:3} stack  {shown}",
                            flush=True,
                        )
    if args.json:
        print(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
