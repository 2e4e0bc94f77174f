"""What the emulator refuses and what it reports: unknown instructions, stray accesses, races. All on
snippets."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from ptx.machine import ORDERS, Settings
from ptx.parser import Unsupported
from ptx.reports import Benign, Fault, Report, Reports
from ptx_snippets import run

OWN = "mad.wide.u32 %rd9, %r1, 4, %rd1;"  # the address of a thread's own number


def words(count: int) -> Any:
    return np.zeros(count, np.uint32)


def only(reports: Reports) -> Report:
    (report,) = reports.found.values()
    return report


@pytest.mark.parametrize(
    "instruction",
    [
        "sin.approx.f32 %r2, %r1;",  # an opcode
        "add.rz.f32 %r2, %r1, %r1;",  # a rounding
        "add.sat.f32 %r2, %r1, %r1;",  # a modifier
        "add.f32.ftz %r2, %r1, %r1;",  # the right modifiers in another order
        "fma.rn.f64 %rd2, %rd1, %rd1, %rd1;",  # a type
        "max.f32 %r2, %r1, %r1, %r1, %r1;",  # too many operands
        "add.s32 %r2, %r1;",  # too few
        "mul.lo.s32 %r2, %r1, %r1, %r1;",
        "mad.lo.s32 %r2, %r1, %r1;",
        "div.approx.f32 %r2, %r1, %r1;",
        "ld.global.nc.b32 %r2, [%rd1];",
        "ld.global.v4.b32 {%r2, %r3}, [%rd1];",
        "atom.global.add.u32 %r2, [%rd1], 1;",
        "shfl.sync.bfly.b32 %r2|%p1, %r1, 1, 31, -1;",
        "shfl.sync.bfly.b32 %r2, %r1, 1, 31, 0xffff;",
        "@%p1 shfl.sync.bfly.b32 %r2, %r1, 1, 31, -1;",
        "bar.sync 1;",
        "@%p1 bar.sync 0;",
        "bar.warp.sync 0xffff;",
        "cp.async.wait_all;",
        "mov.u32 %r2, %clock;",
        "setp.eq.and.f32 %p1, %r1, %r1, %p2;",
        "cvt.rn.relu.bf16.f32 %rs1, %r1;",
        "add.s64 %r2, %rd1, %rd1;",  # wider than its register
        "mov.b32 %undeclared, 0;",
    ],
)
def test_what_is_unknown_raises_with_its_line(instruction: str) -> None:
    """Before anything runs, whether or not control would come there."""
    text = f"bra $END;\n.loc 1 42 3 // unknown.py:42:3\n{instruction} $END:"
    with pytest.raises(Unsupported) as raised:
        run(text, [words(4)])
    assert "unknown.py:42" in str(raised.value)
    assert instruction.rstrip(";") in str(raised.value)


def test_a_guarded_end_is_unknown() -> None:
    with pytest.raises(Unsupported, match="@%p1 ret"):
        run("setp.eq.s32 %p1, %r1, 0; @%p1 ret;", [words(4)])


# Memory


@pytest.mark.parametrize("store", [False, True])
def test_outside_of_a_tensor(store: bool) -> None:
    access = "st.global.b32 [%rd9], %r1;" if store else "ld.global.b32 %r2, [%rd9];"
    with pytest.raises(Fault, match=r"outside a tensor's elements.*snippet.py:7.*offset 124, of 124"):
        run(f"{OWN} {access}", [words(64)[:31]])
    assert not run(f"{OWN} {access}", [words(32)]).found


def test_cache_hints_change_nothing() -> None:
    """Of L1 by name, of L2 by a policy in a register."""
    x, y = np.arange(32, dtype=np.uint32), words(32)
    body = """
        createpolicy.fractional.L2::evict_last.b64 %rd8, 1.0;
        mad.wide.u32 %rd9, %r1, 4, %rd1;
        mad.wide.u32 %rd10, %r1, 4, %rd2;
        ld.global.L1::evict_last.L2::cache_hint.b32 %r2, [%rd9], %rd8;
        st.global.L1::evict_first.b32 [%rd10], %r2;
    """
    assert not run(body, [x, y]).found
    assert np.array_equal(x, y)


def test_in_another_tensor() -> None:
    """An address belongs to the tensor that it was made from, even where it hits another one."""
    both = words(64)
    with pytest.raises(Fault, match="outside a tensor's elements"):
        run(f"{OWN} ld.global.b32 %r2, [%rd9 + 128];", [both[:32], both[32:]])


def test_between_the_rows_of_a_view() -> None:
    """Elements, not storage: the gap between two rows belongs to somebody else."""
    table = np.zeros((4, 16), np.uint32)
    access = "mad.wide.u32 %rd9, %r1, 64, %rd1; ld.global.b32 %r3, [%rd9 + {}];"
    body = f"setp.lt.u32 %p1, %r1, 4; @!%p1 bra $END; {access} $END:"
    assert not run(body.format(28), [table[:, :8]]).found
    with pytest.raises(Fault, match="outside a tensor's elements"):
        run(body.format(32), [table[:, :8]])


def test_alignment() -> None:
    halves = np.zeros(64, np.uint16)
    body = "mad.wide.u32 %rd9, %r1, 2, %rd1; ld.global.b32 %r2, [%rd9];"
    with pytest.raises(Fault, match="misaligned global access"):
        run(f"setp.lt.u32 %p1, %r1, 8; @!%p1 bra $END; {body} $END:", [halves])
    with pytest.raises(Fault, match=r"misaligned.*bytes 16"):
        run("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd1 + 4];", [words(16)])


def test_a_number_from_memory_is_no_pointer() -> None:
    with pytest.raises(Unsupported, match="no tensor"):
        run("ld.global.b64 %rd2, [%rd1]; ld.global.b32 %r2, [%rd2];", [np.zeros(4, np.uint64)])


def test_shared_memory() -> None:
    body = "shl.b32 %r2, %r1, 2; {} ld.shared.b32 %r3, [%r2];"
    assert only(run(body.format(""), [words(1)], shared=128)).kind == "shared memory read that nobody wrote"
    assert not run(body.format("st.shared.b32 [%r2], %r1;"), [words(1)], shared=128).found
    with pytest.raises(Fault, match="shared write out of bounds"):
        run(body.format("st.shared.b32 [%r2], %r1;"), [words(1)], shared=64)


# Races

NEIGHBOUR = """
    shl.b32 %r2, %r1, 2;
    .loc 1 10 1 // snippet.py:10:1
    st.shared.b32 [%r2], %r1;
    {}
    xor.b32 %r3, %r2, {};
    .loc 1 12 1 // snippet.py:12:1
    ld.shared.b32 %r4, [%r3];
