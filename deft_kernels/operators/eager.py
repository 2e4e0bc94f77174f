"""Plain eager calls: how to tell them, and operators as autograd Functions for them.

To call an operator by torch.library costs the host about 130 us a training step more than a Function, and the
first call imports torch._dynamo, which takes more than a second. But a tracer, a fake tensor or a mode has to
see one operator, not a backend that reads addresses. `watched` tells whether there is one; then the operator
is called.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

PLAIN = (Tensor, torch.nn.Parameter)
# Of a batch that is_grads_batched of torch.autograd.grad makes; torch.func does not know it.
_is_batched = torch._C._functorch.is_legacy_batchedtensor


def watched(*tensors: Tensor | None) -> bool:
    """Whether a tracer, a mode or a tensor subclass has to see what happens to these tensors."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._are_functorch_transforms_active() or torch._C._get_tracing_state() is not None:
        return True
    return any(t is not None and (type(t) not in PLAIN or t.is_meta or _is_batched(t)) for t in tensors)


def of_batch(upstream: Tensor) -> bool:
    """Whether is_grads_batched has made it, in eager mode: dynamo does not know the question."""
    return not torch.compiler.is_compiling() and _is_batched(upstream)


def function_of(
    operator: Any, setup: Callable[..., None], backward: Callable[..., Any]
) -> Callable[..., Any]:
    """`operator`, with the autograd rule that it is registered with, as a function. If the call is `watched`
    it calls the operator, otherwise an autograd Function of the same body."""
    body = operator._init_fn

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = body(*inputs)
            setup(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *upstream: Any) -> Any:
            return backward(ctx, *upstream)

    def call(*inputs: Any) -> Any:
        tensors = (x for x in inputs if isinstance(x, Tensor))
        return operator(*inputs) if watched(*tensors) else Eager.apply(*inputs)

    return call
