"""The emulator's integer, bit, data movement and warp instructions against the PTX ISA manual's
definitions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx_snippets import compute, run


def b32(*values: int) -> Any:
    return np.array([v & 0xFFFFFFFF for v in values], np.uint32)


def b64(*values: int) -> Any:
    return np.array([v & (2**64 - 1) for v in values], np.uint64)


def check(instructions: str, inputs: tuple[Any, ...], expected: Any) -> None:
    got = compute(instructions, *inputs, result=expected.dtype)
    assert np.array_equal(got, expected), [hex(x) for x in got.tolist()]


def test_sums_wrap() -> None:
    check("add.s32 %d, %a, %b;", (b32(2**31 - 1, -1), b32(1, 1)), b32(2**31, 0))
    check("sub.s32 %d, %a, %b;", (b32(0), b32(1)), b32(-1))
    check("add.s64 %d, %a, %b;", (b64(2**63 - 1), b64(2)), b64(2**63 + 1))
    check("sub.s64 %d, %a, %b;", (b64(0), b64(1)), b64(-1))
    check("neg.s32 %d, %a;", (b32(5, -(2**31)),), b32(-5, -(2**31)))


def test_products() -> None:
    """lo: the low half. hi: the high half, by sign. wide: twice the width, by sign."""
    check("mul.lo.s32 %d, %a, %b;", (b32(0x10001, -3), b32(0x10001, 5)), b32(0x20001, -15))
    check("mul.lo.s64 %d, %a, %b;", (b64(2**40), b64(2**30 + 1)), b64(2**40))
    check("mul.hi.u32 %d, %a, %b;", (b32(-1), b32(2)), b32(1))
    check("mul.hi.s32 %d, %a, %b;", (b32(-1), b32(2)), b32(-1))
    check("mul.wide.s32 %d, %a, %b;", (b32(-1), b32(2)), b64(-2))
    check("mul.wide.u32 %d, %a, %b;", (b32(-1), b32(2)), b64(2**33 - 2))
    check("mad.lo.s32 %d, %a, %b, %c;", (b32(7), b32(-3), b32(1)), b32(-20))
    check("mad.lo.s64 %d, %a, %b, %c;", (b64(7), b64(-3), b64(1)), b64(-20))
    check("mad.wide.s32 %d, %a, 4, %b;", (b32(-1), b64(2**40)), b64(2**40 - 4))
    check("mad.wide.u32 %d, %a, 4, %b;", (b32(-1), b64(0)), b64(2**34 - 4))


def test_division() -> None:
    """Towards zero; the remainder has the dividend's sign."""
    a, b = b32(7, -7, 7, -7, -8, 0), b32(2, 2, -2, -2, 2, 5)
    check("div.s32 %d, %a, %b;", (a, b), b32(3, -3, -3, 3, -4, 0))
    check("rem.s32 %d, %a, %b;", (a, b), b32(1, -1, 1, -1, 0, 0))
    check("div.u32 %d, %a, %b;", (b32(-1), b32(2)), b32(2**31 - 1))
    check("rem.u64 %d, %a, %b;", (b64(-1), b64(10)), b64(5))
    check("div.s64 %d, %a, %b;", (b64(-9), b64(4)), b64(-2))


def test_bits() -> None:
    check("and.b32 %d, %a, %b;", (b32(0b1100), b32(0b1010)), b32(0b1000))
    check("or.b32 %d, %a, %b;", (b32(0b1100), b32(0b1010)), b32(0b1110))
    check("xor.b32 %d, %a, -2147483648;", (b32(1),), b32(0x80000001))
    check("and.b64 %d, %a, -4;", (b64(7),), b64(4))
    check("not.b32 %d, %a;", (b32(0),), b32(-1))
    check("popc.b32 %d, %a;", (b32(0, 1, 0x80000001, -1, 0x12345678),), b32(0, 1, 2, 32, 13))


def test_shifts_past_the_width() -> None:
    """9.7.7.8, 9.7.7.9: amounts above the width count as the width; shr of a signed type fills with the
    sign."""
    amounts = b32(0, 1, 31, 32, 33, 255, -1)
    check("shl.b32 %d, %a, %b;", (b32(-1), amounts), b32(-1, -2, 2**31, 0, 0, 0, 0))
    check("shr.u32 %d, %a, %b;", (b32(-1), amounts), b32(-1, 2**31 - 1, 1, 0, 0, 0, 0))
    check("shr.s32 %d, %a, %b;", (b32(-(2**31)), amounts), b32(-(2**31), -(2**30), -1, -1, -1, -1, -1))
    check("shl.b64 %d, %a, %b;", (b64(1), b32(40, 63, 64)), b64(2**40, 2**63, 0))
    check("shr.s64 %d, %a, 63;", (b64(-5, 5),), b64(-1, 0))
    check("shr.u64 %d, %a, 62;", (b64(-1),), b64(3))
    check("shr.u32 %d, %a, 40;", (b32(-1),), b32(0))


