"""A small problem with row inputs, the settings that formulas of rows go together with, and one step."""

from __future__ import annotations

import torch
from torch import Tensor

N, D, V = 9, 6, 311
SETTINGS = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3},
    "class weights": {"weight": True, "label_smoothing": 0.2},
    "token weights": {"token_weight": True, "num_items": 5.0},
    "transformed": {"logit_scale": 0.8, "softcap": 9.0, "temperature": 1.4},
    "shifted": {"shift": True},
    "in place": {"inplace": True},
    "in forward": {"grad_in_forward": True},
    "both": {"inplace": True, "grad_in_forward": True},
}


def problem(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """(logits, labels, row input); the row input of an ignored row is NaN."""
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(N, V, generator=generator) * 3).to(dtype)
    labels = torch.randint(0, V, (N,), generator=generator)
    logits[0, labels[0]] += 25  # confident
    labels[4] = -100
    own = torch.rand(N, generator=generator)
    own[4] = torch.nan
    return logits.to(device), labels.to(device), own.to(device)


def keywords_of(name: str, device: str) -> dict:
    keywords = dict(SETTINGS[name])
    if "weight" in keywords:
        keywords["weight"] = torch.linspace(0.2, 2.0, V, device=device)
    if "token_weight" in keywords:
        keywords["token_weight"] = torch.linspace(0.5, 1.5, N, device=device)
    return keywords


def step(call, leaf: Tensor) -> tuple[Tensor, Tensor]:
    loss = call(leaf)
    upstream = torch.linspace(0.5, 2.0, loss.numel(), dtype=torch.float64).to(loss).reshape(loss.shape)
    (loss * upstream).sum().backward()
    return loss.detach(), leaf.grad


LINEAR = {
    "plain": {},
    "chunks": {"chunk_bytes": 2 * V * 4},
    "none": {"reduction": "none"},
    "smoothed": {"label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0},
    "class weights": {"class_weight": torch.linspace(0.2, 2.0, V)},
    "shifted": {"shift": True, "chunk_bytes": 3 * V * 4},
}


def head(device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=generator).to(device) for shape in ((N, D), (V, D), (V,))]
