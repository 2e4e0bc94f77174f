"""Device arithmetic: what the row loops and the row formulas are made of.

MODE says how a primitive is spelled: "interpreted", "ptx" or "generic". libdevice does not run in Triton's
interpreter and inline assembly neither, so everything has a spelling from primitives.

Triton compares every global constant that a kernel uses at each launch, half a microsecond each: a constant
is used in one module, behind a function, and options are words.
"""

import triton
import triton.language as tl

# Finite stand-in for the offset of nothing: (-inf) - (-inf) would be NaN. It bounds offsets from below,
# because fl(k z) is off by up to half an ulp: 16 at 2^28, harmless, but 128 at 2^31, where 2^x overflows. A
# lane that has seen nothing but masks of -1e9 or -1e30 counts them as 0, as the stand-in for -inf below.
LOWEST = tl.constexpr(-(2.0**28))
HIGHEST = tl.constexpr(2.0**28)
MASKED_LOGIT = tl.constexpr(-1e30)
LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def exp2(x, MODE: tl.constexpr):
    """2^x with results below 2^-126 flushed to 0; plain exp2 pays two instructions more to keep them."""
    if MODE == "ptx":
        return tl.inline_asm_elementwise(
            "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.exp2(x)


@triton.jit
def fma(x, y, z, MODE: tl.constexpr):
    """x y + z rounded once, whatever the compiler's default for contraction."""
    if MODE == "interpreted":
        # The interpreter's fma rounds twice; this shows the arithmetic that the GPU does.
        return (x.to(tl.float64) * y + z).to(tl.float32)
    else:
        return tl.fma(x, y, z)


@triton.jit
def nats(bits):
    return LN2 * bits


@triton.jit
def log(x):
    """Natural logarithm of a scalar to about one fp32 ulp; the hardware's is off by 2.4e-7 near 1.

    x = 2^n m, m in [sqrt(1/2), sqrt(2)):  ln m = 2 artanh(w), w = (m - 1) / (m + 1).
    """
    bits = x.to(tl.int32, bitcast=True)
    n = (bits >> 23) - 127
    m = ((bits & 0x007FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    high = m > 1.4142135
    m = tl.where(high, 0.5 * m, m)
    n = tl.where(high, n + 1, n).to(tl.float32)
    # Zero, infinite, NaN and denormal arguments keep the hardware's answer.
    ordinary = (x >= 1.1754944e-38) & (x < float("inf"))
    return tl.where(ordinary, n * LN2 + twice_artanh((m - 1.0) / (m + 1.0)), tl.log(x))


@triton.jit
def twice_artanh(w):
    """2 artanh(w) for |w| <= 0.18."""
    v = w * w
    return 2.0 * w * (1.0 + v * (0.33333334 + v * (0.2 + v * (0.14285715 + v * 0.11111111))))


@triton.jit
def log1p(x):
    """ln(1 + x) for x >= 0, to about one ulp at small x too."""
    return tl.where(x < 0.4, twice_artanh(x / (2.0 + x)), log(1.0 + x))


@triton.jit
def expm1(x):
    """e^x - 1 without cancellation near 0."""
    tail = 0.008333334 + x * (0.0013888889 + x * (0.0001984127 + x * 2.4801588e-05))
    near = x * (1.0 + x * (0.5 + x * (0.16666667 + x * (0.041666668 + x * tail))))
    return tl.where(tl.abs(x) < 0.5, near, tl.exp(x) - 1.0)


@triton.jit
def cap_terms(z, softcap):
    """(x, e, 1 / (1 + e)) with e = 2^-|x| = exp(-2 |z| / softcap), for the cap and its slope."""
    x = z * (2.0 * LOG2E / softcap)
    e = tl.exp2(-tl.abs(x))
    return x, e, 1.0 / (1.0 + e)


@triton.jit
def softcapped(z, softcap, SOFTCAP: tl.constexpr):
    """softcap tanh(z / softcap) = softcap (1 - e) / (1 + e), to about an ulp of softcap.

    That is what rounding leaves of a capped logit anyway; tanh with all its digits at small arguments took 40
    instructions a logit more.
    """
    if SOFTCAP:
        x, e, inverse = cap_terms(z, softcap)
        size = softcap * ((1.0 - e) * inverse)
        return tl.where(x < 0.0, -size, size)
    else:
        return z


@triton.jit
def cap_slope(z, softcap):
    """d softcapped / dz = 1 - tanh^2 = 4 e / (1 + e)^2: the difference would lose its digits from
    |z| = 9 softcap on."""
    _, e, inverse = cap_terms(z, softcap)
    return 4.0 * e * (inverse * inverse)


@triton.jit
def finite(z):
    """A masked logit as a finite one of probability 0, so that p log p is 0 and not 0 * -inf.

    In the logits' own dtype: on packed bf16 this is half an instruction a logit, after the conversion to
    fp32 a whole one. fp16 has no number that is low enough (see `widened`). A NaN stays one: the plain
    maximum would hide it.
    """
    return tl.maximum(z, tl.full((), MASKED_LOGIT, z.dtype), propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def comparable(z, MODE: tl.constexpr):
    """Logits in a dtype whose maximum can be taken: the interpreter compares bf16 as integers."""
    if MODE == "interpreted" and z.dtype == tl.bfloat16:
        return z.to(tl.float32)
    else:
        return z


@triton.jit
def widened(z, FINITE: tl.constexpr, MODE: tl.constexpr):
    """Logits in fp32, masked ones made `finite` on request.

    Packed bf16 is taken apart with one instruction a logit, where the compiler's own way needs 1.7. fp16 is
    widened first and pays half an instruction more: its lowest number, -65504, lies above the offset LOWEST
    of a lane that has seen masked logits only, and 2^x would overflow.
    """
    if MODE == "ptx" and z.dtype == tl.bfloat16:
        if FINITE:
            # 0xf149 is -1e30.
            return tl.inline_asm_elementwise(
                "{ .reg .b32 z; mov.b32 z, 0xf149f149; max.NaN.bf16x2 z, z, $2; "
                "shl.b32 $0, z, 16; and.b32 $1, z, 0xffff0000; }",
                "=r,=r,r", [z], dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
                "=r,=r,r", [z], dtype=tl.float32, is_pure=True, pack=2,
            )  # fmt: skip
    elif FINITE and z.dtype == tl.float16:
        return finite(z.to(tl.float32))
    elif FINITE:
        return finite(comparable(z, MODE)).to(tl.float32)
    else:
        return z.to(tl.float32)


@triton.jit
def narrowed(d, to, MODE: tl.constexpr):
    """fp32 to the pointer's element type, to nearest even; the interpreter cuts bf16 off instead."""
    if MODE == "interpreted" and to.dtype.element_ty == tl.bfloat16:
        bits = d.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return bits.to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        return d.to(to.dtype.element_ty)
