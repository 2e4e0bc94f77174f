"""A few lines of PTX as a kernel of one warp, without Triton: what the tests of the emulator itself run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from ptx.codegen import Kernel
from ptx.machine import Launch, Settings
from ptx.reports import Reports

HEAD = """
.version 8.7
.target sm_100a
.visible .entry snippet({parameters})
.reqntid {threads}
{{
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<30>; .reg .b64 %rd<30>;
{registers}
.loc 1 7 1 // snippet.py:7:1
{body}
ret;
}}
"""


@dataclass
class Buffer:
    """A NumPy array as the emulator sees a tensor."""

    array: np.ndarray[Any, Any]

    def data_ptr(self) -> int:
        return self.array.ctypes.data

    def element_size(self) -> int:
        return self.array.itemsize

    def numel(self) -> int:
        return self.array.size

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.array.itemsize for s in self.array.strides)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape


def run(
    body: str, arrays: list[Any], threads: int = 32, ctas: int = 1, shared: int = 0,
    settings: Settings | None = None, registers: str = "",
) -> Reports:  # fmt: skip
    """Run `body` on arrays, whose addresses it finds in %rd1, %rd2, ... and the thread's number in %r1."""
    names = [f"snippet_param_{n}" for n in range(len(arrays))]
    loads = "\n".join(f"ld.param.b64 %rd{n + 1}, [{name}];" for n, name in enumerate(names))
    text = HEAD.format(
        parameters=",\n".join(f".param .u64 .ptr .global .align 1 {name}" for name in names),
        threads=threads, registers=registers, body=f"mov.u32 %r1, %tid.x;\n{loads}\n{body}",
    )  # fmt: skip
    reports = Reports()
    addresses = [np.uint64(a.ctypes.data) for a in arrays]
    buffers = {n: Buffer(a) for n, a in enumerate(arrays)}
    Launch(Kernel(text), (ctas, 1, 1), shared, addresses, buffers, reports, settings or Settings()).run()
    return reports


def compute(
    instructions: str, *inputs: Any, result: Any = np.uint32, noise: str = "exact", seed: int = 0
) -> Any:
    """%d from %a, %b, %c, which hold the inputs (of 2, 4 or 8 bytes, up to 32 of them), one a thread."""
    inputs = tuple(np.atleast_1d(x) for x in inputs)
    count = max(len(x) for x in inputs)
    arrays = [np.ascontiguousarray(np.resize(x, 32)) for x in inputs]
    out = np.zeros(32, result)
    lines = []
    for n, (name, array) in enumerate(zip("abc", arrays, strict=False)):
        lines.append(f"mad.wide.u32 %rd{10 + n}, %r1, {array.itemsize}, %rd{n + 1};")
        lines.append(f"ld.global.b{8 * array.itemsize} %{name}, [%rd{10 + n}];")
    lines.append(instructions)
    lines.append(f"mad.wide.u32 %rd20, %r1, {out.itemsize}, %rd{len(arrays) + 1};")
    lines.append(f"st.global.b{8 * out.itemsize} [%rd20], %d;")
    registers = " ".join(
        f".reg .b{8 * array.itemsize} %{name};"
        for name, array in [*zip("abc", arrays, strict=False), ("d", out)]
    )
    reports = run(
        "\n".join(lines), [*arrays, out], settings=Settings(noise=noise, seed=seed), registers=registers
    )
    assert not reports.found
    return out[:count]
