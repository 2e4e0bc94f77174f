"""The whitelist: every instruction that the emulator knows, with its modifiers in the manual's order and
its number of operands, and how it becomes a Python expression. What is not matched here, whole, raises.

A form is a function of the code generator (see `codegen`), the instruction and its match. Loads and stores
of memory are in `codegen` itself, as their meaning needs the launch."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from .parser import Instruction, Unsupported, parts

if TYPE_CHECKING:
    from .codegen import BlockCode

# PTX types by NumPy's: the letter is the kind, the digit the bytes.
TYPES = {
    "b8": "U1", "u8": "U1", "s8": "I1", "b16": "U2", "u16": "U2", "s16": "I2", "f16": "U2", "bf16": "U2",
    "b32": "U4", "u32": "U4", "s32": "I4", "f32": "F4", "f16x2": "U4", "bf16x2": "U4",
    "b64": "U8", "u64": "U8", "s64": "I8", "f64": "F8", "pred": "P",
}  # fmt: skip
SIZE = {name: int(name[1]) for name in set(TYPES.values()) - {"P"}}

Form = Callable[["BlockCode", Instruction, "re.Match[str]"], None]
FORMS: list[tuple[re.Pattern[str], tuple[int, ...], Form]] = []


def form(pattern: str, *operands: int) -> Callable[[Form], Form]:
    def register(function: Form) -> Form:
        FORMS.append((re.compile(pattern), operands, function))
        return function

    return register


def find(i: Instruction) -> tuple[Form, re.Match[str]]:
    if i.guard and ".sync" in i.opcode:
        raise Unsupported("guarded, between threads")
    for pattern, counts, function in FORMS:
        m = pattern.fullmatch(i.opcode)
        if m:
            if len(i.operands) not in counts:
                raise Unsupported(f"{len(i.operands)} operands; known with {counts}")
            return function, m
    raise Unsupported("unknown instruction")


SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
INTEGER = r"[us](?:16|32|64)"


@form(r"(add|sub|mul)(?:\.rn)?(\.ftz)?\.f32", 3)
def float_arithmetic(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    a, b = c.floats(i, m[2])
    c.define(i, f"{a} {SIGNS[m[1]]} {b}", "F4", flush=bool(m[2]))


@form(r"fma\.rn(\.ftz)?\.f32", 4)
def float_fma(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"fma({', '.join(c.floats(i, m[1]))})", "F4", flush=bool(m[1]))


@form(r"(add|sub|mul)(?:\.rn)?\.f32x2", 3)
@form(r"(fma)\.rn\.f32x2", 4)
def packed_float_arithmetic(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    function = {"add": "np.add", "sub": "np.subtract", "mul": "np.multiply", "fma": "fma"}[m[1]]
    c.define(i, f"paired({function}, {', '.join(c.uses(i, 'U8'))})", "U8")


@form(r"(neg|abs)\.f32", 2)
def float_sign(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    (x,) = c.uses(i, "U4")
    c.define(i, f"{x} ^ U4(0x80000000)" if m[1] == "neg" else f"{x} & U4(0x7FFFFFFF)", "U4")


@form(r"(neg|abs)\.(?:bf16|f16)(x2)?", 2)
def half_sign(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind, bit, rest = ("U4", "0x80008000", "0x7FFF7FFF") if m[2] else ("U2", "0x8000", "0x7FFF")
    (x,) = c.uses(i, kind)
    c.define(i, f"{x} ^ {kind}({bit})" if m[1] == "neg" else f"{x} & {kind}({rest})", kind)


@form(r"(neg|abs)\.(s32|s64)", 2)
def integer_sign(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    (x,) = c.uses(i, TYPES[m[2]])
    c.define(i, f"-{x}" if m[1] == "neg" else f"abs({x})", TYPES[m[2]])


@form(r"(min|max)(\.ftz)?(\.NaN)?\.f32", 3, 4)
def float_extreme(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    x = c.floats(i, m[2])
    how = f"{m[1] == 'max'}, {bool(m[3])}"
    expression = f"extreme({x[0]}, {x[1]}, {how})"
    if len(x) == 3:
        expression = f"extreme({expression}, {x[2]}, {how})"
    c.define(i, expression, "F4", flush=bool(m[2]))


@form(r"(min|max)(\.NaN)?\.(bf16|f16)(x2)?", 3)
def half_extreme(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind = "U4" if m[4] else "U2"
    a, b = c.uses(i, kind)
    call = f"extreme_{m[3]}({{}}, {{}}, {m[1] == 'max'}, {bool(m[2])})"
    c.define(
        i, f"packed(lambda a, b: {call.format('a', 'b')}, {a}, {b})" if m[4] else call.format(a, b), kind
    )


@form(rf"(min|max)\.({INTEGER})", 3)
def integer_extreme(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    a, b = c.uses(i, TYPES[m[2]])
    c.define(i, f"np.{m[1]}imum({a}, {b})", TYPES[m[2]])


@form(r"div\.full\.f32", 3)
def full_range_quotient(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"S.noise.quotient({', '.join(c.uses(i, 'F4'))})", "F4")


@form(r"div\.rn\.f32", 3)
def exact_quotient(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"np.divide({', '.join(c.uses(i, 'F4'))})", "F4")


@form(r"ex2\.approx(\.ftz)?\.f32", 2)
def power_of_two(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"S.noise.exp2{'_ftz' if m[1] else ''}({c.uses(i, 'F4')[0]})", "F4")


@form(r"lg2\.approx(\.ftz)?\.f32", 2)
def logarithm(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"S.noise.log2{'_ftz' if m[1] else ''}({c.uses(i, 'F4')[0]})", "F4")


@form(rf"(div|rem)\.({INTEGER})", 3)
def integer_division(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    name = {"div": "quotient", "rem": "remainder"}[m[1]]
    c.define(i, f"{name}({', '.join(c.uses(i, TYPES[m[2]]))})", TYPES[m[2]])


@form(rf"(add|sub)\.({INTEGER})", 3)
def integer_sum(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    a, b = c.uses(i, TYPES[m[2]])
    c.define(i, f"{a} {SIGNS[m[1]]} {b}", TYPES[m[2]])


@form(r"(mul|mad)\.lo\.([us](?:16|32|64))", 3, 4)
@form(r"(mul|mad)\.(wide)\.([us](?:16|32))", 3, 4)
@form(r"(mul|mad)\.(hi)\.([us]32)", 3, 4)
def integer_product(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    if len(i.operands) != {"mul": 3, "mad": 4}[m[1]]:
        raise Unsupported("number of operands")
    kind = TYPES[m[m.lastindex or 0]]
    a, b = (c.use(x, kind) for x in i.operands[1:3])
    if ".wide." in i.opcode:
        kind = f"{kind[0]}{2 * SIZE[kind]}"
        product = f"{a}.astype({kind}) * {b}.astype({kind})"
    else:
        product = f"high_product({a}, {b})" if ".hi." in i.opcode else f"{a} * {b}"
    c.define(i, f"{product} + {c.use(i.operands[3], kind)}" if m[1] == "mad" else product, kind)


@form(r"(and|or|xor)\.(pred|b16|b32|b64)", 3)
def bitwise(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    a, b = c.uses(i, TYPES[m[2]])
    c.define(i, f"{a} {SIGNS[m[1]]} {b}", TYPES[m[2]])


@form(r"not\.(pred|b16|b32|b64)", 2)
def complement(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"~{c.uses(i, TYPES[m[1]])[0]}", TYPES[m[1]])


@form(r"(shl)\.(b16|b32|b64)", 3)
@form(r"(shr)\.([bus](?:16|32|64))", 3)
def shift(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind, amount = TYPES[m[2]], i.operands[2]
    value = c.use(i.operands[1], kind)
    if amount.isdigit() and int(amount) < 8 * SIZE[kind]:
        c.define(
            i, f"{value} {'<<' if m[1] == 'shl' else '>>'} {c.kernel.constant(f'{kind}({amount})')}", kind
        )
    else:
        name = {"shl": "shift_left", "shr": "shift_right"}[m[1]]
        c.define(i, f"{name}({value}, {c.use(amount, 'U4')})", kind)


@form(r"bfe\.([us](?:32|64))", 4)
def bit_field(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    if not (i.operands[2].isdigit() and i.operands[3].isdigit()):
        raise Unsupported("position and length that are not constants")
    value = c.use(i.operands[1], TYPES[m[1]])
    c.define(i, f"bit_field({value}, {i.operands[2]}, {i.operands[3]})", TYPES[m[1]])


@form(r"popc\.b32", 2)
def population(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"population({c.uses(i, 'U4')[0]})", "U4")


@form(r"prmt\.b32", 4)
def permute(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"permute({', '.join(c.uses(i, 'U4'))})", "U4")


ORDERED = "eq|ne|lt|le|gt|ge"


@form(rf"setp\.({ORDERED}|equ|neu|ltu|leu|gtu|geu|num|nan)(\.ftz)?\.(f32|bf16|f16)", 3)
def float_comparison(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    if m[3] == "f32":
        a, b = c.floats(i, m[2])
    elif m[2]:
        raise Unsupported(".ftz of 16-bit numbers")
    else:
        a, b = (f"from_{m[3]}({x})" for x in c.uses(i, "U2"))
    c.define(i, f"compare({m[1]!r}, {a}, {b}, True)", "P")


@form(r"setp\.(eq|ne)\.(b16|b32|b64)", 3)
@form(rf"setp\.({ORDERED})\.({INTEGER})", 3)
@form(r"setp\.(lo|ls|hi|hs)\.(u16|u32|u64)", 3)
def integer_comparison(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    a, b = c.uses(i, TYPES[m[2]])
    c.define(i, f"compare({m[1]!r}, {a}, {b}, False)", "P")


@form(r"selp\.([bus](?:16|32|64)|f32)", 4)
def select(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind = TYPES[m[1]]
    a, b = c.use(i.operands[1], kind), c.use(i.operands[2], kind)
    c.define(i, f"where({c.use(i.operands[3], 'P')}, {a}, {b})", kind)


@form(r"mov\.(pred|[bus](?:16|32|64)|f32)", 2)
def move(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind = TYPES[m[1]]
    to, source = i.operands
    if not (to.startswith("{") or source.startswith("{")):
        c.define(i, c.use(source, kind), kind)
        return
    each = {"b32": "U2", "b64": "U4"}.get(m[1])
    both = parts(to if to.startswith("{") else source)
    if each is None or len(both) != 2:
        raise Unsupported("packing")
    bits = 8 * SIZE[each]
    if to.startswith("{"):
        whole = c.use(source, kind)
        c.define(i, f"({whole} & {kind}({(1 << bits) - 1})).astype({each})", each, both[0])
        c.define(i, f"({whole} >> {kind}({bits})).astype({each})", each, both[1])
    else:
        low, high = (c.use(x, each) for x in both)
        c.define(i, f"{low}.astype({kind}) | ({high}.astype({kind}) << {kind}({bits}))", kind)


@form(r"cvt\.rn\.(bf16|f16)x2\.f32", 3)
def convert_to_packed(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    """The first source goes to the upper half."""
    high, low = c.uses(i, "F4")
    c.define(i, f"pack(to_{m[1]}({low}), to_{m[1]}({high}))", "U4")


@form(r"cvt\.rn\.(bf16|f16)\.f32", 2)
def convert_to_half(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"to_{m[1]}({c.uses(i, 'F4')[0]})", "U2")


@form(r"cvt\.f32\.(bf16|f16)", 2)
def convert_from_half(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"from_{m[1]}({c.uses(i, 'U2')[0]})", "F4")


@form(rf"cvt\.rn\.f32\.({INTEGER})", 2)
def convert_to_float(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    c.define(i, f"{c.uses(i, TYPES[m[1]])[0]}.astype(F4)", "F4")


@form(r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))", 2)
def convert_integer(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    """Low bits where narrower; where wider the source's sign decides."""
    c.define(i, f"{c.uses(i, TYPES[m[2]])[0]}.astype({TYPES[m[1]]})", TYPES[m[1]])


