"""Shared by the benchmarks: the tiny mode that CI runs, in which nothing is claimed about speed."""

import os

import pytest

TINY = os.environ.get("DEFT_KERNELS_BENCH_TINY", "0") == "1"


@pytest.fixture
def tiny() -> bool:
    return TINY
