"""Callbacks of a transformers-style trainer: proof that it trains the gated loss, and what to log of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback

from ..core.arguments import path as path_of
from ..core.statistics import RowStatistics
from ..diagnostics import Recorder
from ._shared.checks import refuse_dividing_twice, refuse_label_smoothing, refuse_means_of_means
from ._shared.proof import Calls
from ._shared.running import RunningStatistics

# Of a Recorder that was given none.
WITHOUT_CHANNELS = ("all",)


class ProofCallback(TrainerCallback):  # type: ignore[misc]  # transformers is untyped for mypy
    """Raises before each optimizer step for which the gated loss was not called, or not as it has to be.

    Args: calls: the loss's own.
    Raises: RuntimeError when the loss was not called since the last step, or when it was called without the
        step's number of items though the step has several batches, which would train a mean of their means;
        ValueError for label_smoothing_factor, which no route honours, and for several ranks without
        average_tokens_across_devices.
    """

    def __init__(self, calls: Calls):
        if not isinstance(calls, Calls):
            raise TypeError(f"calls: expected a loss's calls, got {type(calls).__name__}")
        self.calls = calls

    def add_to(self, trainer: Any) -> None:
        """Add to a trainer before its other callbacks, which report the logs.

        Raises: ValueError for a version of transformers that divides accumulated gradients twice.
        """
        refuse_dividing_twice(trainer)
        for other in trainer.callback_handler.callbacks:
            if isinstance(other, ProofCallback) and other.calls is self.calls:
                raise ValueError("statistics: the trainer has a callback for it already, as apply adds one")
        trainer.add_callback(self)
        callbacks = trainer.callback_handler.callbacks
        callbacks.remove(self)
        callbacks.insert(0, self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        refuse_label_smoothing(args)
        refuse_means_of_means(args)
        self.calls.look()  # of a forward before training, or an earlier training

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        called, own_mean = self.calls.look()
        if not called:
            raise RuntimeError(
                "statistics: the gated loss was never called in this step, so the trainer trains another. "
                "The object given to StatisticsCallback has to be the loss's own, and the loss has to be "
                "one that this trainer calls: deft_kernels.integrations.trl.apply(trainer) for TRL, "
                ".liger.install() with use_liger_kernel=True, .transformers.apply(trainer) otherwise. A "
                "compute_loss of your own has to come to Trainer.compute_loss"
            )
        if own_mean and args.gradient_accumulation_steps * args.world_size > 1:
            raise RuntimeError(
                "num_items_in_batch: the trainer did not pass it on to the gated loss, so that this step, of "
                f"{args.gradient_accumulation_steps} batches on each of {args.world_size} ranks, would be a "
                "mean of their means, or a sum. A compute_loss of your own has to take num_items_in_batch "
                "and give it to super().compute_loss, or to the model; for a loss that is made inside the "
                "model, set trainer.model_accepts_loss_kwargs = True besides"
            )


class StatisticsCallback(ProofCallback):
    """Logs a `RunningStatistics` beside the loss: nll, mean_alpha, mean_gate, mean_entropy, top1.

    A gated loss looks small, because tokens that the model doubts have a small weight: compare runs by `nll`.
    If evaluation uses the gated loss, its names are eval_nll and so on. Statistics with channels are logged
    for each of them too: nll/code. The means are over all ranks' tokens since the last log.

    Args: statistics: the object given to the loss.
    Raises: as `ProofCallback`.
    """

    def __init__(self, statistics: RunningStatistics):
        if not isinstance(statistics, RunningStatistics):
            raise TypeError(f"statistics: expected a RunningStatistics, got {type(statistics).__name__}")
        super().__init__(statistics.calls)
        self.statistics = statistics

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        super().on_train_begin(args, state, control, **others)
        self.statistics.forget(training=True)

    def on_predict(self, args: Any, state: Any, control: Any, metrics: Any, **others: Any) -> None:
        self.statistics.forget(training=False)  # predict() logs nothing

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        logs = {} if logs is None else logs
        if "train_loss" in logs:  # the summary at the end, of no interval
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


class RecordingCallback(TrainerCallback):  # type: ignore[misc]
    """Gives the loss's statistics to a recorder, and saves it with each checkpoint and at the end.

        statistics = apply(trainer)
        trainer.add_callback(RecordingCallback(statistics, Recorder(), "run.npz"))

    The file holds all ranks' tokens, of training alone; a step is the trainer's global step. A second train()
    adds to the same recorder. Under torch.compile the graph breaks where the recorder is called.

    Args: statistics: the loss's, as `apply` returns it; recorder: made alike on every rank, with the channels
        of the statistics or with none; path: of the npz, whose folder is made.
    Raises: TypeError for other types; ValueError for other channels, for a path that is a folder, and where
        training is resumed for a path that has what an earlier process recorded; OSError naming the file and
        the field where it cannot be written.
    """

    def __init__(self, statistics: RunningStatistics, recorder: Recorder, path: str | Path):
        if not isinstance(statistics, RunningStatistics):
            raise TypeError(f"statistics: expected a RunningStatistics, got {type(statistics).__name__}")
        if not isinstance(recorder, Recorder):
            raise TypeError(f"recorder: expected a Recorder, got {type(recorder).__name__}")
        self.by_channel = recorder.channels == statistics.channels
        if not self.by_channel and recorder.channels != WITHOUT_CHANNELS:
            raise ValueError(
                f"recorder: its channels are {', '.join(recorder.channels)}, those of the statistics "
                f"{', '.join(statistics.channels) or 'none'}; make both with the same"
            )
        self.statistics, self.recorder, self.path = statistics, recorder, path_of("path", path)
        if self.path.is_dir():
            raise ValueError(f"path: {self.path} is a folder; expected that of an npz")
        self.step = 0
        self._watcher: Any = torch.compiler.disable(self._watch)  # a recorder counts on the host

    def on_train_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        # What cannot be written is said before the first step, not after the last.
        if state.global_step > 0 and self.recorder.calls == 0 and self.path.exists():
            raise ValueError(
                f"path: {self.path} has what was recorded before training was resumed, and would be "
                "overwritten; give another path, or move it"
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._watcher not in self.statistics.watchers:
            self.statistics.watchers.append(self._watcher)

    def on_step_begin(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.step = state.global_step

    def on_save(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
        self.recorder.save(self.path, torch.distributed.group.WORLD if distributed else None)

    def on_train_end(self, args: Any, state: Any, control: Any, **others: Any) -> None:
        self.statistics.watchers.remove(self._watcher)
        self.on_save(args, state, control)

    def _watch(
        self, stats: RowStatistics, valid: Tensor, training: bool, channels: Tensor | None = None
    ) -> None:
        if not training:
            return
        # The mask of shifted labels lacks the last position, which counts for nothing.
        missing = (0, stats.logp.shape[-1] - valid.shape[-1])
        channel: Tensor | int = 0
        if self.by_channel and channels is not None:
            channel = pad(channels.where(valid, 0), missing)
        self.recorder.add(stats, pad(valid, missing), channel=channel, step=self.step)
