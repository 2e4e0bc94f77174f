"""Both backends in small: few rows a block, few columns a tile, so that small cases have many of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from deft_kernels.backends.choice import interpreted
from deft_kernels.backends.pytorch import block


@contextmanager
def small(backend: str, rows: int, vocabulary: int, seed: int) -> Iterator[None]:
    """rows: of a block on the PyTorch backend; on the kernels programs a row, with tiles of 64 columns on."""
    with pytest.MonkeyPatch.context() as patch:
        if backend == "torch":
            patch.setattr(block, "BLOCK_ELEMENTS", 2 * rows * vocabulary)
            patch.setattr(block, "STRETCH", 5 + seed % 60)
        else:
            from deft_kernels.backends.triton import backend as triton_backend
            from deft_kernels.backends.triton import tuning

            def plan(_: int, itemsize: int, *rest: int) -> tuning.Launch:
                # A warp of fewer threads is the interpreter's alone; the kernels want sixteen at least.
                warp = 16 + 16 * (seed // 2 % 2) if interpreted() else rest[-1]
                flags = {"tail": seed % 3 > 0, "near": seed % 5 > 2, "deep": seed % 7 > 3}
                return tuning.Launch(1 + seed % 2, 16 // itemsize, warp, **flags)

            for name in ("statistics", "gradient", "fused"):
                patch.setattr(tuning, name, plan)
            patch.setattr(tuning, "splits", lambda *_: rows)
            patch.setattr(triton_backend, "SLICE_TURNS", 1 + seed % 3)
        yield
