"""A recording of saved logits, or hidden states and a head, in blocks of rows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..core.inputs import aligned
from ..functional import row_statistics
from ..linear import fused_linear_row_statistics
from .recorder import Recorder
from .stored import Stored

# Bytes of logits in fp32 in one block: small beside any machine's memory, large beside the cost of a call.
BLOCK_BYTES = 2**26


@dataclass(frozen=True)
class Rows:
    """What saved tensors hold, checked: labels [N] and either logits or hidden states with a head."""

    source: Stored
    labels: Tensor
    labels_in: Stored
    ignore_index: int
    head: Tensor | None = None
    bias: Tensor | None = None

    @classmethod
    def of(cls, found: dict[str, Stored], *, ignore_index: int = -100, shift: bool = False) -> Rows:
        """Raises: ValueError naming the file and the field."""
        if "labels" not in found:
            raise ValueError("labels: no file has a tensor of this name; --tensor labels=NAME says another")
        if ("logits" in found) == ("hidden" in found):
            have = "both" if "logits" in found else "neither"
            raise ValueError(f"logits, hidden: {have} found; expected logits, or hidden and weight")
        source, labels = found.get("logits") or found["hidden"], found["labels"]
        for tensor in (source, *(found[n] for n in ("weight", "bias") if n in found)):
            if not tensor.dtype.is_floating_point:
                raise ValueError(f"{tensor}: holds {tensor.dtype}, expected floating-point numbers")
        if labels.dtype.is_floating_point:
            raise ValueError(f"{labels}: holds {labels.dtype}, expected integers")
        if len(source.shape) < 2 or labels.shape != source.shape[:-1]:
            raise ValueError(
                f"{labels}: has shape {labels.shape}, expected that of {source} without the last dimension, "
                f"{source.shape[:-1]}"
            )
        head = bias = None
        if "hidden" in found:
            head, bias = _head(found, source)
        vocabulary = source.shape[-1] if head is None else head.shape[0]
        if vocabulary == 0:
            raise ValueError(f"{source}: the vocabulary (last dimension) is empty")
        flat = labels.whole().long()
        wrong = ((flat < 0) | (flat >= vocabulary)) & (flat != ignore_index)
        if bool(wrong.any()):
            place = int(wrong.reshape(-1).nonzero()[0])
            raise ValueError(
                f"{labels}: {int(flat.reshape(-1)[place])} at flat position {place} is outside [0, "
                f"{vocabulary}) and is not the ignored one, {ignore_index}"
            )
        return cls(source, aligned(flat, shift, ignore_index), labels, ignore_index, head, bias)

    @property
    def vocabulary(self) -> int:
        return self.source.shape[-1] if self.head is None else self.head.shape[0]

    def recorded(self, recorder: Recorder, device: torch.device, **transform: Any) -> Iterator[int]:
        """Add all rows, block by block; yields how many rows each block had.

        transform: temperature, softcap, and with a head logit_scale, as in `row_statistics`.
        Raises: ValueError naming the file, the field and the row where a row that counts holds a NaN.
        """
        block = max(1, BLOCK_BYTES // (4 * max(self.vocabulary, self.source.shape[-1])))
        head, bias = (None if t is None else t.to(device) for t in (self.head, self.bias))
        for begin in range(0, self.source.rows, block):
            end = min(begin + block, self.source.rows)
            rows, labels = self.source.read(begin, end).to(device), self.labels[begin:end].to(device)
            with torch.no_grad():
                if head is None:
                    stats = row_statistics(rows, labels, ignore_index=self.ignore_index, **transform)
                else:
                    keywords = {"ignore_index": self.ignore_index, **transform}
                    stats = fused_linear_row_statistics(rows, head, labels, bias, **keywords)
            bad = (stats.logp.isnan() | stats.entropy.isnan()) & (labels != self.ignore_index)
            if bool(bad.any()):
                row = begin + int(bad.nonzero()[0])
                raise ValueError(f"{self.source}: row {row} (of all but the last dimension) gives a NaN")
            recorder.add(stats, labels)
            yield end - begin


def _head(found: dict[str, Stored], hidden: Stored) -> tuple[Tensor, Tensor | None]:
    if "weight" not in found:
        raise ValueError(f"{hidden}: needs a head; no file has a tensor called weight (--tensor weight=NAME)")
    weight, bias = found["weight"], found.get("bias")
    if len(weight.shape) != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight}: has shape {weight.shape}, expected [V, {hidden.shape[-1]}] as {hidden} has"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"{bias}: has shape {bias.shape}, expected {weight.shape[:1]}")
    for tensor in (weight, bias):
        if tensor is not None and tensor.dtype != hidden.dtype:
            raise ValueError(f"{tensor}: holds {tensor.dtype}, {hidden} holds {hidden.dtype}; make them one")
    return weight.whole(), None if bias is None else bias.whole()
