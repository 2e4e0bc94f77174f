"""What PTX instructions compute, on NumPy arrays of one value a thread. No state, nothing approximated: the
three instructions that the hardware itself approximates are in `approximations`.

Section numbers are those of the PTX ISA manual, version 8.8.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any  # an array of one value a thread, or a NumPy scalar where all threads hold the same

U1, U2, U4, U8 = np.uint8, np.uint16, np.uint32, np.uint64
I1, I2, I4, I8 = np.int8, np.int16, np.int32, np.int64
F2, F4, F8 = np.float16, np.float32, np.float64

SMALLEST_NORMAL = F4(2.0**-126)
NAN16 = U2(0x7FFF)  # the canonical NaNs of sections 9.7.3 and 9.7.4
NAN32 = U4(0x7FFFFFFF).view(F4)


def ftz(x: Array) -> Array:
    """The modifier .ftz: subnormal fp32 to a zero of the same sign."""
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(F4(0), x), x)


def fma(a: Array, b: Array, c: Array) -> Array:
    """fma.rn.f32 (9.7.3.6): a b + c, rounded once.

    A product of two fp32 is exact in fp64; the sum is not, and rounding it to fp64 first can end on the
    midpoint of two fp32 where the true value lies beside it. There, and among subnormal results, whose
    midpoints lie elsewhere, the fp64 sum is rounded to odd: the last bit then says that something was cut
    off, and the second rounding is right."""
    product, c = np.multiply(a, b, dtype=F8), np.asarray(c, F8)
    total = product + c
    bits = total.view(I8)
    doubtful = ((bits & I8(0x1FFFFFFF)) == 0x10000000) | (np.abs(total) < SMALLEST_NORMAL)
    if doubtful.any():
        # Knuth's exact error of a sum; nothing here comes near the limits of fp64.
        shadow = total - product
        error = (product - (total - shadow)) + (c - shadow)
        even = doubtful & ((bits & I8(1)) == 0) & (error != 0) & np.isfinite(total)
        towards = np.where((error > 0) == (total > 0), I8(1), I8(-1))
        total = np.where(even, bits + towards, bits).view(F8)
    return total.astype(F4)


def extreme(a: Array, b: Array, largest: bool, propagate: bool) -> Array:
    """min and max of fp32 (9.7.3.11, 9.7.3.12): -0 < +0; NaN only where both are, or either with .NaN."""
    if propagate:
        r = np.maximum(a, b) if largest else np.minimum(a, b)
    else:
        r = np.fmax(a, b) if largest else np.fmin(a, b)
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        sign = (np.signbit(a) & np.signbit(b)) if largest else (np.signbit(a) | np.signbit(b))
        r = np.where(zeros, np.where(sign, F4(-0.0), F4(0.0)), r)
    nan = np.isnan(r)
    return np.where(nan, NAN32, r) if nan.any() else r


def extreme_bf16(a: Array, b: Array, largest: bool, propagate: bool) -> Array:
    """min and max of bf16 (9.7.4.7, 9.7.4.8)."""
    r = extreme(from_bf16(a), from_bf16(b), largest, propagate)
    return np.where(np.isnan(r), NAN16, (r.view(U4) >> U4(16)).astype(U2))


def extreme_f16(a: Array, b: Array, largest: bool, propagate: bool) -> Array:
    """min and max of fp16 (9.7.4.7, 9.7.4.8)."""
    r = extreme(from_f16(a), from_f16(b), largest, propagate)
    return np.where(np.isnan(r), NAN16, r.astype(F2).view(U2))


def to_bf16(x: Array) -> Array:
    """cvt.rn.bf16.f32 (9.7.9.21): to nearest, ties to even; NaN to the canonical one."""
    bits = x.view(U4)
    rounded = ((bits + U4(0x7FFF) + ((bits >> U4(16)) & U4(1))) >> U4(16)).astype(U2)
    return np.where(np.isnan(x), NAN16, rounded)


def from_bf16(bits: Array) -> Array:
    return (bits.astype(U4) << U4(16)).view(F4)


def to_f16(x: Array) -> Array:
    """cvt.rn.f16.f32 (9.7.9.21): to nearest, ties to even, subnormals kept; NaN to the canonical one."""
    return np.where(np.isnan(x), NAN16, x.astype(F2).view(U2))


def from_f16(bits: Array) -> Array:
    return bits.view(F2).astype(F4)


def pack(low: Array, high: Array) -> Array:
    return low.astype(U4) | (high.astype(U4) << U4(16))


def halves(x: Array) -> tuple[Array, Array]:
    """(low, high) 16 bits of 32."""
    return (x & U4(0xFFFF)).astype(U2), (x >> U4(16)).astype(U2)


def words(x: Array) -> tuple[Array, Array]:
    """(low, high) fp32 of 64 bits."""
    return (x & U8(0xFFFFFFFF)).astype(U4).view(F4), (x >> U8(32)).astype(U4).view(F4)


def join(low: Array, high: Array) -> Array:
    return low.view(U4).astype(U8) | (high.view(U4).astype(U8) << U8(32))


def paired(function: Any, *operands: Array) -> Array:
    """A packed instruction on fp32: the function on each half of its 64-bit operands."""
    low, high = zip(*(words(x) for x in operands), strict=True)
    return join(function(*low), function(*high))


def packed(function: Any, *operands: Array) -> Array:
    """A packed instruction on 16-bit numbers: the function on each half of its 32-bit operands."""
    low, high = zip(*(halves(x) for x in operands), strict=True)
    return pack(function(*low), function(*high))


def shift_left(a: Array, n: Array) -> Array:
    """shl (9.7.7.8): amounts past the width count as the width."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(np.asarray(n, U4), U4(bits))
    within = np.minimum(amount, U4(bits - 1)).astype(a.dtype)
    return np.where(amount >= bits, a.dtype.type(0), a << within)


