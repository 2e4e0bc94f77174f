"""Parameters that are DTensors, as whole local tensors."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .dtensors import is_dtensor


def whole(hidden: Any, weight: Any, bias: Any) -> tuple[Any, Any, Any]:
    """(hidden, weight, bias) with the DTensors among weight and bias gathered.

    Their gradient is averaged over the ranks, as DDP and FSDP do for rows that differ between ranks, unless
    they are told otherwise, which is not known here; where all ranks hold the same rows, as under tensor
    parallelism, the average is each rank's own gradient.
    Raises: TypeError for a hidden that is a DTensor, as the rows are each rank's own.
    """
    if is_dtensor(hidden):
        raise TypeError("hidden: is a DTensor; pass this rank's rows: hidden.to_local() or .full_tensor()")
    return hidden, _gathered(weight), _gathered(bias)


def _gathered(tensor: Any) -> Any:
    if not is_dtensor(tensor):
        return tensor
    from torch.distributed.tensor import Partial

    mesh = tensor.device_mesh
    # A sum and a division: gloo has no reduction that averages.
    local: Tensor = tensor.full_tensor(grad_placements=[Partial()] * mesh.ndim)
    if local.requires_grad:
        local.register_hook(lambda gradient: gradient / mesh.size())
    return local
