"""Rows of every temperament, and what a computation over them is allowed to err."""

from __future__ import annotations

import torch
from torch import Tensor

KINDS = ("plain", "peaked", "uniform", "confident", "conflict", "shifted", "masked")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

RELATIVE = 3e-5  # loss; gradient in fp32
FREE = 3e-7  # absolute, gradient
ULP = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}  # half an ulp, relative: times 2 is one ulp


def make(kind: str, n: int, vocabulary: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits [n, V] already rounded to `dtype`, and labels [n]."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    labels = torch.randint(0, vocabulary, (n,), generator=generator)
    z = normal(n, vocabulary) * 2
    rows = torch.arange(n)
    if kind == "peaked":
        z = normal(n, vocabulary) * 8
    elif kind == "uniform":
        z = torch.full((n, vocabulary), 0.75)
    elif kind == "confident":  # p of the target from 0.9 to 1 - 1e-7
        z[rows, labels] = z.logsumexp(-1) + torch.linspace(2.0, 16.0, n)
    elif kind == "conflict":  # another token holds nearly everything
        other = (labels + 1) % vocabulary
        z[rows, other] = z.logsumexp(-1) + torch.linspace(2.0, 16.0, n)
    elif kind == "shifted":
        z = z + 300.0
    elif kind == "masked":
        hidden = torch.rand(n, vocabulary, generator=generator) < 0.5
        hidden[rows, labels] = False
        z = z.masked_fill(hidden, float("-inf"))
    return z.to(dtype), labels


def loss_excess(loss: Tensor, oracle: Tensor, slope: Tensor) -> float:
    """Largest |loss - oracle| over what is allowed: 3e-5 relative, and one fp32 epsilon of a probability.

    slope: |d loss / d logp| of the oracle; an epsilon of p near 1 is an epsilon of logp.
    """
    same = (loss == oracle) | (loss.isnan() & oracle.isnan())  # infinities
    allowed = RELATIVE * oracle.abs() + torch.finfo(torch.float32).eps * slope.abs().clamp(max=1.0)
    excess = torch.where(same, 0.0, (loss - oracle).abs() / allowed)
    return excess.max().item() if excess.numel() else 0.0


def gradient_excess(gradient: Tensor, oracle: Tensor) -> float:
    """Largest |gradient - oracle| over what is allowed for the gradient's dtype; `oracle` is float64."""
    dtype = gradient.dtype
    if dtype == torch.float32:
        allowed = RELATIVE * oracle.abs() + FREE
    elif dtype == torch.float64:
        allowed = 1e-12 * oracle.abs() + 1e-14
    else:
        rounded = oracle.to(dtype)
        ulp = torch.maximum(
            (torch.nextafter(rounded, torch.full_like(rounded, torch.inf)) - rounded).abs().double(),
            (rounded - torch.nextafter(rounded, torch.full_like(rounded, -torch.inf))).abs().double(),
        )
        allowed = ulp + FREE
    return ((gradient.double() - oracle).abs() / allowed).max().item() if oracle.numel() else 0.0
