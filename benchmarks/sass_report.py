"""What the compiled kernels cost: instructions a logit, registers, occupancy, and the rates that follow.

    python benchmarks/sass_report.py --arch 90 --dtype bf16
    python benchmarks/sass_report.py --arch 80 90 100 --dtype bf16 fp16 fp32 --json
    python benchmarks/sass_report.py --json --no-peers --variants '[["fused", "deft", "bf16", "90", ""]]'

Compiles every kernel ahead of time, disassembles it and counts its main loops; no GPU is needed. Rates are
bounds computed from the counts and a GPU's data, in 1e12 logits a second; none is a measurement. Other
packages' Triton kernels stand beside ours where they are installed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import sass
from ahead_of_time import (
    ITEMSIZE,
    KERNELS,
    OBJECTIVES,
    TARGETS,
    VOCABULARY,
    Compiled,
    Variant,
    compile_variant,
)
from gpus import DEFAULT, GPUS, occupancy, programs, rates
from peer_kernels import PEERS, Missing

from deft_kernels.core.spec import Spec

# Instructions a bf16 logit on sm_90 that the main loops may take; at an H200's full bandwidth there is room
# for 15 while one is read.
STATISTICS, STATISTICS_ENTROPY, GRADIENT, GRADIENT_GENERAL = 7.5, 8.8, 6.0, 8.0


def budget(variant: Variant, loop: str) -> float | None:
    """None where no budget is stated: other dtypes and architectures, transformed logits, max p."""
    spec = Spec(OBJECTIVES[variant.objective], statistics="stats" in variant.options.split(","))
    if (variant.arch, variant.dtype) != ("90", "bf16") or variant.options not in ("", "narrow") or spec.peaks:
        return None
    if loop == "statistics":
        return STATISTICS_ENTROPY if spec.needs_entropy else STATISTICS
    return GRADIENT_GENERAL if spec.squares or spec.logs else GRADIENT


def bytes_per_logit(variant: Variant) -> float:
    """Read from global memory in the loop: the logit, and its class's weight where smoothing needs it."""
    options = variant.options.split(",")
    return ITEMSIZE[variant.dtype] + (4 if {"weights", "smoothing"} <= set(options) else 0)


def records(
    compiled: Compiled, variant: Variant, package: str, loops: list[sass.Loop], gpu_name: str | None
) -> Iterator[dict[str, Any]]:
    """One record a main loop; one with `loop` null for a kernel without."""
    base: dict[str, Any] = {
        "package": package, "kernel": variant.kernel, "arch": variant.arch, "dtype": variant.dtype,
        "objective": variant.objective, "options": variant.options, "loop": None,
        "num_warps": compiled.num_warps, "registers": compiled.usage.registers,
        "spill_bytes": compiled.usage.spill_bytes, "stack_bytes": compiled.usage.stack_bytes,
        "shared_bytes": compiled.usage.shared_bytes,
    }  # fmt: skip
    if variant.arch in DEFAULT:
        held = (variant.arch, base["registers"], base["shared_bytes"], compiled.num_warps)
        base |= {"programs_per_sm": programs(*held), "occupancy": occupancy(*held)}
    if not loops:
        yield base
    for loop in loops:
        gpu = GPUS[gpu_name or DEFAULT[variant.arch]]
        instructions, mufu = loop.instructions / loop.logits, loop.mufu / loop.logits
        moved = ITEMSIZE[variant.dtype] * (2 if loop.stores else 1)
        # One turn's loads of every resident program: all of a turn's are issued before the first is used.
        in_flight = base["programs_per_sm"] * compiled.num_warps * 32 * loop.logits * ITEMSIZE[variant.dtype]
        rate = rates(gpu, instructions, mufu, moved)
        most = budget(variant, loop.kind) if package == "deft-kernels" else None
        yield base | {
            "loop": loop.kind,
            "instructions_per_logit": instructions,
            "budget": most,
            "within_budget": None if most is None else instructions <= most,
            "mufu_per_logit": mufu,
            "logits_per_turn": loop.logits,
            "bytes_in_flight_per_sm": in_flight,
            "load_bits": loop.load_bits,
            "barriers_in_loop": loop.barriers,
            "shuffles_in_loop": loop.shuffles,
            "gpu": gpu.name,
            "issue_limited": rate.issue,
            "mufu_limited": rate.special,
            "bandwidth_limited": rate.bandwidth,
            "bound": rate.bound,
        }


