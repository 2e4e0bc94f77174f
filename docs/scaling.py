"""Bytes, floating-point operations and messages of a loss over many GPUs: the tables of docs/scaling.md.

    python docs/scaling.py                 # the tables
    python docs/scaling.py --network 100   # with another link rate, in GB/s

A calculation, not a measurement: nothing here runs on a GPU. Every figure says where it comes from.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass

# The job: a head of the size of Gemma 3 27B's, bf16, and a million tokens a step.
V, D, N = 262_144, 5_376, 2**20
BUDGET = 2**30  # bytes of logits in a chunk, the linear call's default on GPUs

# Reported for one H200, not by us: the three bf16 products of 4096 x 4096 x 128,256 in 16.4 ms; a copy; lanes
# times clock.
MATRIX_RATE = 6 * 4096 * 4096 * 128_256 / 16.4e-3
MEMORY_RATE = 4.3e12
INSTRUCTION_RATE = 33e12
# Counted in this repository's kernels, compiled for sm_90 (README): instructions a bf16 logit.
STATISTICS_INSTRUCTIONS, GRADIENT_INSTRUCTIONS = 6.6, 5.4


@dataclass(frozen=True)
class Links:
    """Assumed, not measured: effective bytes a second of a GPU in a collective, and seconds a message."""

    node: float = 300e9  # NVLink of an eight-GPU node, two thirds of 450 GB/s a direction
    network: float = 40e9  # one 400 Gb/s adapter a GPU, four fifths of it
    node_latency: float = 15e-6
    network_latency: float = 40e-6
    node_size: int = 8

    def of(self, ranks: int) -> tuple[float, float]:
        """(rate, latency) of a group; tensor ranks are neighbours, so a small group stays in a node."""
        if ranks <= self.node_size:
            return self.node, self.node_latency
        return self.network, self.network_latency


@dataclass(frozen=True)
class Layout:
    """tensor ranks share a head; data and context ranks, which are the same to the head, have their own
    rows."""

    tensor: int
    data: int
    context: int

    @property
    def gpus(self) -> int:
        return self.tensor * self.data * self.context

    @property
    def copies(self) -> int:
        return self.data * self.context


@dataclass(frozen=True)
class Step:
    """Of one GPU, in seconds and bytes; messages as (count, bytes that the GPU sends in all)."""

    products: float
    kernels: float
    accumulation: float
    states: tuple[int, float, float]
    hidden: tuple[int, float, float]
    weight: tuple[int, float, float]
    memory: float

    @property
    def compute(self) -> float:
        return self.products + self.kernels + self.accumulation


def step(layout: Layout, links: Links) -> Step:
    rows, columns = N / layout.copies, V / layout.tensor
    logits = rows * columns
    statistics = max(2 * logits / MEMORY_RATE, STATISTICS_INSTRUCTIONS * logits / INSTRUCTION_RATE)
    gradient = max(4 * logits / MEMORY_RATE, GRADIENT_INSTRUCTIONS * logits / INSTRUCTION_RATE)
    chunks = -(-int(2 * logits) // BUDGET)
    # Each chunk but the first reads and writes the fp32 sum of dW.
    accumulation = (8 * (chunks - 1) + 4) * columns * D / MEMORY_RATE
    # The head, its gradient and fp32 sum; hidden, its gradient and, where the head is split, fp32 sum.
    memory = columns * D * (2 + 2 + 4 * (chunks > 1)) + rows * D * (2 + 2 + 4 * (layout.tensor > 1))
    memory += rows * 19 * 4 + BUDGET
    return Step(
        products=6 * logits * D / MATRIX_RATE,
        kernels=statistics + gradient,
        accumulation=accumulation,
        # An all-gather: every rank's part passes every other rank.
        states=_message(chunks, (layout.tensor - 1) * 20 * rows, layout.tensor, links, False),
        # An all-reduce sends its bytes twice, without the rank's own part.
        hidden=_message(1, 2 * 4 * rows * D, layout.tensor, links, True),
        weight=_message(1, 2 * 2 * columns * D, layout.copies, links, True, layout.tensor),
        memory=memory,
    )


def _message(
    count: int, size: float, ranks: int, links: Links, reduced: bool, apart: int = 1
) -> tuple[int, float, float]:
    """(messages, bytes, seconds); `apart`: GPUs between neighbours of the group."""
    if ranks == 1:
        return 0, 0.0, 0.0
    rate, latency = links.of(ranks * apart)
    sent = size * (ranks - 1) / ranks if reduced else size
    return count, sent, count * latency + sent / rate


LAYOUTS = (
    Layout(1, 1, 1),
    Layout(8, 1, 1),
    Layout(1, 8, 1),
    Layout(8, 8, 1),
    Layout(1, 64, 1),
    Layout(64, 1, 1),
    Layout(8, 8, 4),
    Layout(1, 256, 1),
    Layout(8, 16, 8),
    Layout(16, 8, 8),
    Layout(1, 1024, 1),
)


def _bytes(number: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}"
    return f"{number:.0f} B"


def _milliseconds(seconds: float) -> str:
    number = 1e3 * seconds
    return f"{number:,.0f} ms" if number >= 100 else f"{number:.2g} ms"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def _sent(message: tuple[int, float, float], total: float) -> str:
    count, size, seconds = message
    return f"{count} x {_bytes(size / count)}, {_percent(seconds / total)}" if count else "-"


def tables(links: Links) -> Iterator[str]:
    yield "| GPUs | tensor x data x context | memory | products | kernels | sum of dW |"
    yield "|---|---|---|---|---|---|"
    for layout in LAYOUTS:
        s = step(layout, links)
        place = f"{layout.tensor} x {layout.data} x {layout.context}"
        times = " | ".join(_milliseconds(t) for t in (s.products, s.kernels, s.accumulation))
        yield f"| {layout.gpus} | {place} | {s.memory / 2**30:.1f} GiB | {times} |"
    yield ""
    yield "| tensor x data x context | states, forward | dhidden | dW |"
    yield "|---|---|---|---|"
    for layout in LAYOUTS:
        s = step(layout, links)
        place = f"{layout.tensor} x {layout.data} x {layout.context}"
        sent = " | ".join(_sent(m, s.compute) for m in (s.states, s.hidden, s.weight))
        yield f"| {place} | {sent} |"


def bounds(links: Links) -> Iterator[str]:
    """Where a message takes as long as the products it belongs to, from the same formulas."""
    for name, rate in (("node", links.node), ("network", links.network)):
        hidden = 1 + 6 * V * rate / (8 * MATRIX_RATE)
        yield f"dhidden, {name}: {hidden:.0f} tensor ranks"
    rows = 4 * MATRIX_RATE / (6 * links.network)
    yield f"dW, network: {rows:.0f} rows a GPU, {N / rows:.0f} data and context ranks of {N} rows"
    states = links.network_latency * MATRIX_RATE / (6 * D)
    yield f"states, network latency: chunks of {states:.3g} logits a GPU, {_bytes(2 * states)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--node", type=float, default=Links.node / 1e9, help="GB/s a GPU in a node")
    parser.add_argument("--network", type=float, default=Links.network / 1e9, help="GB/s a GPU between nodes")
    given = parser.parse_args()
    links = Links(node=given.node * 1e9, network=given.network * 1e9)
    print("\n".join(tables(links)), "\n")
    print("\n".join(bounds(links)))


if __name__ == "__main__":
    main()
