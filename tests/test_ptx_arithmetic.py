"""The emulator's floating-point instructions against what the PTX ISA manual defines, in exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx_snippets import compute

INF, NAN = float("inf"), float("nan")
TINY = 2.0**-149  # the smallest subnormal
NORMAL = 2.0**-126  # the smallest normal number
CANONICAL = 0x7FFFFFFF


def f32(*values: float) -> Any:
    return np.array(values, np.float32)


def bits(*values: int) -> Any:
    return np.array(values, np.uint32)


def nearest(x: Fraction, mantissa: int = 24, least: int = -149, most: int = 127) -> float:
    """x rounded to nearest, ties to even, in a binary format: digits, exponent of the smallest subnormal
    and of the largest number."""
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - mantissa + 1, least)
    steps = round(size / unit)  # Python rounds ties to even
    value = steps * unit
    if value >= Fraction(2) ** (most + 1):
        return math.copysign(INF, x)
    return math.copysign(float(value), x)


def same(got: Any, expected: Any) -> None:
    """Equal to the bit, any NaN for a NaN."""
    got, expected = np.asarray(got, np.float32), np.asarray(expected, np.float32)
    nan = np.isnan(expected)
    assert np.array_equal(np.isnan(got), nan)
    assert np.array_equal(got[~nan].view(np.uint32), expected[~nan].view(np.uint32)), (got, expected)


def test_fma_rounds_once() -> None:
    """Midpoints that fp64 rounds onto, subnormal sums, cancellation, overflow: as in exact arithmetic."""
    random = np.random.default_rng(0)
    for scale in (0, -60, -74, 50):
        a = (random.standard_normal(32) * 2.0**scale).astype(np.float32)
        b = (random.standard_normal(32) * 2.0**scale).astype(np.float32)
        c = (-a.astype(np.float64) * b * (1 + random.standard_normal(32) * 2.0**-20)).astype(np.float32)
        for third in (c, c * np.float32(2.0**-26), c * np.float32(2.0**25)):
            exact = [
                Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
                for x, y, z in zip(a, b, third, strict=True)
            ]
            got = compute("fma.rn.f32 %d, %a, %b, %c;", a, b, third, result=np.float32)
            same(got, f32(*(nearest(x) for x in exact)))


def test_fma_overflows_where_rounding_does() -> None:
    """Half an ulp above the largest number is infinity, less is not."""
    largest = f32(2.0**128 - 2.0**104)
    multiply = "fma.rn.f32 %d, %a, %b, %c;"
    same(compute(multiply, f32(2.0**52), f32(2.0**51), largest, result=np.float32), f32(INF))
    same(compute(multiply, f32(2.0**52 - 2.0**28), f32(2.0**51), largest, result=np.float32), largest)


def test_fma_beside_a_midpoint() -> None:
    """1 + 2^-24 is a midpoint of fp32; 2^-80 beside it is lost in fp64 and decides the result."""
    one_and = np.float32(1 + 2.0**-12)  # its square is 1 + 2^-11 + 2^-24
    for side, expected in (
        (2.0**-80, 1 + 2.0**-11 + 2.0**-23),
        (-(2.0**-80), 1 + 2.0**-11),
        (0, 1 + 2.0**-11),
    ):
        same(
            compute("fma.rn.f32 %d, %a, %b, %c;", one_and, one_and, f32(side), result=np.float32),
            f32(expected),
        )
    # Among subnormal numbers the midpoints lie elsewhere: half of the smallest, and a little more or less.
    half, little = f32(2.0**-75), 2.0**-149
    got = compute("fma.rn.f32 %d, %a, %b, %c;", half, half, f32(0), result=np.float32)
    same(got, f32(0))
    got = compute(
        "fma.rn.f32 %d, %a, %b, %c;", half, f32(2.0**-75 * (1 + 2.0**-23)), f32(0), result=np.float32
    )
    same(got, f32(little))


def test_infinities_and_nan() -> None:
    a, b = f32(INF, INF, 0, -INF, NAN, 1), f32(1, -INF, INF, -INF, 1, NAN)
    same(compute("add.f32 %d, %a, %b;", a, b, result=np.float32), f32(INF, NAN, INF, -INF, NAN, NAN))
    same(compute("sub.f32 %d, %a, %b;", a, b, result=np.float32), f32(INF, INF, -INF, NAN, NAN, NAN))
    same(compute("mul.f32 %d, %a, %b;", a, b, result=np.float32), f32(INF, -INF, NAN, INF, NAN, NAN))
    same(compute("fma.rn.f32 %d, %a, %b, %c;", a, b, f32(-INF), result=np.float32),
         f32(NAN, -INF, NAN, NAN, NAN, NAN))  # fmt: skip
    same(compute("neg.f32 %d, %a;", f32(0.0, -INF, 3), result=np.float32), f32(-0.0, INF, -3))
    same(compute("abs.f32 %d, %a;", f32(-0.0, -INF, -3), result=np.float32), f32(0.0, INF, 3))


def test_subnormals_are_kept_without_ftz_and_flushed_with_it() -> None:
    """.ftz flushes subnormal operands and results to zeros of the same sign."""
    a, b = f32(TINY, -TINY, NORMAL, NORMAL, -NORMAL), f32(0, 0, -NORMAL / 2, 0.5, 0.25)
    kept = f32(TINY, -TINY, NORMAL / 2, NORMAL + 0.5, -NORMAL + 0.25)
    same(compute("add.f32 %d, %a, %b;", a, b, result=np.float32), kept)
    same(compute("add.ftz.f32 %d, %a, %b;", a, b, result=np.float32), f32(0, 0, NORMAL, 0.5, 0.25))
    same(compute("mul.f32 %d, %a, %b;", f32(NORMAL, -NORMAL), f32(0.5), result=np.float32),
         f32(NORMAL / 2, -NORMAL / 2))  # fmt: skip
    same(
        compute("mul.ftz.f32 %d, %a, %b;", f32(NORMAL, -NORMAL), f32(0.5), result=np.float32), f32(0.0, -0.0)
    )
    product = "fma.rn.ftz.f32 %d, %a, %b, %c;"
    same(compute(product, f32(NORMAL, -NORMAL), f32(0.5), f32(-0.0), result=np.float32), f32(0.0, -0.0))
    same(compute(product, f32(1), f32(1), f32(TINY), result=np.float32), f32(1))
    same(compute("max.ftz.f32 %d, %a, %b;", f32(TINY), f32(-1), result=np.float32), f32(0))


A, B = f32(NAN, NAN, 1, -0.0, 0.0, INF, -3, 2), f32(NAN, 1, NAN, 0.0, -0.0, -INF, 2, -3)


def test_extremes() -> None:
    """9.7.3.11, 9.7.3.12: NaN loses, with .NaN it wins; -0 is below +0. Three operands on sm_100."""
    same(compute("max.f32 %d, %a, %b;", A, B, result=np.float32), f32(NAN, 1, 1, 0.0, 0.0, INF, 2, 2))
    same(compute("min.f32 %d, %a, %b;", A, B, result=np.float32), f32(NAN, 1, 1, -0.0, -0.0, -INF, -3, -3))
    same(compute("max.NaN.f32 %d, %a, %b;", A, B, result=np.float32), f32(NAN, NAN, NAN, 0.0, 0.0, INF, 2, 2))
    same(compute("min.NaN.f32 %d, %a, %b;", A, B, result=np.float32),
         f32(NAN, NAN, NAN, -0.0, -0.0, -INF, -3, -3))  # fmt: skip
    assert (compute("max.NaN.f32 %d, %a, %b;", A[:3], B[:3]) == CANONICAL).all()
    three = f32(NAN, 5, 0, 0.0, 1, 0, 9, 9)
    same(
        compute("max.f32 %d, %a, %b, %c;", A, B, three, result=np.float32), f32(NAN, 5, 1, 0.0, 1, INF, 9, 9)
    )
    same(compute("max.NaN.f32 %d, %a, %b, %c;", A, B, three, result=np.float32),
         f32(NAN, NAN, NAN, 0.0, 1, INF, 9, 9))  # fmt: skip
    same(compute("min.f32 %d, %a, %b, %c;", A, B, three, result=np.float32),
         f32(NAN, 1, 0, -0.0, -0.0, -INF, -3, -3))  # fmt: skip


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_half_extremes(name: str) -> None:
    """9.7.4.7, 9.7.4.8, alone and packed; the packed halves do not mix."""

    def encode(x: Any) -> Any:
        if name == "f16":
            return x.astype(np.float16).view(np.uint16)
        return (x.view(np.uint32) >> 16).astype(np.uint16)

    a, b = encode(A), encode(B)
    for operation, expected in (
        ("max", f32(NAN, 1, 1, 0.0, 0.0, INF, 2, 2)), ("min", f32(NAN, 1, 1, -0.0, -0.0, -INF, -3, -3)),
        ("max.NaN", f32(NAN, NAN, NAN, 0.0, 0.0, INF, 2, 2)),
        ("min.NaN", f32(NAN, NAN, NAN, -0.0, -0.0, -INF, -3, -3)),
    ):  # fmt: skip
        wanted = np.where(np.isnan(expected), 0x7FFF, encode(expected))
        got = compute(f"{operation}.{name} %d, %a, %b;", a, b, result=np.uint16)
        assert np.array_equal(got, wanted), operation
        two = [x.astype(np.uint32) | (x[::-1].astype(np.uint32) << 16) for x in (a, b)]
        got = compute(f"{operation}.{name}x2 %d, %a, %b;", *two)
        assert np.array_equal(got, wanted.astype(np.uint32) | (wanted[::-1].astype(np.uint32) << 16)), (
            operation
        )
    got = compute(f"neg.{name} %d, %a;", encode(f32(1, -2, 0)), result=np.uint16)
    assert np.array_equal(got, encode(f32(-1, 2, -0.0)))
    assert compute(f"neg.{name}x2 %d, %a;", bits(0x00018000))[0] == 0x80010000
    assert compute(f"abs.{name}x2 %d, %a;", bits(0x80018002))[0] == 0x00010002


@pytest.mark.parametrize("name", ["bf16", "f16"])
def test_conversion_to_half(name: str) -> None:
    """cvt.rn: to nearest, ties to even, subnormals kept, overflow to infinity, NaN canonical; and exactly
    back."""
    random = np.random.default_rng(1)
    formats = {"bf16": (8, -133, 127, 16), "f16": (11, -24, 15, 13)}
    mantissa, least, most, dropped = formats[name]
    # Numbers beside and on midpoints, over all exponents.
    middle = (random.integers(0, 2**32, 24, np.uint32) >> dropped << dropped) | np.uint32(1 << (dropped - 1))
    for beside in (-1, 0, 1):
        x = (middle + np.int64(beside)).astype(np.uint32).view(np.float32)
        x = np.where(np.isfinite(x), x, np.float32(1.0))
        expected = f32(*(nearest(Fraction(float(v)), mantissa, least, most) for v in x))
        narrow = compute(f"cvt.rn.{name}.f32 %d, %a;", x, result=np.uint16)
        same(compute(f"cvt.f32.{name} %d, %a;", narrow, result=np.float32), expected)
    ties = {
        "bf16": f32(1 + 2.0**-8, 1 + 3 * 2.0**-8, 3.4e38, -INF, TINY, -0.0, 2.0**-134, 3 * 2.0**-134),
        "f16": f32(1 + 2.0**-11, 1 + 3 * 2.0**-11, 65520, -INF, 2.0**-25, -0.0, 65519, 3 * 2.0**-25),
    }[name]
    wanted = {"bf16": [0x3F80, 0x3F82, 0x7F80, 0xFF80, 0, 0x8000, 0, 2],
              "f16": [0x3C00, 0x3C02, 0x7C00, 0xFC00, 0, 0x8000, 0x7BFF, 2]}[name]  # fmt: skip
    assert compute(f"cvt.rn.{name}.f32 %d, %a;", ties, result=np.uint16).tolist() == wanted
    assert compute(f"cvt.rn.{name}.f32 %d, %a;", bits(0xFFC00001), result=np.uint16)[0] == 0x7FFF
    # The first source of the packed form goes to the upper half.
    got = compute(f"cvt.rn.{name}x2.f32 %d, %a, %b;", f32(1), f32(-2))
    assert got[0] == {"bf16": 0x3F80C000, "f16": 0x3C00C000}[name]


def test_packed_fp32() -> None:
    """add, mul and fma of two fp32 in 64 bits, sm_100."""
    two = [np.stack(pair, 1).copy().view(np.uint64)[:, 0] for pair in (
        (f32(1, INF), f32(2, 3)), (f32(10, -INF), f32(20, 0.5)), (f32(5, 1), f32(-1, NAN)))]  # fmt: skip
    for text, low, high in (
        ("add.f32x2 %d, %a, %b;", f32(11, NAN), f32(22, 3.5)),
        ("mul.rn.f32x2 %d, %a, %b;", f32(10, -INF), f32(40, 1.5)),
        ("sub.f32x2 %d, %a, %b;", f32(-9, INF), f32(-18, 2.5)),
        ("fma.rn.f32x2 %d, %a, %b, %c;", f32(15, -INF), f32(39, NAN)),
    ):  # fmt: skip
        got = compute(text, *two, result=np.uint64).view(np.float32).reshape(-1, 2)
        same(got[:, 0], low)
        same(got[:, 1], high)


def test_conversion_of_integers() -> None:
    """To fp32 to nearest; between integers the source's sign decides what fills, low bits stay."""
    got = compute("cvt.rn.f32.s32 %d, %a;", bits(2**24 + 1, 2**24 + 3, 0xFFFFFFFF), result=np.float32)
    same(got, f32(2**24, 2**24 + 4, -1))
    same(compute("cvt.rn.f32.u32 %d, %a;", bits(0xFFFFFFFF), result=np.float32), f32(2.0**32))
    assert compute("cvt.s64.s32 %d, %a;", bits(0x80000000), result=np.uint64)[0] == 0xFFFFFFFF80000000
    assert compute("cvt.u64.u32 %d, %a;", bits(0x80000000), result=np.uint64)[0] == 0x80000000
    assert compute("cvt.u32.u64 %d, %a;", np.uint64(0x123456789))[0] == 0x23456789
    assert compute("cvt.u16.u32 %d, %a;", bits(0x12345), result=np.uint16)[0] == 0x2345
    assert compute("cvt.s32.s16 %d, %a;", np.uint16(0x8000))[0] == 0xFFFF8000


def test_comparisons() -> None:
    """9.7.6.2: ordered comparisons are false for NaN, unordered ones true."""
    a, b = f32(1, 1, 2, NAN, 0.0), f32(1, 2, 1, 1, -0.0)
    table = {
        "eq": "10001", "ne": "01100", "lt": "01000", "le": "11001", "gt": "00100", "ge": "10101",
        "equ": "10011", "neu": "01110", "ltu": "01010", "leu": "11011", "gtu": "00110", "geu": "10111",
        "num": "11101", "nan": "00010",
    }  # fmt: skip
    for name, expected in table.items():
        got = compute(f"setp.{name}.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", a, b)
        assert "".join(map(str, got)) == expected, name
    got = compute("setp.gt.ftz.f32 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", f32(TINY, NORMAL), f32(0))
    assert got.tolist() == [0, 1]
    got = compute("setp.lt.bf16 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;",
                  np.array([0xBF80, 0x7FC0], np.uint16), np.array([0x3F80], np.uint16))  # fmt: skip
    assert got.tolist() == [1, 0]
    got = compute("setp.lt.f16 %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", np.array([0xBC00], np.uint16),
                  np.array([0x3C00], np.uint16))  # fmt: skip
    assert got.tolist() == [1]