def ours(variant: Variant, gpu: str | None) -> list[dict[str, Any]]:
    compiled = compile_variant(variant)
    loops = sass.main_loops(compiled.code, bytes_per_logit(variant))
    return list(records(compiled, variant, "deft-kernels", loops, gpu))


def peers(arch: str, dtype: str, vocabulary: int, gpu: str | None) -> Iterator[dict[str, Any] | str]:
    """Records, and a line for every peer that is skipped."""
    for peer in PEERS:
        try:
            compiled = peer.compile(arch, dtype, vocabulary)
        except Missing as reason:
            yield f"skipped {peer.package}: {reason}"
            continue
        variant = Variant(peer.kernel, peer.objective, dtype, arch)
        loops = sass.main_loops(compiled.code, ITEMSIZE[dtype])
        loops = loops or [sass.whole(compiled.code, ITEMSIZE[dtype])]
        yield from records(compiled, variant, f"{peer.package} {peer.version}", loops, gpu)


def line(record: dict[str, Any]) -> str:
    text = (
        f"{record['arch']:6} {record['dtype']:5} {record['kernel']:19} {record['objective']:22} "
        f"{record['registers']:4} regs {record['spill_bytes']:3} spilled {record['shared_bytes']:5} B shared"
    )
    if "occupancy" in record:
        text += f" {record['occupancy']:4.0%} occupied"
    if record["loop"] is None:
        return text
    verdict = {None: "", True: " (within budget)", False: f" (OVER {record['budget']})"}
    return text + (
        f" | {record['loop']:10} {record['instructions_per_logit']:5.2f}/logit"
        f"{verdict[record['within_budget']]}, MUFU {record['mufu_per_logit']:.2f}, "
        f"{record['load_bits']}-bit loads, {record['bytes_in_flight_per_sm'] / 1024:.0f} KB in flight, "
        f"{record['barriers_in_loop']} barriers, "
        f"{record['shuffles_in_loop']} shuffles | {record['gpu']}: issue {record['issue_limited']:.2f}, "
        f"MUFU {record['mufu_limited']:.2f}, bandwidth {record['bandwidth_limited']:.2f} T/s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", nargs="+", default=["80", "90", "100"], choices=list(TARGETS))
    parser.add_argument("--dtype", nargs="+", default=list(ITEMSIZE), choices=list(ITEMSIZE))
    parser.add_argument("--kernel", nargs="+", default=list(KERNELS), choices=KERNELS)
    parser.add_argument("--objective", nargs="+", default=list(OBJECTIVES), choices=list(OBJECTIVES))
    parser.add_argument(
        "--options",
        default="",
        help="comma-separated: softcap, smoothing, weights, zloss, peel, stats, ones, narrow",
    )
    parser.add_argument("--gpu", choices=list(GPUS), help="whose rates (default: one of each architecture)")
    parser.add_argument(
        "--variants", type=json.loads, metavar="JSON",
        help="instead of every combination: a list of [kernel, objective, dtype, arch, options]",
    )  # fmt: skip
    parser.add_argument("--no-peers", action="store_true", help="only the package's own kernels")
    parser.add_argument("--json", action="store_true", help="a list of objects, one a loop")
    args = parser.parse_args()
    if args.gpu and any(arch != GPUS[args.gpu].arch for arch in args.arch):
        parser.error(f"--gpu {args.gpu} is of --arch {GPUS[args.gpu].arch}")

    variants = [Variant(*fields) for fields in args.variants or ()] or [
        Variant(kernel, objective, dtype, arch, args.options)
        for arch, dtype, kernel, objective in itertools.product(
            args.arch, args.dtype, args.kernel, args.objective
        )
    ]
    found: list[dict[str, Any]] = []
    skipped: list[str] = []

    def take(record: dict[str, Any]) -> None:
        found.append(record)
        if not args.json:
            print(line(record), flush=True)

    with ProcessPoolExecutor(min(len(variants), os.cpu_count() or 1)) as pool:
        for group in pool.map(ours, variants, itertools.repeat(args.gpu)):
            for record in group:
                take(record)
    if not args.no_peers:
        nvidia = [arch for arch in args.arch if arch in DEFAULT]
        for arch, dtype in itertools.product(nvidia, args.dtype):
            for record in peers(arch, dtype, VOCABULARY, args.gpu):
                if isinstance(record, str):
                    skipped.append(record)
                else:
                    take(record)
    if args.json:
        print(json.dumps(found, indent=1))
    for reason in dict.fromkeys(skipped):
        print(reason, file=sys.stderr if args.json else sys.stdout)


if __name__ == "__main__":
    main()
