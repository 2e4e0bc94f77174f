"""One call of the loss as plain numbers: what a strategy draws, a failure prints, an example keeps."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deft_kernels import objectives
from deft_kernels.objectives import Objective

# What a row may look like. The last three make a row NaN, or its loss infinite for some objectives.
KINDS = (
    "plain", "peaked", "uniform", "confident", "certain", "conflict", "shifted", "lowered", "masked", "wild",
    "impossible", "void", "nan",
)  # fmt: skip
LAYOUTS = ("contiguous", "padded", "unaligned", "every other", "swapped", "short", "transposed", "expanded")
# Layouts in which a vocabulary is contiguous and every logit has storage of its own, as inplace=True asks.
WRITABLE = LAYOUTS[:6]


@dataclass(frozen=True, repr=False)
class Case:
    """shape: of the labels.  kinds: of the rows, in turns.  block: rows of a block, or columns of a tile / 8.

    ignored: share of the rows.  token_weight, class_weight: None, or what they look like.
    alpha: None; or the tensor that `tsallis` has in the place of `objective`, whose band it takes over: one
    "number", or one for each of the "rows".  anchor: 0 without a reference model.
    upstream: of a scalar loss; times a random vector with reduction="none".
    """

    shape: tuple[int, ...] = (3,)
    vocabulary: int = 7
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    kinds: tuple[str, ...] = ("plain",)
    seed: int = 0
    objective: Objective = objectives.deft()  # noqa: RUF009  # frozen
    reduction: str = "none"
    ignored: float = 0.0
    ignore_index: int = -100
    label_dtype: torch.dtype = torch.int64
    token_weight: str | None = None
    class_weight: str | None = None
    num_items: float | None = None
    tensor_items: bool = False
    shift: bool = False
    softcap: float | None = None
    temperature: float = 1.0
    z_loss: float = 0.0
    label_smoothing: float = 0.0
    alpha: str | None = None
    anchor: float = 0.0
    inplace: bool = False
    grad_in_forward: bool | None = None
    upstream: float = 1.0
    block: int = 1

    def __repr__(self) -> str:
        """What differs from the defaults, as an example would be written."""
        given = ((field.name, getattr(self, field.name), field.default) for field in fields(self))
        return (
            f"Case({', '.join(f'{name}={written(value)}' for name, value, usual in given if value != usual)})"
        )

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(repr(self))

    @property
    def rows(self) -> int:
        return torch.Size(self.shape).numel()

    @property
    def plain(self) -> bool:
        """Whether the bounds of `rows` alone apply: no option that adds a rounding of its own."""
        return self.softcap is None and self.label_smoothing == self.z_loss == self.anchor == 0.0


def written(value: object) -> str:
    if not isinstance(value, Objective):
        return repr(value)
    given = ((field.name, getattr(value, field.name), field.default) for field in fields(value))
    return f"Objective({', '.join(f'{name}={it!r}' for name, it, usual in given if it != usual)})"


class Tensors(NamedTuple):
    """A case's tensors; the logits are a view of `storage`, everywhere but where `outside` is True."""

    logits: Tensor
    labels: Tensor
    targets: Tensor  # [N], the label each row is scored against, ignore_index where it is none
    token_weight: Tensor | None
    class_weight: Tensor | None
    alpha: Tensor | None
    reference_logp: Tensor | None
    upstream: Tensor
    storage: Tensor
    outside: Tensor


def tensors(case: Case) -> Tensors:
    generator = torch.Generator().manual_seed(case.seed)
    ignored = torch.rand(case.shape, generator=generator) < case.ignored
    labels = torch.randint(0, case.vocabulary, case.shape, generator=generator)
    labels = labels.masked_fill(ignored, case.ignore_index)
    targets = labels
    if case.shift:
        last = labels.new_full((*case.shape[:-1], 1), case.ignore_index)
        targets = torch.cat([labels[..., 1:], last], dim=-1) if case.shape[-1] else labels
    targets = targets.reshape(-1)
    z = torch.randn(case.rows, case.vocabulary, generator=generator) * 2
    for row, target in enumerate(targets.tolist()):
        known = target if target != case.ignore_index else 0
        z[row] = row_of(case.kinds[row % len(case.kinds)], z[row], known, generator)
        if target == case.ignore_index and row % 2:
            z[row] = torch.tensor([float("nan"), float("inf"), -float("inf")])[row % 3]
    z = z.clamp(-6e4, 6e4).where(z.isfinite(), z) if case.dtype == torch.float16 else z
    z = z.reshape(*case.shape, case.vocabulary).to(case.dtype)
    logits, storage = laid_out(z, case.layout)
    inside, outside = laid_out(torch.zeros_like(z, dtype=torch.bool), case.layout)
    assert not inside.any()
    dtype = torch.float64 if case.dtype == torch.float64 else torch.float32
    upstream = torch.tensor(case.upstream, dtype=dtype)
    if case.reduction == "none":
        upstream = upstream * torch.randn(case.shape, generator=generator).to(dtype)
        upstream[torch.rand(case.shape, generator=generator) < 0.1] = 0.0
    token_weight = weights(case.token_weight, case.shape, generator)
    return Tensors(
        logits,
        labels.to(case.label_dtype),
        targets,
        token_weight,
        weights(case.class_weight, (case.vocabulary,), generator),
        focus(case, targets, generator),
        reference_model(case, logits, targets) if case.anchor > 0 else None,
        upstream,
        storage,
        outside,
    )


