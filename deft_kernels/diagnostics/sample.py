"""A uniform sample of single tokens, of fixed size, the same tokens in another recording of them."""

from __future__ import annotations

import torch
from torch import Tensor

# Beyond every key: of rows that do not count, and of places not yet taken.
LAST = 2**63 - 1
# What is kept of a token.
INTEGERS = ("id", "step", "channel", "label")
NUMBERS = ("logp", "entropy", "alpha", "max_prob", "gate")


def _signed(value: int) -> int:
    value &= 2**64 - 1
    return value - 2**64 if value >= 2**63 else value


def keys(ids: Tensor, seed: int) -> Tensor:
    """A number in [0, 2^63) for each id, by SplitMix64: the tokens with the smallest are the sample.

    A function of the token and the seed alone: no state, so that ranks and later recordings agree on it.
    Source: doi:10.1145/2714064.2660195.
    """
    z = ids + _signed(seed * 0x9E3779B97F4A7C15 + 0x9E3779B97F4A7C15)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z = (z ^ _shifted(z, shift)) * _signed(factor)
    return (z ^ _shifted(z, 31)) & LAST


def _shifted(z: Tensor, bits: int) -> Tensor:
    """A right shift that fills with zeros; torch's own repeats the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


class Sample:
    """The `size` tokens with the smallest keys of all that were added. Nothing here waits for the device."""

    def __init__(self, size: int, seed: int, dtype: torch.dtype, device: torch.device):
        self.seed = seed
        self.keys = torch.full((size,), LAST, dtype=torch.int64, device=device)
        self.integers = torch.full((size, len(INTEGERS)), -1, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(size, len(NUMBERS), dtype=dtype, device=device)

    def add(self, integers: Tensor, numbers: Tensor, counts: Tensor) -> None:
        """integers: [N, 4], the id first; numbers: [N, 5]; counts: [N], bool."""
        new = torch.where(counts, keys(integers[:, 0], self.seed), LAST)
        self._keep(
            torch.cat([self.keys, new]),
            torch.cat([self.integers, integers]),
            torch.cat([self.numbers, numbers.to(self.numbers.dtype)]),
        )

    def _keep(self, keys: Tensor, integers: Tensor, numbers: Tensor) -> None:
        self.keys, chosen = keys.topk(len(self.keys), largest=False, sorted=True)
        self.integers, self.numbers = integers[chosen], numbers[chosen]

    def gathered(self, group: object) -> Sample:
        """The sample of all ranks' tokens. A collective."""
        whole = Sample(len(self.keys), self.seed, self.numbers.dtype, self.keys.device)
        parts = []
        for own in (self.keys, self.integers, self.numbers):
            received = [torch.empty_like(own) for _ in range(torch.distributed.get_world_size(group))]  # type: ignore[arg-type]
            torch.distributed.all_gather(received, own.contiguous(), group=group)  # type: ignore[arg-type]
            parts.append(torch.cat(received))
        whole._keep(*parts)
        return whole
