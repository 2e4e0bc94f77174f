"""ms-swift: a loss type and a callback of its plugins, for causal models."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from ..core.keywords import showing
from ..core.statistics import RowLoss
from ..objectives import Objective
from ._shared.checks import refuse_dividing_twice, refuse_label_smoothing, refuse_means_of_means
from ._shared.logits import OfLogits
from ._shared.running import RunningStatistics
from ._shared.settings import LogitsKeywords


@showing(LogitsKeywords)
def register(
    objective: str | Objective | RowLoss = "deft", *, name: str = "deft", **keywords: Unpack[LogitsKeywords]
) -> RunningStatistics:
    """Make `--loss_type NAME` the gated loss, and `--callbacks NAME` its logs and its checks.

    For a file that `--external_plugins` names, or before `sft_main`. The loss is over the model's logits. The
    numbers of ms-swift's `--loss_scale` weigh the tokens, and leave the denominator as ms-swift does.

    Args: objective, keywords: as in `transformers.ComputeLoss`; name: of the loss and of the callback.
    Returns: the `RunningStatistics` that the callback logs.
    Raises: ValueError for a name that ms-swift has already. When the trainer is made: ValueError for
        enable_dft_loss and label_smoothing_factor, which would be ignored, sequence parallelism, Megatron,
        a task that is no causal language model, and several ranks without average_tokens_across_devices.
    """
    from swift.callbacks import callbacks_map
    from swift.loss import loss_map

    statistics = RunningStatistics()
    loss = _Loss(objective, statistics=statistics, **keywords)
    for taken in (loss_map, callbacks_map):
        if name in taken:
            raise ValueError(f"name: ms-swift has {name!r} already; known: {', '.join(sorted(taken))}")
    loss_map[name] = loss.of_trainer
    callbacks_map[name] = lambda args, trainer: _callback(statistics, trainer)
    return statistics


class _Loss(OfLogits):
    """A compute_loss_func as ms-swift calls it."""

    def of_trainer(self, args: Any, trainer: Any) -> _Loss:
        """As ms-swift makes a loss of its map."""
        if any(parent.__name__ == "BaseMegatronTrainer" for parent in type(trainer).__mro__):
            raise ValueError("loss_type: Megatron's trainer has no logits of the whole vocabulary for it")
        if trainer.task_type != "causal_lm":
            raise ValueError(f"task_type: is {trainer.task_type!r}; the gated loss is for 'causal_lm'")
        if trainer.template.sequence_parallel_size > 1:
            raise ValueError(
                "sequence_parallel_size: ms-swift cuts the sequences, and gives the loss a part of each "
                "without the labels that belong to it; set it to 1"
            )
        if getattr(args, "enable_dft_loss", False):
            raise ValueError(
                'enable_dft_loss: would be ignored beside loss_type; register("dft") is that loss'
            )
        refuse_label_smoothing(args)
        refuse_means_of_means(args)
        return self

    def __call__(
        self,
        outputs: Any,
        labels: Tensor,
        *,
        num_items_in_batch: Any = None,
        loss_scale: Tensor | None = None,
        **others: Any,
    ) -> Tensor:
        # ms-swift has shifted the scale, and not the labels.
        weight = None if loss_scale is None else loss_scale.view(labels.shape)
        return self._loss(outputs.logits, labels, self.shift, num_items_in_batch, -100, weight)


def _callback(statistics: RunningStatistics, trainer: Any) -> Any:
    from .callback import StatisticsCallback

    class Callback(StatisticsCallback):
        def on_init_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            """Before those that report what it adds to the logs."""
            callbacks = trainer.callback_handler.callbacks
            callbacks.remove(self)
            callbacks.insert(0, self)

        def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
            refuse_dividing_twice(trainer)
            super().on_train_begin(args, state, control, **others)

    return Callback(statistics)
