"""Axolotl: a plugin, so that the gated loss is a few lines of YAML.

plugins: [deft_kernels.integrations.axolotl.DeftPlugin]
deft_objective: deft
"""

from __future__ import annotations

from typing import Any

from axolotl.integrations.base import BasePlugin
from pydantic import BaseModel, model_validator

from .. import objectives
from ..objectives import Objective
from .callback import StatisticsCallback
from .patching import patch_model
from .running import RunningStatistics
from .transformers import apply

PREFIX = "deft_"

# Settings of Axolotl that give the model or the trainer another loss, or that no route takes notice of.
REFUSED = {
    "rl": "preference and reward training have losses of their own; leave the plugin out",
    "use_eaft": "is a loss of its own; the same gate, over the whole vocabulary, is deft_objective: eaft",
    "cut_cross_entropy": "replaces the model's loss; set it to false, and deft_without_logits: true instead",
    "chunked_cross_entropy": "replaces the model's loss; leave it out, deft_without_logits: true saves more",
    "liger_fused_linear_cross_entropy": "makes no logits; set it to false, and deft_without_logits: true",
    "label_smoothing_factor": "the trainer's own smoothing replaces the gated loss or is ignored",
}


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
        for key in data:
            if str(key).startswith(PREFIX) and key not in DeftArgs.model_fields:
                raise ValueError(f"{key}: unknown; known: {', '.join(DeftArgs.model_fields)}")
        objective_of(data)
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
        RuntimeError before the first optimizer step if the gated loss was not called.
    """

    def __init__(self) -> None:
        super().__init__()
        self.statistics: RunningStatistics | None = None

    def get_input_args(self) -> str:
        return f"{__name__}.{DeftArgs.__name__}"

    def post_model_load(self, cfg: Any, model: Any) -> None:
        check(cfg)
        if cfg.deft_without_logits:
            self.statistics = RunningStatistics()
            patch_model(model, objective_of(cfg), statistics=self.statistics)

    def post_trainer_create(self, cfg: Any, trainer: Any) -> None:
        check(cfg)
        if cfg.deft_without_logits:
            # Axolotl takes a forward without a num_items_in_batch of its own for one that cannot use it; the
            # patched one divides by it, and without it accumulation would be a mean of means.
            trainer.model_accepts_loss_kwargs = True
            if cfg.deft_log_statistics is not False:
                StatisticsCallback(self.statistics or RunningStatistics()).add_to(trainer)
        else:
            apply(trainer, objective_of(cfg), log_statistics=cfg.deft_log_statistics is not False)


def check(cfg: Any) -> None:
    """Raises ValueError for settings under which the gated loss would not be what is trained."""
    for key, remedy in REFUSED.items():
        if cfg.get(key):
            raise ValueError(f"{key}: not together with the gated loss: {remedy}")
    if (cfg.get("context_parallel_size") or 1) > 1:
        raise ValueError(
            "context_parallel_size: the loss would see a part of each sequence and cannot shift its labels; "
            "set it to 1"
        )
