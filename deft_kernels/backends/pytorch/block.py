"""The passes of the PyTorch backend over one block of rows, which fits in cache."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core.spec import Spec, log2_scale
from ...core.statistics import Field, Fields, loss_dtype
from .state import LARGEST_OFFSET, bounded, offset_of, statistics_of

# Elements in a block: one fp32 buffer of 8 MiB, or two of 4 MiB where passes need two (the entropy,
# soft-capped logits, exact gates). docs/cpu.md has the ratios to F.cross_entropy for 2^19 to 2^22: larger
# blocks need less row arithmetic, smaller blocks fit a faster cache.
BLOCK_ELEMENTS = 2**21
# Columns whose squares are added one after another.
STRETCH = 1280
# The largest sum e^(z_j - z_y): its square fits fp32, and so does a gate of 2^-50 divided by it and by the
# rows.
LARGEST_SUM = 2.0**50


def largest(z: Tensor) -> tuple[Tensor, Tensor]:
    """(largest [R], its column [R, 1]) of each row, the first one where several are equal.

    Takes the maxima of 16 stretches, then searches in one of them: PyTorch's max with an index takes twenty
    times as long as amax (0.86 against 0.04 ns an element).
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


def squares(e: Tensor) -> Tensor:
    """sum e^2 of each row by stretches: PyTorch's norm takes one pass and no buffer, but adds a whole row in
    sequence, which at V = 128,256 costs three digits."""
    whole = e.shape[1] // STRETCH * STRETCH
    u = torch.linalg.vector_norm(e[:, whole:], dim=1).square_()
    if whole:
        parts = e[:, :whole].unflatten(1, (-1, STRETCH))
        u += torch.linalg.vector_norm(parts, dim=2).square_().sum(1)
    return u


def cap_slope_(x: Tensor) -> Tensor:
    """1 - tanh(x)^2 in place, as 1 / cosh(x)^2: near saturation the difference has lost its digits, in fp32
    all of them from |x| = 9 on. Where cosh overflows, beyond 89, the slope is 0 in fp32."""
    return x.cosh_().reciprocal_().square_()


