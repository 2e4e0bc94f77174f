"""`StatisticsCallback`: plain cross-entropy and the gate, in the logs of a transformers-style trainer."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .checks import refuse_label_smoothing
from .running import RunningStatistics


class StatisticsCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Logs a `RunningStatistics` beside the loss: nll, mean_alpha, mean_gate, mean_entropy, top1.

    A gated loss looks small, because tokens that the model doubts weigh little; `nll` is what to compare with
    other runs. In evaluation, where a route uses the gated loss there, the names are eval_nll and so on. The
    means are over all ranks' tokens since the last log.

    Args: statistics: the object given to the loss.
    Raises: RuntimeError before the first optimizer step when the loss was never called; ValueError for
        label_smoothing_factor, which no route honours.
    """

    def __init__(self, statistics: RunningStatistics):
        self.statistics = statistics

    def add_to(self, trainer: Any) -> None:
        """Add to a trainer ahead of its other callbacks, as those report the logs when their turn comes."""
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        refuse_label_smoothing(args)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        if self.statistics.updates == 0:
            raise RuntimeError(
                "statistics: the gated loss was never called, so the trainer trains another one. The object "
                "given to StatisticsCallback has to be the loss's own, and the loss has to be one that this "
                "trainer calls: deft_kernels.integrations.trl.apply(trainer) for TRL, .liger.install() with "
                "use_liger_kernel=True, .transformers.apply(trainer) otherwise"
            )

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        logs = {} if logs is None else logs
        if "train_runtime" in logs:  # the summary at the end, of no interval
            return
        if "loss" in logs:
            means = self.statistics.means(device=args.device)
        else:
            prefix = next((name[: -len("loss")] for name in logs if name.endswith("_loss")), None)
            if prefix is None:
                return
            means = self.statistics.means(training=False, device=args.device)
            means = {prefix + name: value for name, value in means.items()}
        logs.update(means)
        if state.log_history:
            state.log_history[-1].update(means)  # a copy of the logs, made before the callbacks' turn
