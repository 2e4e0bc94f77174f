"""`deft_loss` in the two signatures with which transformers calls a loss over logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ...core.keywords import showing
from ...core.statistics import RowLoss
from ...functional import deft_loss
from ...objectives import Objective
from .checks import check_caller
from .columns import AMONG_PIECES, Columns, checked_columns
from .proof import Calls
from .running import RunningStatistics
from .settings import LogitsKeywords, checked, counted, denominator, described, recorder
from .watch import Watch


class OfLogits:
    """`deft_loss` on a model's logits; what is common to the two signatures."""

    @showing(LogitsKeywords)
    def __init__(
        self,
        objective: str | Objective | RowLoss = "deft",
        *,
        statistics: RunningStatistics | None = None,
        columns: Columns | None = None,
        shift: bool = True,
        **keywords: Unpack[LogitsKeywords],
    ):
        self.objective = described(objective)
        self.statistics = recorder(statistics)
        self.columns = checked_columns(columns, self.statistics)
        self.calls = Calls() if self.statistics is None else self.statistics.calls
        if not isinstance(shift, bool):
            raise TypeError(f"shift: expected a bool, got {type(shift).__name__}")
        self.shift = shift
        self.keywords = checked(type(self).__name__, LogitsKeywords, keywords)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor,
        shift: bool,
        num_items: Any,
        ignore_index: int,
        token_weight: Tensor | None = None,
    ) -> Tensor:
        labels = labels.to(logits.device)
        settings = {"shift": shift, "ignore_index": ignore_index, "num_items": denominator(num_items, logits)}
        weight = self.keywords.get("weight")
        if weight is not None:
            settings["weight"] = weight.to(logits.device)
        keywords: dict[str, Any] = {"objective": self.objective, **self.keywords, **settings}
        keywords["token_weight"] = token_weight
        channel = None
        if self.columns is not None:
            channel, keywords["token_weight"] = self.columns.of(labels, shift)
        if self.statistics is None:
            loss = deft_loss(logits, labels, **keywords)
        else:
            loss, stats = deft_loss(logits, labels, return_stats=True, **keywords)
            self.statistics.add(stats, counted(labels, shift, ignore_index), channel)
        self.calls.note(loss, own_mean=num_items is None)
        return loss

    def _refuse_columns(self) -> None:
        if self.columns is not None:
            raise ValueError(AMONG_PIECES)


class ComputeLoss(OfLogits):
    """A `Trainer`'s compute_loss_func: `deft_loss` of outputs.logits, shifted, over num_items_in_batch.

    Args:
        objective: as in `deft_loss`.
        statistics: a `RunningStatistics` to add each call's rows to.
        columns: `Columns` of the data set that go with the tokens: channels for the statistics, weights. They
            come to the loss of a trainer that `columns.attach(trainer)` was called for.
        shift: False where logits and labels are aligned already (encoder-decoder models).
        temperature, z_loss, label_smoothing, weight, inplace, grad_in_forward, backend: as in `deft_loss`.
    Called with: outputs (a ModelOutput, mapping or tuple), labels [B, T], num_items_in_batch (None: the mean
        over this batch). It is called in evaluation too, so eval_loss is gated.
    Raises: ValueError, TypeError when there are no logits or labels, and for settings of the trainer that
        calls it which it cannot honour, as `apply` does beforehand.
    """

    def __call__(self, outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
        shifted = check_caller(self, self.shift)
        if isinstance(outputs, Mapping):
            logits = outputs.get("logits")
        else:
            logits = outputs[0] if isinstance(outputs, tuple) else getattr(outputs, "logits", None)
        if logits is None:
            raise ValueError(
                "outputs: hold no logits, so the model made its own loss (Liger's fused flag, or TRL's "
                "loss_type='chunked_nll'): use deft_kernels.integrations.liger.install(), or "
                "deft_kernels.integrations.trl.apply(trainer) with loss_type='nll'"
            )
        if labels is None:
            raise ValueError("labels: None; the dataset or the collator has to give a 'labels' column")
        if getattr(outputs, "aux_loss", None) is not None:
            raise ValueError(
                "output_router_logits: the model adds its router's auxiliary loss only to a loss of its own, "
                "so compute_loss_func would drop it; use set_loss_function(model), or "
                "output_router_logits=False (TRL before 1.15: SFTConfig(router_aux_loss_coef=0.0))"
            )
        if self.shift and getattr(outputs, "encoder_last_hidden_state", None) is not None:
            raise ValueError(
                "shift: this is an encoder-decoder model, whose labels are aligned with its logits; use "
                "ComputeLoss(..., shift=False)"
            )
        if shifted is None or not self.shift:
            return self._loss(logits, labels, self.shift, num_items_in_batch, -100)
        self._refuse_columns()
        return self._loss(logits, shifted, False, num_items_in_batch, -100)


class ForCausalLM(OfLogits):
    """A causal model's `loss_function`; the signature of transformers' own.

    Args: as `ComputeLoss`. Better set by `set_loss_function`, which checks that it is used.
    Called with: logits [B, T, V], labels [B, T], vocab_size, num_items_in_batch, ignore_index, and under
        context parallelism shift_labels, which are aligned already. Other keywords are the attention's.
    """

    watch: Watch | None = None

    def __call__(
        self,
        logits: Tensor,
        labels: Tensor | None,
        vocab_size: int | None = None,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        for name in (*LogitsKeywords.__annotations__, "reduction", "token_weight", "softcap"):
            if name in others:
                raise TypeError(
                    f"{name}: give it to ForCausalLM or set_loss_function, not to the model's call"
                )
        if vocab_size is not None and logits.shape[-1] != vocab_size:
            raise ValueError(
                f"vocab_size: is {vocab_size!s:.20}, the logits have shape {tuple(logits.shape)}"
            )
        if shift_labels is not None:
            self._refuse_columns()
        target = labels if shift_labels is None else shift_labels
        if target is None:
            raise ValueError("labels: None, and no shift_labels either")
        shift = self.shift and shift_labels is None
        if self.watch is None:
            return self._loss(logits, target, shift, num_items_in_batch, ignore_index)
        with self.watch.unless_it_raises():
            loss = self._loss(logits, target, shift, num_items_in_batch, ignore_index)
        self.watch.seen(loss)
        return loss


compute_loss_func = ComputeLoss()
for_causal_lm = ForCausalLM()