def shift_right(a: Array, n: Array) -> Array:
    """shr (9.7.7.9): amounts past the width count as the width; signed types fill with the sign."""
    bits = a.dtype.itemsize * 8
    amount = np.minimum(np.asarray(n, U4), U4(bits))
    within = np.minimum(amount, U4(bits - 1)).astype(a.dtype)
    gone = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
    return np.where(amount >= bits, gone, a >> within)


def quotient(a: Array, b: Array) -> Array:
    """div of integers (9.7.1.8), towards zero. Division by zero is unspecified there: all bits 1 here."""
    zero = b == 0
    divisor = np.where(zero, b.dtype.type(1), b)
    q = a // divisor
    if a.dtype.kind == "i":
        # Python's floor, made to cut.
        q = np.where((q < 0) & (q * divisor != a), q + a.dtype.type(1), q)
    return np.where(zero, ~b.dtype.type(0), q).astype(a.dtype)


def remainder(a: Array, b: Array) -> Array:
    """rem of integers (9.7.1.9): the sign of the dividend."""
    return (a - quotient(a, b) * b).astype(a.dtype)


def high_product(a: Array, b: Array) -> Array:
    """mul.hi of 32-bit integers (9.7.1.3)."""
    wide = I8 if a.dtype.kind == "i" else U8
    return ((a.astype(wide) * b.astype(wide)) >> wide(32)).astype(a.dtype)


def bit_field(a: Array, position: int, length: int) -> Array:
    """bfe (9.7.1.19) with constant position and length; signed types extend the sign of the field."""
    width = a.dtype.itemsize * 8
    position, length = position & 255, length & 255
    if length == 0:
        return np.zeros_like(a)
    unsigned = np.dtype(f"u{a.dtype.itemsize}")
    filled = a.astype(U8) if a.dtype.kind == "u" else a.view(unsigned).astype(U8)
    field = (filled >> U8(position)) if position < 64 else filled * U8(0)
    field = field & U8((1 << min(length, width)) - 1)
    if a.dtype.kind == "i":
        last = min(position + length - 1, width - 1)
        sign = (filled >> U8(last)) & U8(1)
        kept = max(last - position + 1, 0)
        field = field | np.where(sign == 1, U8(((1 << 64) - (1 << kept)) & ((1 << 64) - 1)), U8(0))
    return field.astype(unsigned).view(a.dtype)


def population(a: Array) -> Array:
    """popc.b32 (9.7.1.15): how many bits are 1."""
    pairs = a - ((a >> U4(1)) & U4(0x55555555))
    nibbles = (pairs & U4(0x33333333)) + ((pairs >> U4(2)) & U4(0x33333333))
    octets = (nibbles + (nibbles >> U4(4))) & U4(0x0F0F0F0F)
    return (octets * U4(0x01010101)) >> U4(24)


def permute(a: Array, b: Array, selector: Array) -> Array:
    """prmt (9.7.9.7), default mode: four bytes out of eight, each as it is or its sign replicated."""
    selector = np.asarray(selector, U4)
    both = a.astype(U8) | (b.astype(U8) << U8(32))
    result: Array = U4(0)
    for i in range(4):
        s = (selector >> U4(4 * i)) & U4(0xF)
        byte = ((both >> ((s & U4(7)).astype(U8) * U8(8))) & U8(0xFF)).astype(U4)
        byte = np.where(s & U4(8), np.where(byte & U4(0x80), U4(0xFF), U4(0)), byte)
        result = result | (byte << U4(8 * i))
    return result


def compare(relation: str, a: Array, b: Array, floating: bool) -> Array:
    """setp (9.7.6.2): ordered comparisons are false for NaN, those with a u at the end true."""
    plain = {"eq": np.equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal}
    if relation in plain:
        return plain[relation](a, b)
    if not floating:
        return {**plain, "ne": np.not_equal, "lo": np.less, "ls": np.less_equal, "hi": np.greater,
                "hs": np.greater_equal}[relation](a, b)  # fmt: skip
    unordered = np.isnan(a) | np.isnan(b)
    if relation == "nan":
        return unordered
    if relation == "num":
        return ~unordered
    if relation == "ne":
        return np.not_equal(a, b) & ~unordered
    return (np.not_equal(a, b) if relation == "neu" else plain[relation[:2]](a, b)) | unordered
