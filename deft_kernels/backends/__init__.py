"""Where a call is computed: `choice` says by whom; `pytorch` and `triton` do the same steps, a file each."""

from __future__ import annotations

from ..core.spec import Spec
from .interface import Backend, PartialBackend
from .pytorch import backend as pytorch_backend
from .sharded import Sharded


def implementation(spec: Spec) -> Backend:
    """The backend that `spec` names, which `choice.choose` has found able to take the call."""
    backend: PartialBackend = pytorch_backend
    if spec.backend == "triton":
        from .triton import backend as triton_backend  # Triton is imported on first use

        backend = triton_backend
    return backend if spec.shard is None else Sharded(backend, spec.shard)
