"""Forward and backward of the linear call on a GPU, in turns with its bare matrix products and its peers.

    python benchmarks/linear.py --out linear.json
    python benchmarks/linear.py --shapes 8192x4096x131072 --dtype bf16

Shapes are N x D x V. "products" are the three multiplications alone, each whole and in the inputs' dtype: the
floor of a call that makes its gradients in the forward. Without a GPU a small shape runs on the CPU, which
tests this script and measures nothing.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import machine
import torch
import torch.nn.functional as F
from measure import clock, peak
from peers import Missing, _imported, _mean
from torch import Tensor

from deft_kernels import fused_linear_deft_loss, gated_loss

Step = Callable[[Tensor, Tensor, Tensor], object]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MIB = 2**20
ROUNDS = 15


def stepped(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    def step(hidden: Tensor, weight: Tensor, labels: Tensor) -> object:
        hidden.grad = weight.grad = None
        return loss(hidden, weight, labels).backward()

    return step


@torch.no_grad()
def products(hidden: Tensor, weight: Tensor, labels: Tensor) -> object:
    logits = hidden @ weight.t()
    return logits @ weight, logits.t() @ hidden


def eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight), labels)


def without_reduction(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return _mean(fused_linear_deft_loss(hidden, weight, labels, reduction="none"), labels)


def liger() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    module = _imported("liger_kernel.transformers.functional")

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        found = module.liger_fused_linear_cross_entropy(hidden, weight, labels)
        return found[0] if isinstance(found, tuple) else found

    return loss


def trl() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Its head with log sum p^2, and DEFT over that."""
    function = _imported("trl.kernels").ChunkedLogProbFunction

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        args = (labels.clamp(min=0), 1.0, 32768, None, 1.0, ("log_sum_sq_probs",))
        logp, _, squares, _, _ = function.apply(hidden, weight, None, *args)
        return _mean(gated_loss(logp, squares), labels)

    return loss


def contestants(device: torch.device) -> tuple[dict[str, Step], dict[str, str]]:
    """Steps by name, and why others are missing."""
    found: dict[str, Step] = {"products": products, "F.linear, F.cross_entropy": stepped(eager)}
    found["deft"] = stepped(fused_linear_deft_loss)
    found["nll"] = stepped(functools.partial(fused_linear_deft_loss, objective="nll"))
    for size in (256, 512, 2048, 4096):
        chunked = functools.partial(fused_linear_deft_loss, chunk_bytes=size * MIB)
        found[f"deft, chunks of {size} MiB"] = stepped(chunked)
    found["deft, reduction none"] = stepped(without_reduction)
    missing: dict[str, str] = {}
    for name, make in (("Liger", liger), ("TRL, deft", trl)):
        try:
            if device.type != "cuda":
                raise Missing("needs a GPU")
            found[name] = stepped(make())
        except Missing as reason:
            missing[name] = str(reason)
    return found, missing


def measure(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> list[dict[str, Any]]:
    n, d, v = shape
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(n, d, generator=generator, device=device).to(dtype).requires_grad_()
    weight = torch.randn(v, d, generator=generator, device=device).mul_(3 * d**-0.5).to(dtype)
    weight.requires_grad_()
    labels = torch.randint(0, v, (n,), generator=generator, device=device)
    steps, missing = contestants(device)
    records: dict[str, dict[str, Any]] = {
        name: {"name": name, "n": n, "d": d, "v": v, "dtype": str(dtype)[6:]} for name in steps
    }
    times: dict[str, list[float]] = {}
    for name, step in steps.items():
        try:
            for _ in range(2):
                step(hidden, weight, labels)
            hidden.grad = weight.grad = None
            records[name]["peak_bytes"] = peak(device, lambda step=step: step(hidden, weight, labels))
            times[name] = []
        except Exception as error:
            if name.startswith(("deft", "nll", "products", "F.")):
                raise
            records[name]["failure"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
    shuffled = random.Random(0)
    for _ in range(ROUNDS if device.type == "cuda" else 1):
        # Another order each round: what ran before leaves the GPU's clock higher or lower.
        for name in shuffled.sample(list(times), len(times)):
            times[name].append(clock(device, lambda name=name: steps[name](hidden, weight, labels)))
    floor = median(times["products"])
    for name, taken in times.items():
        rate = 6 * n * d * v / median(taken) / 1e12
        records[name] |= {"ms": median(taken) * 1e3, "over_products": median(taken) / floor, "tflops": rate}
    return [*records.values(), *({"name": name, "failure": reason} for name, reason in missing.items())]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shapes", nargs="+", default=["4096x4096x128256", "8192x4096x131072"])
    parser.add_argument("--dtype", default="bf16", choices=list(DTYPES))
    parser.add_argument("--out", type=Path, help="write every record, as JSON")
    args = parser.parse_args()
    device = machine.device()
    if device.type != "cuda":
        print("dry run: no GPU, nothing is measured")
        args.shapes, args.dtype = ["64x16x500"], "fp32"
    whole = machine.described() | {"records": []}
    for shape in args.shapes:
        n, d, v = map(int, shape.split("x"))
        records = measure((n, d, v), DTYPES[args.dtype], device)
        whole["records"] += records
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(whole, indent=1) + "\n")
        print(f"{shape} {args.dtype}, {machine.device_name()}")
        for record in records:
            if "failure" in record:
                print(f"  {record['name']:28} {record['failure']}")
            else:
                print(
                    f"  {record['name']:28} {record['ms']:8.2f} ms, {record['over_products']:.2f} x "
                    f"products, peak {record['peak_bytes'] / 2**30:.2f} GiB"
                )


if __name__ == "__main__":
    main()