def focus(case: Case, targets: Tensor, generator: torch.Generator) -> Tensor | None:
    """alpha, in [0, 4], with 0 and 1 among those of rows, and NaN where a row does not count."""
    if case.alpha is None:
        return None
    if case.alpha == "number":
        return 4 * torch.rand((), generator=generator)
    drawn = 4 * torch.rand(case.rows, generator=generator)
    drawn[::3] = drawn[::3].gt(2).float()
    return drawn.masked_fill(targets == case.ignore_index, torch.nan).reshape(case.shape)


def reference_model(case: Case, logits: Tensor, targets: Tensor) -> Tensor:
    """log p of another model, in turns the same as this one's, near it and far."""
    generator = torch.Generator().manual_seed(case.seed + 3)
    z = logits.double().reshape(case.rows, case.vocabulary)
    z = (z if case.softcap is None else case.softcap * torch.tanh(z / case.softcap)) / case.temperature
    ignored = targets == case.ignore_index
    logp = z.log_softmax(1).gather(1, targets.masked_fill(ignored, 0).unsqueeze(1)).squeeze(1)
    apart = torch.tensor([0.0, 1e-2, 3.0])[torch.arange(case.rows) % 3]
    away = torch.randn(case.rows, generator=generator) * apart
    return (logp + away).float().masked_fill(ignored, torch.nan).reshape(case.shape)


def row_of(kind: str, z: Tensor, target: int, generator: torch.Generator) -> Tensor:
    """A row of a kind from a row z of normal numbers."""
    if kind == "peaked":
        return z * 4
    if kind == "uniform":
        return torch.full_like(z, 0.75)
    if kind in ("shifted", "lowered"):
        return z + (300.0 if kind == "shifted" else -300.0)
    if kind == "wild":
        return z * 1e4
    if kind in ("confident", "certain", "conflict"):
        favourite = target if kind != "conflict" else (target + 1) % len(z)
        lead = 2.0 + 14.0 * torch.rand((), generator=generator) if kind != "certain" else 200.0
        z[favourite] = z.logsumexp(0) + lead
    elif kind == "masked":
        hidden = torch.rand(z.shape, generator=generator) < 0.5
        hidden[target] = False
        z = z.masked_fill(hidden, -torch.inf)
    elif kind == "impossible":
        z[target] = -torch.inf
    elif kind == "void":
        z = torch.full_like(z, -torch.inf)
    elif kind == "nan":
        z[int(torch.randint(0, len(z), (), generator=generator))] = torch.nan
    return z


def laid_out(z: Tensor, layout: str) -> tuple[Tensor, Tensor]:
    """The same logits with other strides, and the storage that holds them, 1 wherever they are not."""
    *leading, vocabulary = z.shape
    first = leading[0] if leading else 1
    if layout == "expanded" and leading and first:
        base = z[:1].clone()
        return base.expand(first, *z.shape[1:]), base
    if layout == "transposed":
        base = z.transpose(0, -1).contiguous()
        return base.transpose(0, -1), base
    if layout == "swapped" and len(leading) > 1:
        base = z.transpose(0, 1).contiguous()
        return base.transpose(0, 1), base
    wider = {"padded": 5, "unaligned": 8}.get(layout, 0)
    shape = [*leading, vocabulary + wider]
    where: list[Any] = [slice(None)] * len(leading) + [slice(0, vocabulary)]
    if layout == "unaligned":
        where[-1] = slice(1, vocabulary + 1)
    elif layout == "every other" and leading:
        shape[0], where[0] = 2 * first, slice(None, None, 2)
    elif layout == "short" and len(leading) > 1:
        shape[-2], where[-2] = leading[-1] + 1, slice(0, leading[-1])
    base = torch.ones(shape, dtype=z.dtype)
    base[tuple(where)] = z
    return base[tuple(where)], base


def weights(look: str | None, shape: tuple[int, ...], generator: torch.Generator) -> Tensor | None:
    """positive; zeros: half of them 0; signed; large: up to e^8."""
    if look is None:
        return None
    drawn = torch.rand(shape, generator=generator) + 0.05
    if look == "zeros":
        drawn = drawn * (torch.rand(shape, generator=generator) < 0.5)
    elif look == "signed":
        drawn = torch.randn(shape, generator=generator)
    elif look == "large":
        drawn = torch.exp(8 * drawn)
    elif look == "bool":
        return drawn > 0.5
    return drawn


def keywords(case: Case, made: Tensors) -> dict[str, Any]:
    """What the oracle and a backend are both given."""
    items, objective = case.num_items, case.objective
    if made.alpha is not None:
        objective = objectives.tsallis(made.alpha).within((objective.low, objective.high))
    return {
        "objective": objective,
        "reduction": case.reduction,
        "ignore_index": case.ignore_index,
        "token_weight": made.token_weight,
        "weight": made.class_weight,
        "num_items": torch.tensor(items) if case.tensor_items and items is not None else items,
        "shift": case.shift,
        "softcap": case.softcap,
        "temperature": case.temperature,
        "z_loss": case.z_loss,
        "label_smoothing": case.label_smoothing,
        "anchor": case.anchor,
        "reference_logp": made.reference_logp,
    }