class Block:
    """Scratch of one call and the per-block passes over the vocabulary."""

    def __init__(self, logits: Tensor, spec: Spec, class_weight: Tensor | None):
        self.spec = spec
        self.dtype = loss_dtype(logits.dtype)
        self.vocabulary = logits.shape[-1]
        self.device = logits.device
        # Whether a row's offset may be its target's logit. Exponents far from 0 are rounded by up to 1e-6,
        # which would show with fp32 and fp64 logits only. On an accelerator the host would have to wait to
        # see whether it worked.
        self.rough = logits.device.type == "cpu" and logits.dtype in (torch.bfloat16, torch.float16)
        # k as the buffers hold it, so that every pass uses the same number.
        self.k = log2_scale(spec.temperature, self.dtype)
        self.class_weight = None if class_weight is None else class_weight.to(self.dtype)
        two = spec.needs_entropy or spec.squares or spec.logs or spec.softcap > 0
        two = two or (spec.label_smoothing > 0 and class_weight is not None)
        self.elements = BLOCK_ELEMENTS // 2 if two else BLOCK_ELEMENTS
        # For the rows of this block, not for the most that a block can have: with short rows that would be a
        # long vector.
        most = min(logits.numel(), self.elements) // max(1, self.vocabulary)
        self.row_numbers = torch.arange(max(1, most), device=self.device)
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
            return self.divided(z, cap, out).tanh_().mul_(cap)
        if z.dtype != self.dtype:
            return out.copy_(z)
        return z

    def divided(self, z: Tensor, cap: float, out: Tensor) -> Tensor:
        """z / cap into `out`. Half-precision logits are converted first: `div(z, cap, out=)` divides in half
        precision and converts the rounded quotient."""
        if z.dtype == self.dtype:
            return torch.div(z, cap, out=out)
        return out.copy_(z).div_(cap)

    def column(self, vector: Tensor) -> Tensor:
        """[rows] as [rows, 1] in the dtype of the passes."""
        return vector.to(self.dtype).unsqueeze(1)

    def exponentials(self, z: Tensor, offset: Tensor, out: Tensor) -> Tensor:
        """e_j = 2^(k z_j - offset [rows, 1]) into `out`."""
        torch.add(-offset, z, alpha=self.k, out=out)
        return out.exp2_()

    def reduce(
        self, z: Tensor, index: Tensor, known: Tensor | None, work: Tensor
    ) -> tuple[Fields, Tensor | None]:
        """(statistics of a block, sum_c w_c z_c if smoothing); leaves e_j in `work`, the target's excepted.

        index: [rows, 1], the target's column.  known: [rows], False where a label is out of range; None where
        there are none.

        The sums leave out one element, which is added at the end: in a confident row it is about 1, and a sum
        with that 1 loses the digits of the rest, of which the row's loss is made.
        """
        if self.rough and known is None and not self.spec.needs_max:
            found = self._about_target(z, index, work)
            if found is not None:
                return found
        return self._about_largest(z, index, known, work)

    def _about_target(self, z: Tensor, index: Tensor, work: Tensor) -> tuple[Fields, Tensor | None] | None:
        """With the target's logit as the offset: -logp = log1p(sum of the others), without a search for the
        largest.

        None if some row's target is too improbable for that, or masked, or NaN: then sums could overflow, or
        the gradient's coefficients underflow.
        """
        z = self.softcapped(z, work)
        target = z.gather(1, index)
        logit_sum = self.weighted_sum(z) if self.spec.label_smoothing > 0 else None
        offset = target * self.k
        e = self.exponentials(z, offset, work)
        e.scatter_(1, index, 0.0)
        sums = torch.stack([target.squeeze(1), offset.squeeze(1), e.sum(-1), squares(e)])
        bounds = sums.abs().amax(1).tolist()
        if not (bounds[1] < LARGEST_OFFSET and bounds[2] < LARGEST_SUM):
            return None
        target, offset, rest, u = sums.double().unbind()
        # Not quite 1: the offset was rounded, k z_y in the passes is not.
        apart = torch.exp2(target * self.k - offset)
        s = rest + apart
        logp = -torch.log1p(rest / apart)
        fields = {Field.OFFSET: offset, Field.SUM: s, Field.LOGP: logp}
        fields[Field.LSE] = target / self.spec.temperature - logp
        fields[Field.COLLISION] = (u + apart * apart) / (s * s)
        return fields, None if logit_sum is None else logit_sum.double()

    def _about_largest(
        self, z: Tensor, index: Tensor, known: Tensor | None, work: Tensor
    ) -> tuple[Fields, Tensor | None]:
        """With the largest logit as the offset. The sums leave out the target; for the entropy they leave out
        the largest, as a confident row may be confident of another token than the target."""
        spec = self.spec
        z = self.softcapped(z, work)
        target = z.gather(1, index).squeeze(1)
        if known is not None:
            target = target.where(known, math.nan)
        if spec.needs_entropy:
            peak, index = largest(z)
        else:
            peak = z.amax(-1)
        fields: Fields = {}
        if spec.peaks:
            fields[Field.TIES] = (z == peak.unsqueeze(1)).sum(-1).double()
        if spec.statistics:
            fields[Field.PREDICTED] = index.squeeze(1).double() + 1.0
        logit_sum = self.weighted_sum(z).double() if spec.label_smoothing > 0 else None
        offset = bounded(offset_of(peak, self.k))
        rest, apart, u, t = self._sums(z, offset, index, work)
        sums = torch.stack([target, peak, offset, rest, apart, u]).double()
        target, peak, offset, rest, apart, u = sums.unbind()
        held = target >= peak if t is None else None
        t = None if t is None else t.double()
        statistics_of(fields, spec.temperature, self.k, target, peak, offset, rest, apart, u, t, held=held)
        return fields, logit_sum

    def _sums(
        self, z: Tensor, offset: Tensor, index: Tensor, work: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """(rest, apart, u, t): s, u and t without the column `index`, whose 2^x is `apart`.

        t only for the entropy, and e_j is then left in `work` with that column in its place.
        """
        t = None
        if self.spec.needs_entropy:
            # Masked logits would make 0 * -inf below; 2^-4000 is 0 in any dtype.
            x = torch.add(-offset.unsqueeze(1), z, alpha=self.k, out=self.scratch("second", len(z)))
            e = torch.exp2(x.clamp_(min=-4000.0), out=work)
        else:
            e = self.exponentials(z, offset.unsqueeze(1), work)
        held = e.gather(1, index)
        e.scatter_(1, index, 0.0)
        rest = e.sum(-1)
        if self.spec.needs_entropy:
            t = x.mul_(e).sum(-1)
        u = squares(e)
        if self.spec.needs_entropy:
            e.scatter_(1, index, held)
        return rest, held.squeeze(1), u, t

    def states(self, z: Tensor, index: Tensor, owned: Tensor, work: Tensor) -> Tensor:
        """States [rows, size] of a block of columns that are a part of the vocabulary, see `states`.

        index: [rows, 1], the target's column; owned: [rows], False where the target is in another part.
        """
        spec = self.spec
        z = self.softcapped(z, work)
        target = z.gather(1, index).squeeze(1).where(owned, -math.inf)
        peak, index = largest(z)
        numbers = []
        if spec.label_smoothing > 0:
            numbers.append(self.weighted_sum(z))
        if spec.peaks:
            numbers.append((z == peak.unsqueeze(1)).sum(-1).to(self.dtype))
        if spec.statistics:
            numbers.append(index.squeeze(1).to(self.dtype) + 1.0)
        rest, _, u, t = self._sums(z, offset_of(peak, self.k), index, work)
        t = torch.zeros_like(u) if t is None else t
        return torch.stack([peak, rest, u, t, target, *numbers], dim=1)

    def weighted_sum(self, z: Tensor) -> Tensor:
        """sum_c w_c z_c / temperature; a class of weight 0 adds nothing, masked or not."""
        if self.class_weight is None:
            total = z.sum(-1)
        else:
            product = torch.mul(z, self.class_weight, out=self.scratch("second", len(z)))
            total = product.masked_fill_(self.class_weight == 0, 0.0).sum(-1)
        return total / self.spec.temperature

    def write(
        self,
        z: Tensor,
        index: Tensor,
        fields: Fields,
        scale: Tensor,
        out: Tensor,
        e: Tensor | None,
        *,
        elsewhere: Tensor | None = None,
    ) -> None:
        """Gradient of a block times `scale` [rows] into `out`; `e`: its exponentials, when still at hand.

        elsewhere: [rows], True where the target is no column of these logits.
        """
        spec = self.spec
        work = out if out.dtype == self.dtype else self.scratch("work", len(z))
        if spec.softcap > 0 and out.data_ptr() == z.data_ptr():
            z = z.clone()
        if e is None:
            e = self._general(self.softcapped(z, work), fields, scale, work)
            if spec.softcap > 0:
                e.mul_(cap_slope_(self.divided(z, spec.softcap, self.scratch("second", len(z)))))
        else:
            # Not mul(out=out): with an `out` of half precision PyTorch would allocate the product first.
            e.mul_(self.column(fields[Field.A] * scale))
        if out is not e:
            out.copy_(e)
        target = fields[Field.TARGET] * scale
        if spec.softcap > 0:
            target = target * cap_slope_(z.gather(1, index).squeeze(1).to(target.dtype) / spec.softcap)
        at = (self.row_numbers[: len(out)], index.squeeze(1))
        target = target.to(out.dtype)
        if elsewhere is not None:
            target = torch.where(elsewhere, out[at], target)
        # Not scatter_: in bf16 it converts the whole of `out` to fp32 and back (200 against 7 us a block).
        out.index_put_(at, target)

    def _general(self, z: Tensor, fields: Fields, scale: Tensor, work: Tensor) -> Tensor:
        """e_j (A + B e_j + C x_j) + PEAK_GRAD [z_j is the max] - smoothing, times `scale`."""
        spec = self.spec

        def scaled(field: Field) -> Tensor:
            return self.column(fields[field] * scale)

        peaks = z == self.column(fields[Field.PEAK]) if spec.peaks else None
        second = self.scratch("second", len(z)) if spec.squares or spec.logs else None
        a = scaled(Field.A)
        if spec.logs:
            assert second is not None
            torch.add(self.column(-fields[Field.OFFSET]), z, alpha=self.k, out=second).clamp_(min=-4000.0)
            e = torch.exp2(second, out=work)
            factor = second.mul_(scaled(Field.C)).add_(a)
            if spec.squares:
                factor.addcmul_(e, scaled(Field.B))
            e.mul_(factor)
        else:
            e = self.exponentials(z, self.column(fields[Field.OFFSET]), work)
            e.mul_(a if second is None else torch.mul(e, scaled(Field.B), out=second).add_(a))
        if peaks is not None:
            e.add_(peaks * scaled(Field.PEAK_GRAD))
        if spec.label_smoothing > 0:
            share = self.column(scale * (spec.label_smoothing / self.vocabulary / spec.temperature))
            e.sub_(share if self.class_weight is None else share * self.class_weight)
        return e