def test_bit_fields() -> None:
    """9.7.1.19: signed types extend the field's top bit, or the number's where the field ends past it."""
    check("bfe.u32 %d, %a, 3, 2;", (b32(0b11000, 0b10111),), b32(3, 2))
    check("bfe.s32 %d, %a, 3, 2;", (b32(0b11000, 0b01000),), b32(-1, 1))
    check("bfe.u32 %d, %a, 28, 8;", (b32(-1),), b32(0xF))
    check("bfe.s32 %d, %a, 28, 8;", (b32(0x90000000, 0x70000000),), b32(-7, 7))
    check("bfe.u32 %d, %a, 5, 0;", (b32(-1),), b32(0))


def test_permuted_bytes() -> None:
    """9.7.9.7: a nibble of the selector picks one byte of eight; its top bit replicates that byte's sign."""
    check("prmt.b32 %d, %a, %b, 0x7610;", (b32(0x33221100), b32(0x77665544)), b32(0x77661100))
    check("prmt.b32 %d, %a, %b, 0x0BF8;", (b32(0x83228100), b32(0x8766F544)), b32(0x00FFFF00))


def test_integer_comparisons() -> None:
    a, b = b32(1, -1, 5, 5), b32(-1, 1, 5, 6)
    table = {
        "eq.b32": "0010", "ne.s32": "1101", "lt.s32": "0101", "le.s32": "0111", "gt.s32": "1000", "ge.s32":
        "1010", "lt.u32": "1001", "lo.u32": "1001", "ls.u32": "1011", "hi.u32": "0100", "hs.u32": "0110",
    }  # fmt: skip
    for name, expected in table.items():
        got = compute(f"setp.{name} %p1, %a, %b; selp.b32 %d, 1, 0, %p1;", a, b)
        assert "".join(map(str, got)) == expected, name
    check("setp.lt.s64 %p1, %a, 0; selp.b32 %d, 1, 0, %p1;", (b64(-1, 1),), b32(1, 0))


def test_predicates_and_guards() -> None:
    """A guarded instruction leaves its register as it is where the guard is false."""
    two = "setp.gt.s32 %p1, %a, 2; setp.lt.s32 %p2, %a, 5;"
    values = b32(1, 3, 7)
    check(f"{two} and.pred %p3, %p1, %p2; selp.b32 %d, 1, 0, %p3;", (values,), b32(0, 1, 0))
    check(f"{two} or.pred %p3, %p1, %p2; selp.b32 %d, 1, 0, %p3;", (values,), b32(1, 1, 1))
    check(f"{two} not.pred %p3, %p1; selp.b32 %d, 1, 0, %p3;", (values,), b32(1, 0, 0))
    check(f"{two} mov.u32 %d, 9; @%p1 mov.u32 %d, 8;", (values,), b32(9, 8, 8))
    check(f"{two} mov.u32 %d, 9; @!%p1 add.s32 %d, %d, 1;", (values,), b32(10, 9, 9))
    check("min.s32 %d, %a, %b;", (b32(-1, 1), b32(0, 0)), b32(-1, 0))
    check("max.u32 %d, %a, %b;", (b32(-1), b32(0)), b32(-1))


def test_moves() -> None:
    check("mov.b32 %d, 0f3F800000;", (b32(0),), b32(0x3F800000))
    check("mov.b32 {%rs1, %rs2}, %a; mov.b32 %d, {%rs2, %rs1};", (b32(0x11112222),), b32(0x22221111))
    check(
        "mov.b64 {%r2, %r3}, %a; mov.b64 %d, {%r3, %r2};", (b64(0x1111111122222222),), b64(0x2222222211111111)
    )
    scoped = "{ .reg .b32 %a; mov.b32 %a, 7; add.s32 %d, %a, 0; } add.s32 %d, %d, %a;"
    check(scoped, (b32(100),), b32(107))


LANES = np.arange(32, dtype=np.uint32)


