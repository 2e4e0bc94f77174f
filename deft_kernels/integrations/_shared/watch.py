"""`Watch`: raises if a model's training forward does not use the gated loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .proof import when_used


class Watch:
    """Hooks a model's backbone, which runs in every forward, whatever replaces the model's own.

    `seen` gets the gated loss. If a gradient reaches the backbone's outputs without having passed that loss,
    it raises: another loss is trained. Under torch.compile, and with a frozen backbone, the second training
    forward without a call of the loss raises.
    """

    def __init__(self, backbone: nn.Module, call: str):
        self.call = call
        self.pending = False
        self.hooked = False  # the last forward waits for a gradient
        self.handle = backbone.register_forward_hook(self._started)

    def seen(self, loss: Tensor) -> None:
        if self.hooked:
            when_used(loss, self._clear)
        else:
            self._clear()

    def remove(self) -> None:
        self.handle.remove()

    def _started(self, module: nn.Module, _args: Any, output: Any) -> None:
        if not torch.is_grad_enabled():
            return
        # A hook on a tensor would break a graph, and does nothing without a gradient.
        compiling = torch.compiler.is_compiling()
        hidden = [] if compiling else [x for x in _tensors(output) if x.requires_grad]
        if not (hidden or module.training):
            return
        self.hooked = bool(hidden)
        for tensor in hidden:
            tensor.register_hook(self._reached)
        if not hidden:
            self._check()
        self.pending = True

    @contextmanager
    def unless_it_raises(self) -> Iterator[None]:
        """A step that raises trains nothing, and the next one is a new one."""
        try:
            yield
        except BaseException:
            self._clear()
            raise

    def _clear(self) -> None:
        self.pending = False

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
                f"{self.call}, and use one hook only); a compute_loss that makes its own loss from the "
                "logits; a model in eval mode (call model.train()). For gradients of anything else, take the "
                "loss out first (unpatch_model, liger.uninstall)"
            )


def _tensors(output: Any) -> Iterable[Tensor]:
    """Those at the top of a module's output: a tensor, a tuple or a ModelOutput."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if hasattr(output, "values") else output
    return [value for value in values if isinstance(value, Tensor)]
