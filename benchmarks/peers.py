"""Who is measured: this package in its modes, and what people run today, as contestants over [N, V] logits.

A contestant that cannot run here is named with the reason, never left out in silence.
"""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from deft_kernels import deft_loss

Loss = Callable[[Tensor, Tensor], Tensor]


class Missing(Exception):
    """Why a contestant cannot run here."""


@dataclass(frozen=True)
class Contestant:
    """name: as shown.  objective: what it computes; losses of one objective agree.  mode: see `MODES`.
    make: the loss for a device, mean over the rows whose label is not -100; raises Missing.
    """

    name: str
    objective: str
    mode: str
    make: Callable[[torch.device], Loss]
    ours: bool = False

    def streams(self, phase: str, device: torch.device) -> int:
        """Reads and writes of the logits that the mode cannot do without: one read for the statistics, a read
        and a write for the gradient; in one visit a read and a write for both, in the forward."""
        visit = self.mode in ("in forward", "in place, in forward")
        if self.ours and self.mode == "default" and device.type == "cpu":
            visit = self.objective != "cayley"  # which has to wait for the batch's mean p
        return {"forward": 2 if visit else 1, "backward": 0 if visit else 2, "both": 2 if visit else 3}[phase]

    def repeats(self, device: torch.device) -> bool:
        """Whether on this device it is the same as "default": the CPU makes gradients in the forward."""
        return self.ours and self.mode == ("in forward" if device.type == "cpu" else "two visits")


# This package -----------------------------------------------------------------------------------------------

MODES: dict[str, dict[str, bool]] = {
    "default": {},
    "two visits": {"grad_in_forward": False},
    "in place": {"inplace": True, "grad_in_forward": False},
    "in forward": {"grad_in_forward": True},
    "in place, in forward": {"inplace": True, "grad_in_forward": True},
}


def _ours(mode: str, objective: str) -> Contestant:
    name = f"deft_loss {objective}" + ("" if mode == "default" else f", {mode}")
    loss = functools.partial(deft_loss, objective=objective, **MODES[mode])
    return Contestant(name, objective, mode, lambda device: loss, ours=True)


# What people run today, in eager PyTorch --------------------------------------------------------------------


def _mean(rows: Tensor, labels: Tensor) -> Tensor:
    valid = labels != -100
    return (rows * valid).sum() / valid.sum()


def deft_in_pytorch(logits: Tensor, labels: Tensor) -> Tensor:
    """DEFT's formula over full fp32 logits, as its authors' trainer computes it (arXiv:2602.11424)."""
    z = logits.float()
    logp = F.log_softmax(z, -1).gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1)
    alpha = F.softmax(z, -1).pow(2).sum(-1).detach()
    return _mean(-(torch.exp(alpha * logp) - 1) / (alpha + 1e-6), labels)


def dft_in_pytorch(logits: Tensor, labels: Tensor) -> Tensor:
    """DFT as LLaMA-Factory computes it: cross-entropy of fp32 logits, times its own detached probability."""
    rows = F.cross_entropy(logits.float(), labels, reduction="none")
    return _mean(rows * torch.exp(-rows.detach()), labels)


def eaft_in_pytorch(logits: Tensor, labels: Tensor) -> Tensor:
    """EAFT as LLaMA-Factory computes it: weighted by the entropy of the 20 largest logits, over 3."""
    z = logits.float()
    rows = F.cross_entropy(z, labels, reduction="none")
    with torch.no_grad():
        p = F.softmax(z.topk(min(20, z.shape[-1]), dim=-1).values, -1)
        weight = -(p * torch.log(p + 1e-10)).sum(-1) / 3.0
    return _mean(rows * weight, labels)


def _compiled(loss: Loss) -> Callable[[torch.device], Loss]:
    def make(device: torch.device) -> Loss:
        torch.compiler.reset()  # every shape gets code of its own, and no limit of recompilations is reached
        return torch.compile(loss, dynamic=False)

    return make


# Other packages ---------------------------------------------------------------------------------------------


def _imported(name: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise Missing(f"not installed ({error})") from error


def _on_gpu(device: torch.device) -> None:
    if device.type != "cuda":
        raise Missing("needs a GPU")


def _liger(device: torch.device) -> Loss:
    """The gradient is made in the forward and overwrites the logits."""
    module = _imported("liger_kernel.transformers.functional")
    _on_gpu(device)
    return module.liger_cross_entropy


def _quack(inplace: bool) -> Callable[[torch.device], Loss]:
    def make(device: torch.device) -> Loss:
        module = _imported("quack.cross_entropy")
        _on_gpu(device)
        return functools.partial(module.cross_entropy, inplace_backward=inplace)

    return make


def _cut_cross_entropy(device: torch.device) -> Loss:
    _imported("cut_cross_entropy")
    raise Missing("takes hidden states, not logits")


CONTESTANTS = (
    *(_ours(mode, "deft") for mode in MODES),
    *(_ours("default", objective) for objective in ("nll", "cayley", "eaft")),
    _ours("in place, in forward", "nll"),
    Contestant("F.cross_entropy", "nll", "default", lambda device: F.cross_entropy),
    Contestant("F.cross_entropy, compiled", "nll", "default", _compiled(F.cross_entropy)),
    Contestant("DEFT in PyTorch", "deft", "default", lambda device: deft_in_pytorch),
    Contestant("DEFT in PyTorch, compiled", "deft", "default", _compiled(deft_in_pytorch)),
    Contestant("DFT in PyTorch", "dft", "default", lambda device: dft_in_pytorch),
    Contestant("EAFT in PyTorch", "eaft of the top 20", "default", lambda device: eaft_in_pytorch),
    Contestant("Liger", "nll", "in place, in forward", _liger),
    Contestant("QuACK", "nll", "default", _quack(False)),
    Contestant("QuACK, in place", "nll", "in place", _quack(True)),
    Contestant("cut-cross-entropy", "nll", "default", _cut_cross_entropy),
)