@form(r"createpolicy\.fractional\.L2::evict_(?:first|last|normal|unchanged)\.b64", 2)
def cache_policy(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    """A hint for later accesses; what it holds is nobody's business."""
    c.define(i, "U8(0)", "U8")


EVERY_LANE = ("-1", "0xffffffff", "4294967295")


@form(r"shfl\.sync\.(up|down|bfly|idx)\.b32", 5)
def shuffle(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    if "|" in i.operands[0] or i.operands[4] not in EVERY_LANE or not i.operands[3].isdigit():
        raise Unsupported("a predicate, a part of the warp, or a clamp that is no constant")
    value, lane = c.use(i.operands[1], "U4"), c.use(i.operands[2], "U4")
    c.define(i, f"S.shuffle({m[1]!r}, {value}, {lane}, {i.operands[3]}, m, {i.number})", "U4")


@form(r"redux\.sync\.(min|max|add)\.(s32|u32)", 3)
@form(r"redux\.sync\.(and|or|xor)\.(b32)", 3)
@form(r"redux\.sync\.(min|max)(?:\.NaN)?\.(f32)", 3)
def reduce_warp(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    kind = TYPES[m[2]]
    value, members = c.use(i.operands[1], kind), c.use(i.operands[2], "U4")
    how = m[1] if m[2] != "f32" else f"{m[1]}{'.NaN' if '.NaN' in i.opcode else ''}.f32"
    c.define(i, f"S.reduce_warp({how!r}, {value}, {members}, m, {i.number})", kind)


@form(r"bar\.warp\.sync", 1)
def warp_barrier(c: BlockCode, i: Instruction, m: re.Match[str]) -> None:
    if i.operands[0] not in EVERY_LANE or i.guard:
        raise Unsupported("a part of the warp")
    c.out.append(f"S.warp_barrier(m, {i.number})")