"""


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("between", "neighbour", "races"),
    [
        ("", 4, True),  # a lane of the same warp
        ("bar.warp.sync -1;", 4, False),
        ("bar.sync 0;", 4, False),
        ("", 128, True),  # another warp
        ("bar.warp.sync -1;", 128, True),
        ("bar.sync 0;", 128, False),
        ("shfl.sync.bfly.b32 %r5, %r1, 1, 31, -1;", 4, True),  # exchanges registers, orders no memory
    ],
)
def test_shared_memory_needs_a_barrier(between: str, neighbour: int, races: bool, order: str) -> None:
    reports = run(NEIGHBOUR.format(between, neighbour), [words(1)], threads=64, shared=256,
                  settings=Settings(order=order, seed=3))  # fmt: skip
    kinds = {r.kind for r in reports.found.values()} - {"shared memory read that nobody wrote"}
    if not races:
        assert not reports.found
    elif order == "warps" and neighbour == 128:
        # The warp that comes first reads before, the other one after.
        assert kinds == {"race (read-write) within a CTA, shared", "race (write-read) within a CTA, shared"}
    else:
        assert kinds == {"race (write-read) within a CTA, shared"}
        (report,) = reports.found.values()
        assert "snippet.py:10 [st.shared.b32] / snippet.py:12 [ld.shared.b32]" in report.place


def test_read_before_it_is_overwritten() -> None:
    """Several read, then one of them writes: the other readers race with it, whoever read last."""
    body = "ld.global.b32 %r2, [%rd1]; {} setp.eq.s32 %p1, %r1, {}; @%p1 st.global.b32 [%rd1], %r1;"
    for writer in (0, 7, 31, 63):
        report = only(run(body.format("", writer), [words(1) + 99], threads=64))
        assert report.kind == "race (read-write) within a CTA, global"
        assert not run(body.format("bar.sync 0;", writer), [words(1) + 99], threads=64).found


def test_writes_of_two_threads() -> None:
    """One value or two; within an instruction the values must agree."""
    body = "{} st.global.b32 [%rd1], %r2;"
    assert "several values" in "".join(
        r.kind for r in run(body.format("mov.u32 %r2, %r1;"), [words(1)]).found.values()
    )
    first = (
        "setp.eq.s32 %p1, %r1, 0; setp.eq.s32 %p2, %r1, 1;"
        "@%p1 st.global.b32 [%rd1], {}; {} @%p2 st.global.b32 [%rd1], {};"
    )
    assert only(run(first.format(5, "", 6), [words(1)])).kind == "race (write-write) within a CTA, global"
    assert (
        only(run(first.format(5, "", 5), [words(1)])).kind
        == "race (write-write, same value) within a CTA, global"
    )
    assert not run(first.format(5, "bar.sync 0;", 6), [words(1)]).found


@pytest.mark.parametrize("order", ORDERS)
def test_nothing_orders_two_ctas(order: str) -> None:
    """A barrier is the CTA's own."""
    body = """
        mov.u32 %r2, %ctaid.x;
        or.b32 %r3, %r1, %r2;
        setp.eq.s32 %p1, %r3, 0;
        @%p1 st.global.b32 [%rd1], 5;
        bar.sync 0;
        ld.global.b32 %r4, [%rd1];
    """
    reports = run(body, [words(1)], ctas=3, settings=Settings(order=order, seed=1))
    assert reports.found
    assert all("between CTAs, global" in kind for kind, _, _ in reports.found)


