"""Backends compute a call. `choice` picks one; `pytorch` and `triton` have the same steps in files of the
same names."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from ..core.spec import Spec
from .interface import Backend, PartialBackend
from .pytorch import backend as pytorch_backend
from .sharded import Sharded


@lru_cache(maxsize=1)
def triton_backend() -> Any:
    """Triton is imported on first use, which on a CPU is never."""
    from .triton import backend

    return backend


def implementation(spec: Spec) -> Backend:
    """The backend that `spec` names, which `choice.choose` has found able to take the call."""
    backend: PartialBackend = triton_backend() if spec.backend == "triton" else pytorch_backend
    return backend if spec.shard is None else Sharded(backend, spec.shard)
