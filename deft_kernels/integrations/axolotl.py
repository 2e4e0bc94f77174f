"""Axolotl: a plugin, so that the gated loss is a few lines of YAML.

plugins: [deft_kernels.integrations.axolotl.DeftPlugin]
trainer_cls: deft_kernels.integrations.axolotl.DeftTrainer
deft_objective: deft
"""

from __future__ import annotations

import math
from typing import Any

from axolotl.core.trainers.base import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from .. import objectives
from ..objectives import Objective
from ._shared.checks import check_trainer
from ._shared.logits import ComputeLoss
from ._shared.patching import calls_of, patch_model
from ._shared.running import RunningStatistics
from .callback import ProofCallback, StatisticsCallback

PREFIX = "deft_"

# Settings of Axolotl that give the model or the trainer another loss, or that would be ignored.
REFUSED = {
    "rl": "preference and reward training have losses of their own; leave the plugin out",
    "reward_model": "reward models have a loss of their own; leave the plugin out",
    "process_reward_model": "reward models have a loss of their own; leave the plugin out",
    "orpo_alpha": "the trainer then makes ORPO's loss; leave it out, or the plugin",
    "use_eaft": "is a loss of its own; the same gate, over the whole vocabulary, is deft_objective: eaft",
    "cut_cross_entropy": "replaces the model's loss; set it to false, and deft_without_logits: true instead",
    "chunked_cross_entropy": "replaces the model's loss; leave it out, deft_without_logits: true saves more",
    "liger_fused_linear_cross_entropy": "makes no logits; set it to false, and deft_without_logits: true",
    "label_smoothing_factor": "the trainer's own smoothing replaces the gated loss or is ignored",
}
# Degrees of parallelism under which a rank has a part of each sequence.
PARALLEL = ("context_parallel_size", "sequence_parallel_degree")


class DeftArgs(BaseModel):  # type: ignore[misc]  # pydantic may be absent where mypy runs
    """The keys that the plugin adds to Axolotl's YAML.

    deft_objective: a name of `deft_kernels.objectives`.  deft_objective_args: its arguments, as alpha of
    tsallis.  deft_without_logits: make the loss from hidden states, by `patch_model`.  deft_log_statistics:
    log plain cross-entropy and the gate beside the loss.
    """

    deft_objective: str = "deft"
    deft_objective_args: dict[str, Any] | None = None
    deft_without_logits: bool = False
    deft_log_statistics: bool = True

    @model_validator(mode="before")  # type: ignore[untyped-decorator]
    @classmethod
    def check_deft(cls, data: Any) -> Any:
        """Of the YAML as it was written, with the keys that Axolotl does not know and would drop."""
        for key in data:
            if str(key).startswith(PREFIX) and key not in DeftArgs.model_fields:
                raise ValueError(f"{key}: unknown; known: {', '.join(DeftArgs.model_fields)}")
        objective_of(data)
        check(data)
        return data


def objective_of(cfg: Any) -> Objective:
    """The objective of a configuration. Raises: ValueError naming the key."""
    name = cfg.get("deft_objective") or "deft"
    given = dict(cfg.get("deft_objective_args") or {})
    known = objectives.resolve(name)  # a clear error for an unknown name
    if not given:
        return known
    try:
        return getattr(objectives, name)(**given)
    except TypeError as error:
        raise ValueError(f"deft_objective_args: {error}") from error


class DeftPlugin(BasePlugin):  # type: ignore[misc]  # Axolotl is untyped for mypy
    """Trains the objective that the YAML names, by compute_loss_func or from hidden states.

    Raises: ValueError before training for settings with which another loss would be trained, see `REFUSED`;
        RuntimeError before an optimizer step for which the gated loss was not called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.statistics = RunningStatistics()

    def get_input_args(self) -> str:
        return f"{__name__}.{DeftArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        check(cfg)
        self.statistics = RunningStatistics()
        if cfg.deft_without_logits:
            statistics = self.statistics if logged(cfg) else None
            try:
                patch_model(model, objective_of(cfg), statistics=statistics)
            except (TypeError, ValueError) as error:
                raise ValueError(f"deft_without_logits: set it to false for this model: {error}") from error

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        check(cfg)
        check_class(trainer)
        # Axolotl sets this to False: each rank would divide by its own tokens, a mean of the ranks' means.
        trainer.args.average_tokens_across_devices = True
        if cfg.deft_without_logits:
            # Axolotl assumes that a forward without an argument num_items_in_batch cannot use it. The patched
            # one divides by it; without it accumulation would be a mean of means.
            trainer.model_accepts_loss_kwargs = True
            calls = calls_of(trainer.model)
        else:
            statistics = self.statistics if logged(cfg) else None
            check_trainer(trainer)
            trainer.compute_loss_func = ComputeLoss(objective_of(cfg), statistics=statistics)
            calls = trainer.compute_loss_func.calls
        (_Statistics(self.statistics) if logged(cfg) else ProofCallback(calls)).add_to(trainer)


class DeftTrainer(AxolotlTrainer):  # type: ignore[misc]
    """Axolotl's trainer, which does not train without the plugin.

    Without the plugin, if it cannot be imported or is missing in the YAML, Axolotl drops its keys without an
    error and trains. But without the class that `trainer_cls` names it stops.
    Raises: ValueError by train().
    """

    def train(self, *args: Any, **keywords: Any) -> Any:
        if not any(isinstance(callback, ProofCallback) for callback in self.callback_handler.callbacks):
            raise ValueError(
                "plugins: has no deft_kernels.integrations.axolotl.DeftPlugin, so that plain cross-entropy "
                "would be trained; add it, or leave trainer_cls out"
            )
        return super().train(*args, **keywords)


class _Statistics(StatisticsCallback):
    """As its base, with e^nll as perplexity. Axolotl's is e^loss, which for a gated loss is no perplexity."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **others: Any) -> None:
        super().on_log(args, state, control, logs=logs, **others)
        logs = {} if logs is None else logs
        for prefix in ("", "eval_"):
            if {prefix + "nll", prefix + "ppl"} <= logs.keys():
                logs[prefix + "ppl"] = math.exp(min(logs[prefix + "nll"], 700.0))  # e^710 overflows
                if state.log_history:
                    state.log_history[-1][prefix + "ppl"] = logs[prefix + "ppl"]


def logged(cfg: Any) -> bool:
    return cfg.get("deft_log_statistics") is not False


def check(cfg: Any) -> None:
    """Raises ValueError for settings under which the gated loss would not be what is trained."""
    for key, remedy in REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"{key}: not together with the gated loss: {remedy}")
    for key in PARALLEL:
        if (cfg.get(key) or 1) > 1:
            raise ValueError(
                f"{key}: the loss would see a part of each sequence and cannot shift its labels; set it to 1"
            )
    if cfg.get("deft_without_logits") and (cfg.get("tensor_parallel_size") or 1) > 1:
        raise ValueError(
            "tensor_parallel_size: deft_without_logits multiplies by the head's whole weight, past what "
            "tensor parallelism does with it; set it to 1, or deft_without_logits to false"
        )


def check_class(trainer: Any) -> None:
    """Raises ValueError for a trainer of Axolotl's or TRL's that makes another loss, as plugins bring."""
    for parent in type(trainer).__mro__:
        if "compute_loss" in vars(parent):
            if parent is not AxolotlTrainer and parent.__module__.split(".")[0] in ("axolotl", "trl"):
                raise ValueError(
                    f"trainer: {parent.__module__}.{parent.__name__} makes a loss of its own; leave out what "
                    "asks for it (another plugin, model_config_type: mamba), or this plugin"
                )
            return