@pytest.mark.parametrize(
    ("kind", "operand", "clamp", "source"),
    [
        ("bfly", 16, 31, LANES ^ 16),
        ("bfly", 3, 31, LANES ^ 3),
        ("idx", 5, 31, np.full(32, 5)),
        ("up", 3, 0, np.where(LANES >= 3, LANES - 3, LANES)),
        ("down", 3, 31, np.where(LANES + 3 < 32, LANES + 3, LANES)),
        # Segments of eight lanes: 0x18 in the upper part of the clamp.
        ("up", 3, 0x1800, np.where(LANES % 8 >= 3, LANES - 3, LANES)),
        ("down", 3, 0x181F, np.where(LANES % 8 + 3 < 8, LANES + 3, LANES)),
        ("idx", 2, 0x181F, LANES // 8 * 8 + 2),
        # bfly past the segment's end: its own value.
        ("bfly", 8, 0x1807, np.where((LANES ^ 8) <= (LANES & 0x18 | 7), LANES ^ 8, LANES)),
    ],
)
def test_shuffles(kind: str, operand: int, clamp: int, source: Any) -> None:
    """9.7.9.6; a lane whose source lies outside its segment keeps its own value."""
    values = LANES * 7 + 1
    check(f"shfl.sync.{kind}.b32 %d, %a, {operand}, {clamp}, -1;", (values,), values[source])


def test_shuffle_with_lanes_missing_is_reported() -> None:
    out = np.zeros(32, np.uint32)
    reports = run(
        """
        mov.u32 %r3, 5;
        setp.lt.u32 %p1, %r1, 16;
        @!%p1 bra $DONE;
        .loc 1 9 1 // snippet.py:9:1
        shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        $DONE:
        mad.wide.u32 %rd2, %r1, 4, %rd1;
        st.global.b32 [%rd2], %r3;
        """,
        [out],
    )
    (report,) = reports.found.values()
    assert report.kind == "warp operation with lanes missing"
    assert report.place.startswith("snippet.py:9")


def test_reductions_of_a_warp() -> None:
    values = b32(*range(-5, 27))
    members = "mov.u32 %r5, -1;"
    check(f"{members} redux.sync.min.s32 %d, %a, %r5;", (values,), np.full(32, -5, np.int32).view(np.uint32))
    check(f"{members} redux.sync.max.u32 %d, %a, %r5;", (values,), np.full(32, 2**32 - 1, np.uint32))
    check(f"{members} redux.sync.add.s32 %d, %a, %r5;", (values,), np.full(32, sum(range(-5, 27)), np.uint32))
    check(f"{members} redux.sync.xor.b32 %d, %a, %r5;", (LANES,), np.zeros(32, np.uint32))
    floats = np.linspace(-3, 3, 32).astype(np.float32)
    floats[7] = np.nan
    got = compute(f"{members} redux.sync.max.f32 %d, %a, %r5;", floats, result=np.float32)
    assert (got == 3).all()
    assert (compute(f"{members} redux.sync.max.NaN.f32 %d, %a, %r5;", floats) == 0x7FFFFFFF).all()


def test_matrices_in_shared_memory() -> None:
    """stmatrix lays lane 4 r + c's pair at row r, columns 2 c and 2 c + 1 of the matrix whose row addresses
    lanes 8 n to 8 n + 7 hold; .trans exchanges rows and columns; ldmatrix reads the same way."""
    address = "and.b32 %r2, %r1, 7; shl.b32 %r2, %r2, 4;"
    one = f"{address} stmatrix.sync.aligned.m8n8.x1{{}}.shared.b16 [%r2], {{{{%a}}}}; bar.sync 0; "
    pairs = (2 * LANES) | ((2 * LANES + 1) << 16)
    for trans in ("", ".trans"):
        for back in ("", ".trans"):
            text = one.format(trans) + f"ldmatrix.sync.aligned.m8n8.x1{back}.shared.b16 {{%r3}}, [%r2];"
            out = np.zeros(32, np.uint32)
            reports = run(
                f"mad.wide.u32 %rd5, %r1, 4, %rd1; ld.global.b32 %a, [%rd5]; {text}"
                "mad.wide.u32 %rd6, %r1, 4, %rd2; st.global.b32 [%rd6], %r3;",
                [pairs.astype(np.uint32), out], shared=128, registers=".reg .b32 %a;",
            )  # fmt: skip
            assert not reports.found
            matrix = np.arange(64).reshape(8, 8)
            wanted = matrix if trans == back else matrix.T
            assert np.array_equal(out.view(np.uint16).reshape(8, 8), wanted)
