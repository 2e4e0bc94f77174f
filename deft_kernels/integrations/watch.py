"""`Watch`: proof that a model's training forward came to the gated loss, or an error."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class Watch:
    """Hooks a model's backbone, which every route to a loss runs, whatever replaces the model's forward.

    The loss calls `seen`. A gradient that reaches the backbone's output without it raises: something has
    taken the gated loss's place. Under torch.compile, and with a frozen backbone, a second training forward
    does.
    """

    def __init__(self, backbone: nn.Module, call: str):
        self.call = call
        self.pending = False
        self.handle = backbone.register_forward_hook(self._started)

    def seen(self) -> None:
        self.pending = False

    def remove(self) -> None:
        self.handle.remove()

    def _started(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not (module.training and torch.is_grad_enabled()):
            return
        hidden = output if isinstance(output, Tensor) else output[0]
        if hidden.requires_grad and not torch.compiler.is_compiling():
            hidden.register_hook(self._reached)
        else:
            # A hook on a tensor would break a graph, and needs a gradient to come by.
            self._check()
        self.pending = True

    def _reached(self, _gradient: Tensor) -> None:
        self._check()

    def _check(self) -> None:
        if self.pending:
            self.pending = False
            raise RuntimeError(
                f"{self.call}: a training step went past the gated loss, so it would train another one. "
                "Usual causes and what to do: use_liger_kernel=True replaces the forward (use "
                "deft_kernels.integrations.liger.install(), or "
                'liger_kernel_config={"fused_linear_cross_entropy": False}); TRL >= 1.15 has a loss of its '
                "own (use deft_kernels.integrations.trl.apply(trainer)); label_smoothing_factor and "
                "compute_loss_func take the labels out of the forward (pass label_smoothing= to "
                f"{self.call}, and use one hook only)"
            )