def test_neighbouring_halves_do_not_race() -> None:
    """Two bytes each, side by side, from different CTAs."""
    body = """
        mov.u32 %r2, %ctaid.x;
        mad.lo.s32 %r3, %r2, 32, %r1;
        mad.wide.u32 %rd9, %r3, 2, %rd1;
        cvt.u16.u32 %rs1, %r3;
        st.global.b16 [%rd9], %rs1;
    """
    out = np.zeros(64, np.uint16)
    assert not run(body, [out], ctas=2).found
    assert np.array_equal(out, np.arange(64))


def test_barriers_that_not_all_threads_reach() -> None:
    text = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $END; bar.sync 0; $END:"
    assert only(run(text, [words(1)], threads=64)).kind == "barrier that threads which ended never reach"
    text = "setp.lt.u32 %p1, %r1, 32; @%p1 bra $A; bar.sync 0; bra $END; $A: bar.sync 0; $END:"
    assert only(run(text, [words(1)], threads=64)).kind == "threads of a CTA at different barriers"


# Schedules, noise, reports


@pytest.mark.parametrize("order", ORDERS)
def test_divergent_loops_end_where_they_should(order: str) -> None:
    """Every thread its own number of turns, then all together again."""
    body = f"""
        {OWN}
        mov.u32 %r2, 0;
        mov.u32 %r3, 0;
        $LOOP:
        add.s32 %r3, %r3, %r2;
        add.s32 %r2, %r2, 1;
        setp.le.u32 %p1, %r2, %r1;
        @%p1 bra $LOOP;
        bar.sync 0;
        st.global.b32 [%rd9], %r3;
    """
    out = words(96)
    assert not run(body, [out], threads=96, settings=Settings(order=order, seed=2)).found
    n = np.arange(96)
    assert np.array_equal(out, n * (n + 1) // 2)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="order: unknown name 'random'"):
        Settings(order="random")
    with pytest.raises(ValueError, match="noise: unknown mode 'loud'"):
        Settings(noise="loud")


def test_benign_reports() -> None:
    """Those on the list are not harmful; another place or kernel is."""
    reports = Reports((Benign("race (read-write", "gradient", "sweep.py:9", "why"),))
    reports.add(
        "race (read-write) within a CTA, global", "gradient_kernel", "sweep.py:9 [x] / sweep.py:12 [y]"
    )
    assert not reports.harmful()
    reports.add(
        "race (read-write) within a CTA, global", "gradient_kernel", "sweep.py:8 [x] / sweep.py:12 [y]"
    )
    reports.add("race (read-write) within a CTA, global", "fused_kernel", "sweep.py:9 [x] / sweep.py:12 [y]")
    assert len(reports.take()) == 2
    assert not reports.found
