"""The passes of the PyTorch backend over one block of rows, which fits in cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .formulas import LN2, log2_scale
from .spec import Spec
from .statistics import Field

# Elements in a block: one fp32 buffer of 8 MiB and a quarter of one, or where passes need two whole ones (the
# entropy, soft-capped logits, exact gates) two of 4 MiB. Ratios to F.cross_entropy for 2^19 to 2^21 are in
# docs/cpu.md: larger blocks spread the cost of the row arithmetic, smaller ones sit in a nearer cache.
BLOCK_ELEMENTS = 2**21
SQUARES_PARTS = 4
# Offsets beyond are rounded by more than 2^x can bear, see `kernels.device`.
LARGEST_OFFSET = 2.0**28


def accumulation_dtype(logits: Tensor) -> torch.dtype:
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """(largest [R], its column [R, 1]) of each row, one of them where several are equal.

    By the maxima of 16 stretches, then inside one of them: PyTorch's max with an index reads a row twenty
    times as slowly as amax does (0.86 against 0.04 ns an element).
    """
    width = z.shape[1] // 16
    if width < 64:
        peak, index = z.max(dim=1)
        return peak, index.unsqueeze(1)
    folded = z[:, : 16 * width].unflatten(1, (16, width))
    peak, stretch = torch.cat([folded.amax(2), z[:, 16 * width :]], dim=1).max(dim=1)
    inside = stretch.clamp(max=15)
    column = folded[torch.arange(len(z), device=z.device), inside].argmax(1) + inside * width
    return peak, torch.where(stretch < 16, column, stretch - 16 + 16 * width).unsqueeze(1)


class Block:
    """Scratch of one call and the per-block passes over the vocabulary."""

    def __init__(self, logits: Tensor, spec: Spec, class_weight: Tensor | None):
        self.spec = spec
        self.dtype = accumulation_dtype(logits)
        self.vocabulary = logits.shape[-1]
        self.device = logits.device
        # k as the buffers hold it, so that every pass uses the same number.
        self.k = log2_scale(spec.temperature, self.dtype)
        self.class_weight = None if class_weight is None else class_weight.to(self.dtype)
        two = spec.needs_entropy or spec.squares or spec.logs or spec.softcap > 0
        two = two or (spec.label_smoothing > 0 and class_weight is not None)
        self.elements = BLOCK_ELEMENTS // 2 if two else BLOCK_ELEMENTS
        self._scratch: dict[str, Tensor] = {}

    def scratch(self, name: str, rows: int) -> Tensor:
        buffer = self._scratch.get(name)
        if buffer is None or buffer.shape[0] < rows:
            buffer = torch.empty(rows, self.vocabulary, dtype=self.dtype, device=self.device)
            self._scratch[name] = buffer
        return buffer[:rows]

    def softcapped(self, z: Tensor, out: Tensor) -> Tensor:
        """z as the loss sees it before the temperature, in the accumulation dtype; may return z itself."""
        cap = self.spec.softcap
        if cap > 0:
            return torch.div(z, cap, out=out).tanh_().mul_(cap)
        if z.dtype != self.dtype:
            return out.copy_(z)
        return z

    def column(self, vector: Tensor) -> Tensor:
        """[rows] as [rows, 1] in the dtype of the passes."""
        return vector.to(self.dtype).unsqueeze(1)

    def exponentials(self, z: Tensor, rows: Tensor, out: Tensor) -> Tensor:
        """e_j = 2^(k z_j - OFFSET) into `out`."""
        torch.add(self.column(-rows[Field.OFFSET]), z, alpha=self.k, out=out)
        return out.exp2_()

    def reduce(self, z: Tensor, labels: Tensor, rows: Tensor, work: Tensor) -> Tensor | None:
        """Statistics of a block into `rows`; leaves e_j in `work`. Returns sum_c w_c z_c if smoothing.

        One element stays out of the sums and is put back at the end: a sum that holds the 1 of a confident
        row has lost the digits of its remainder, which is what that row's loss is made of. It is the target,
        or for the entropy, where a confident row may be confident of another token, the largest.
        """
        spec, k = self.spec, self.k
        z = self.softcapped(z, work)
        # An out-of-range label reaches this point on accelerators only: NaN, as documented.
        known = (labels >= 0) & (labels < self.vocabulary)
        index = labels.where(known, 0).unsqueeze(1)
        target = z.gather(1, index).squeeze(1).where(known, math.nan)
        if spec.needs_entropy:
            peak, index = largest(z)
        else:
            peak = z.amax(-1)
        rows[Field.CORRECT] = target >= peak
        rows[Field.PEAK] = peak
        if spec.peaks:
            rows[Field.TIES] = (z == peak.unsqueeze(1)).sum(-1)
        logit_sum = self.weighted_sum(z) if spec.label_smoothing > 0 else None
        offset = (peak * k).clamp(min=-LARGEST_OFFSET)
        rows[Field.OFFSET] = offset
        x = self.scratch("second", len(z)) if spec.needs_entropy else None
        if x is not None:
            # Masked logits would make 0 * -inf below; 2^-4000 is 0 in any dtype.
            torch.add(-offset.unsqueeze(1), z, alpha=k, out=x).clamp_(min=-4000.0)
            e = torch.exp2(x, out=work)
        else:
            e = self.exponentials(z, rows, work)
        apart = e.gather(1, index)
        e.scatter_(1, index, 0.0)
        rest = e.sum(-1)
        t = None if x is None else x.mul_(e).sum(-1)
        parts = e.split(max(1, len(z) // SQUARES_PARTS))
        u = torch.cat([torch.mul(p, p, out=self.scratch("squares", len(p))).sum(-1) for p in parts])
        e.scatter_(1, index, apart)
        self._record(rows, target, rest.double(), apart.squeeze(1).double(), u, t)
        return logit_sum

    def _record(
        self, rows: Tensor, target: Tensor, rest: Tensor, apart: Tensor, u: Tensor, t: Tensor | None
    ) -> None:
        """Statistics from a block's sums."""
        offset, peak = rows[Field.OFFSET], rows[Field.PEAK]
        # Logits of 2e8 and more: the offset's rounding no longer cancels. NaN, rather than a wrong number.
        rest = rest.masked_fill(offset.abs() >= LARGEST_OFFSET, math.nan)
        s = rest + apart
        x_peak = peak * self.k - offset
        log_sum = torch.where(
            rows[Field.CORRECT] > 0 if t is None else apart > 0.5,
            torch.log1p(rest / apart),
            torch.log(s) - x_peak * LN2,
        )
        rows[Field.SUM] = s
        rows[Field.LOGP] = (target.double() - peak) / self.spec.temperature - log_sum
        rows[Field.LSE] = peak / self.spec.temperature + log_sum
        rows[Field.COLLISION] = (u + apart * apart) / (s * s)
        rows[Field.MAX_PROB] = torch.exp2(x_peak) / s
        if t is not None:
            rows[Field.ENTROPY] = (log_sum - LN2 * (t - x_peak * rest) / s).clamp_(min=0.0)

    def weighted_sum(self, z: Tensor) -> Tensor:
        """sum_c w_c z_c / temperature; a class of weight 0 adds nothing, masked or not."""
        if self.class_weight is None:
            total = z.sum(-1)
        else:
            product = torch.mul(z, self.class_weight, out=self.scratch("second", len(z)))
            total = product.masked_fill_(self.class_weight == 0, 0.0).sum(-1)
        return total / self.spec.temperature

    def write(
        self, z: Tensor, labels: Tensor, rows: Tensor, scale: Tensor, out: Tensor, e: Tensor | None
    ) -> None:
        """Gradient of a block times `scale` [rows] into `out`; `e`: its exponentials, when still at hand."""
        spec = self.spec
        work = out if out.dtype == self.dtype else self.scratch("work", len(z))
        if spec.softcap > 0 and out.data_ptr() == z.data_ptr():
            z = z.clone()
        if e is None:
            capped = self.softcapped(z, work)
            e = self._general(capped, rows, scale, work)
            if spec.softcap > 0:
                # d capped / dz = 1 - tanh^2, and tanh is computed anew: `work` no longer holds it.
                slope = torch.div(z, spec.softcap, out=self.scratch("second", len(z))).tanh_()
                e.mul_(slope.mul_(slope).neg_().add_(1.0))
            if out is not e:
                out.copy_(e)
        else:
            # Not mul(out=out): a narrower `out` would make PyTorch allocate the product first.
            e.mul_(self.column(rows[Field.A] * scale))
            if out is not e:
                out.copy_(e)
        target = rows[Field.TARGET] * scale
        index = labels.clamp(0, self.vocabulary - 1).unsqueeze(1)
        if spec.softcap > 0:
            chain = torch.tanh(z.gather(1, index).squeeze(1).to(self.dtype) / spec.softcap)
            target = target * (1.0 - chain * chain)
        # Not scatter_: in bf16 it converts the whole of `out` to fp32 and back (200 against 7 us a block).
        out.index_put_((torch.arange(len(out), device=out.device), index.squeeze(1)), target.to(out.dtype))
        kept = rows[Field.KEPT] != 0
        if out.device.type != "cpu" or not kept.all():
            out.masked_fill_(~kept.unsqueeze(1), 0.0)

    def _general(self, z: Tensor, rows: Tensor, scale: Tensor, work: Tensor) -> Tensor:
        """e_j (A + B e_j + C x_j) + PEAK_GRAD [z_j is the max] - smoothing, times `scale`."""
        spec = self.spec
        a, b, c = (self.column(rows[field] * scale) for field in (Field.A, Field.B, Field.C))
        peaks = None
        if spec.peaks:
            peaks = z == self.column(rows[Field.PEAK])
        second = self.scratch("second", len(z)) if spec.squares or spec.logs else None
        if spec.logs:
            assert second is not None
            torch.add(self.column(-rows[Field.OFFSET]), z, alpha=self.k, out=second).clamp_(min=-4000.0)
            e = torch.exp2(second, out=work)
            factor = second.mul_(c).add_(a)
            if spec.squares:
                factor.addcmul_(e, b)
            e.mul_(factor)
        else:
            e = self.exponentials(z, rows, work)
            e.mul_(a if second is None else torch.mul(e, b, out=second).add_(a))
        if peaks is not None:
            e.add_(peaks * self.column(rows[Field.PEAK_GRAD] * scale))
        if spec.label_smoothing > 0:
            share = self.column(scale * (spec.label_smoothing / self.vocabulary / spec.temperature))
            e.sub_(share if self.class_weight is None else share * self.class_weight)
        return e
