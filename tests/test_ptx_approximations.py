"""ex2, lg2 and div: exact values where the PTX ISA manual lists them, and errors within what it states."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx.approximations import LOG_ERROR, MODES, Noise
from ptx_snippets import compute

INF, NAN = float("inf"), float("nan")
TINY, NORMAL = 2.0**-149, 2.0**-126


def f32(*values: float) -> Any:
    return np.array(values, np.float32)


def ulps(got: Any, exact: Any) -> Any:
    """Distance from the correctly rounded result, in numbers of fp32."""
    rounded = exact.astype(np.float32)
    return np.abs(got.view(np.int32).astype(np.int64) - rounded.view(np.int32))


@pytest.mark.parametrize("noise", MODES)
def test_listed_values(noise: str) -> None:
    """The tables of 9.7.3.20 and 9.7.3.21, and IEEE's special quotients."""
    got = compute("ex2.approx.f32 %d, %a;", f32(-INF, -0.0, 0.0, INF, NAN), result=np.float32, noise=noise)
    assert np.array_equal(got, f32(0, 1, 1, INF, NAN), equal_nan=True)
    got = compute(
        "lg2.approx.f32 %d, %a;", f32(-INF, -1, -0.0, 0.0, INF, NAN), result=np.float32, noise=noise
    )
    assert np.array_equal(got, f32(NAN, NAN, -INF, -INF, INF, NAN), equal_nan=True)
    a, b = f32(1, 0, -1, INF, INF, 5, NAN), f32(0, 0, 0.0, INF, -2, -INF, 1)
    got = compute("div.full.f32 %d, %a, %b;", a, b, result=np.float32, noise=noise)
    assert np.array_equal(got, f32(INF, NAN, -INF, NAN, -INF, -0.0, NAN), equal_nan=True)


@pytest.mark.parametrize("noise", MODES)
@pytest.mark.parametrize("seed", [0, 5])
def test_errors_are_within_the_manual_and_use_it(noise: str, seed: int) -> None:
    """2 ulp for ex2 and div.full over all inputs; 2^-22 for lg2, absolute in (0.5, 2), relative elsewhere."""
    random = np.random.default_rng(2)
    worst = {"ex2": 0, "div": 0, "lg2": 0.0}
    for _ in range(20):
        x = random.uniform(-149, 127, 32).astype(np.float32)
        got = compute("ex2.approx.f32 %d, %a;", x, result=np.float32, noise=noise, seed=seed)
        worst["ex2"] = max(worst["ex2"], ulps(got, np.exp2(x.astype(np.float64))).max())
        a, b = (
            (random.standard_normal(32) * 2.0 ** random.integers(-50, 50, 32)).astype(np.float32)
            for _ in "ab"
        )
        got = compute("div.full.f32 %d, %a, %b;", a, b, result=np.float32, noise=noise, seed=seed)
        worst["div"] = max(worst["div"], ulps(got, a.astype(np.float64) / b).max())
        x = np.exp2(random.uniform(-3, 3, 32)).astype(np.float32)
        got = compute("lg2.approx.f32 %d, %a;", x, result=np.float32, noise=noise, seed=seed).astype(
            np.float64
        )
        exact = np.log2(x.astype(np.float64))
        bound = np.where((x > 0.5) & (x < 2), LOG_ERROR, LOG_ERROR * np.abs(exact))
        worst["lg2"] = max(worst["lg2"], (np.abs(got - exact) / bound).max())
    if noise == "exact":
        assert worst["ex2"] == worst["div"] == 0 and worst["lg2"] < 0.6
    else:
        assert worst["ex2"] == worst["div"] == 2 and 0.9 < worst["lg2"] <= 1.0


def test_quotient_by_a_large_number_is_no_zero() -> None:
    """9.7.3.8: only div.approx, which is not on the whitelist, gives 0 for divisors above 2^126."""
    got = compute("div.full.f32 %d, %a, %b;", f32(2.0**127), f32(2.0**127), result=np.float32)
    assert got[0] == 1.0


def test_flushing() -> None:
    """ex2.ftz and lg2.ftz flush subnormal operands and results."""
    x = f32(-126, -127, -149, TINY)
    assert np.array_equal(
        compute("ex2.approx.f32 %d, %a;", x, result=np.float32), f32(NORMAL, NORMAL / 2, TINY, 1)
    )
    assert np.array_equal(compute("ex2.approx.ftz.f32 %d, %a;", x, result=np.float32), f32(NORMAL, 0, 0, 1))
    x = f32(TINY, NORMAL)
    assert np.array_equal(compute("lg2.approx.f32 %d, %a;", x, result=np.float32), f32(-149, -126))
    assert np.array_equal(compute("lg2.approx.ftz.f32 %d, %a;", x, result=np.float32), f32(-INF, -126))


def test_noise_depends_on_the_argument_alone() -> None:
    """Hardware is deterministic: equal arguments give equal results, another seed another function."""
    x = np.linspace(-3, 3, 999).astype(np.float32)
    with np.errstate(all="ignore"):
        first, again, other = (Noise("hash", seed).exp2(x[order]) for seed, order in (
            (0, slice(None)), (0, slice(None, None, -1)), (1, slice(None))))  # fmt: skip
    assert np.array_equal(first, again[::-1])
    assert not np.array_equal(first, other)


def test_rounded_division() -> None:
    got = compute("div.rn.f32 %d, %a, %b;", f32(1, 5), f32(3, 0), result=np.float32, noise="up")
    assert np.array_equal(got, f32(1 / 3, INF))
