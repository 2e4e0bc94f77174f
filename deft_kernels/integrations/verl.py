"""verl: the gated loss in its SFT trainer, by one flag, `model.external_lib=deft_kernels.integrations.verl`.

That flag names a module, and verl does no more than import it. So this module, unlike the others, acts when
it is imported: it calls `install()`. For another objective, name a module of your own that imports this one
and calls `install` again.
"""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..backends.pytorch.objectives import evaluate, outside_band
from ..core.statistics import Field
from ..functional import row_statistics
from ..gated import gated_loss
from ..objectives import Objective, resolve
from ._shared.settings import denominator

# Of one micro-batch: its share of the mean over all tokens of the batch, so that verl sums them as the loss.
METRICS = ("train/nll", "train/mean_alpha", "train/mean_gate")

_originals: dict[str, Any] = {}


@dataclass(frozen=True)
class SftLoss:
    """verl's `sft_loss` with the row formula: the sum over the batch's tokens / batch_num_tokens * dp_size.

    verl sends its loss to workers in other processes. The loss holds its objective, so that they train the
    same one; to unpickle it they import this module.
    """

    objective: Objective

    @property
    def needed(self) -> str | None:
        """What an engine has to return beside log_probs; None for an objective of p alone."""
        names = {"collision": "sum_pi_squared", "shannon": "entropy", "entropy": "entropy"}
        return names.get(self.objective.focus)

    def __call__(
        self, config: Any, model_output: Any, data: Any, dp_group: Any = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Called with: model_output, of which log_probs and what is needed, and data, as verl does.

        Returns: the loss, and the micro-batch's part of METRICS.
        Raises: KeyError, ValueError when the engine does not give what the objective needs.
        """
        from verl.utils import tensordict_utils as tu
        from verl.utils.dataset.dataset_utils import DatasetPadMode
        from verl.utils.metric import Metric

        pad_mode = tu.get_non_tensor_data(data=data, key="pad_mode", default=DatasetPadMode.NO_PADDING)
        if pad_mode != DatasetPadMode.NO_PADDING:
            raise ValueError(f"pad_mode: {pad_mode} is not supported with the gated loss; use no_padding")
        needed = self.needed
        if needed is not None and needed not in model_output:
            raise KeyError(
                f"{needed}: this engine does not make it, and objective {self.objective.name!r} needs it; "
                'use the fsdp, fsdp2 or megatron engine, or install("dft") or install("neg_prob"), which '
                "need nothing"
            )
        logp = model_output["log_probs"].values()
        given: dict[str, Tensor] = {}
        if needed == "sum_pi_squared":
            given["log_collision"] = model_output[needed].values().detach().log()
        elif needed == "entropy":
            given["entropy"] = model_output[needed].values().detach()
        # The labels are rolled to their logits' places already, the mask is not. It may hold weights.
        mask = torch.roll(data["loss_mask"].values(), shifts=-1, dims=0)
        valid = mask.bool()
        rows = gated_loss(logp, objective=self.objective, valid=valid, **given)
        count = denominator(data["batch_num_tokens"], rows)
        share = mask / count * data["dp_size"]
        # verl waits for each micro-batch's loss here; for the metrics it waits once more.
        sums = (_of_rows(self.objective, logp.detach(), valid, given) * share).sum(dim=1).tolist()
        return (rows * share).sum(), {
            name: Metric(aggregation="sum", value=value) for name, value in zip(METRICS, sums, strict=True)
        }


def install(objective: str | Objective = "deft") -> None:
    """Replace verl's `sft_loss`, and ask its engines for sum p^2 (or the entropy) when they train it.

    verl computes both in the logits' dtype. For this loss the fsdp engines get them from `row_statistics`,
    which accumulates in fp32 and keeps nothing for a gradient. May be called again, for another
    objective, before a trainer is built.
    Raises: ValueError for an objective that needs max p, a mean over the batch, or a gradient through a
        statistic; RuntimeError for a verl that still has fsdp_sft_trainer. While it is installed, an engine
        that is given verl's own `sft_loss` raises RuntimeError, and one whose settings do not go with the
        gated loss ValueError.
    """
    if importlib.util.find_spec("verl.trainer.fsdp_sft_trainer") is not None:
        # It imports external_lib as the others do.
        raise RuntimeError(
            "verl: this version has fsdp_sft_trainer, which trains plain cross-entropy whatever is "
            "installed; use verl 0.9"
        )
    from verl.workers.engine.base import BaseEngine
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils import losses

    described = resolve(objective)
    loss = SftLoss(described)
    if described.focus == "max_prob":
        raise ValueError("objective: verl gives no max p; use deft(order=2) or deft(order=1)")
    if not described.detach and loss.needed is not None:
        raise ValueError(
            f"objective: {loss.needed} carries no gradient here; detach=False cannot be honoured"
        )
    if described.needs_batch:
        raise ValueError("objective: a micro-batch is not the batch; give cayley its mean_prob")
    if not _originals:
        _originals["sft_loss"] = losses.sft_loss
        _originals["train_batch"] = BaseEngine.train_batch
        _originals["infer_batch"] = BaseEngine.infer_batch
        _originals["_postprocess_output"] = TrainingWorker._postprocess_output
        BaseEngine.train_batch = _train_batch
        BaseEngine.infer_batch = _infer_batch
        TrainingWorker._postprocess_output = _postprocess_output
    losses.sft_loss = loss


def uninstall() -> None:
    """Put verl's own functions back. A later run in this process needs `install()`: the flag imports nothing.

    Raises: RuntimeError when nothing is installed.
    """
    from verl.workers.engine.base import BaseEngine
    from verl.workers.engine_workers import TrainingWorker
    from verl.workers.utils import losses

    if not _originals:
        raise RuntimeError("verl: no gated loss is installed")
    losses.sft_loss = _originals.pop("sft_loss")
    BaseEngine.train_batch = _originals.pop("train_batch")
    BaseEngine.infer_batch = _originals.pop("infer_batch")
    TrainingWorker._postprocess_output = _originals.pop("_postprocess_output")


def collision_of_logits(logits: Tensor) -> Tensor:
    """sum p^2 of each row, [...], fp32, without a gradient."""
    return _statistics(logits).collision


def entropy_of_logits(logits: Tensor, chunk_size: int | None = None) -> Tensor:
    """The Shannon entropy of each row, [...], nats, fp32, without a gradient; no chunks are needed."""
    return _statistics(logits).entropy


def _statistics(logits: Tensor) -> Any:
    with torch.no_grad():
        labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return row_statistics(logits.detach(), labels)


def _of_rows(objective: Objective, logp: Tensor, valid: Tensor, given: dict[str, Tensor]) -> Tensor:
    """[3, rows]: -logp, the focus index and the gate, as METRICS has them; 0 where not valid."""
    fields = {Field.LOGP: logp.float()}
    if "log_collision" in given:
        fields[Field.COLLISION] = given["log_collision"].float().exp()
    if "entropy" in given:
        fields[Field.ENTROPY] = given["entropy"].float()
    value = evaluate(objective, fields, objective.mean_prob)
    gate = value.gate.masked_fill(outside_band(objective, fields[Field.LOGP].exp()), 0.0)
    return torch.stack([-fields[Field.LOGP], value.alpha, gate]).where(valid, 0.0)


def _train_batch(self: Any, data: Any, loss_function: Any) -> Any:
    """In place of BaseEngine's, which every engine inherits and the trainers call."""
    return _with_statistics(self, data, loss_function, _originals["train_batch"])


def _infer_batch(self: Any, data: Any, loss_function: Any = None) -> Any:
    return _with_statistics(self, data, loss_function, _originals["infer_batch"])


def _with_statistics(engine: Any, data: Any, loss_function: Any, original: Any) -> Any:
    from verl.utils import tensordict_utils as tu

    loss = getattr(loss_function, "func", loss_function)  # verl passes a partial on
    if loss is _originals["sft_loss"]:
        raise RuntimeError(
            "sft_loss: this is verl's own, bound before the gated loss was installed, and would train plain "
            "cross-entropy; import deft_kernels.integrations.verl first, or call its uninstall()"
        )
    if not isinstance(loss, SftLoss):
        return original(engine, data, loss_function)
    _check(engine, data, loss)
    if loss.needed == "sum_pi_squared":
        tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
    if loss.needed == "entropy":
        tu.assign_non_tensor(data, calculate_entropy=True)
    with _exact_statistics(engine):
        return original(engine, data, loss_function)


def _check(engine: Any, data: Any, loss: SftLoss) -> None:
    from verl.utils import tensordict_utils as tu

    fused = tu.get_non_tensor_data(data=data, key="use_fused_kernels", default=False)
    if fused and loss.needed == "sum_pi_squared":
        raise ValueError(
            f"use_fused_kernels: they make no sum p^2, and objective {loss.objective.name!r} needs it; set "
            'model.use_fused_kernels=False, or use an objective of p alone, as install("dft")'
        )
    mtp = getattr(getattr(engine, "model_config", None), "mtp", None)
    if mtp is not None and mtp.enable and mtp.enable_train:
        raise ValueError(
            "model.mtp.enable_train: the heads for later tokens are trained with plain cross-entropy inside "
            "the model; set it to False"
        )


@contextlib.contextmanager
def _exact_statistics(engine: Any) -> Iterator[None]:
    """The engine's statistics from `row_statistics`, only while this loss is trained.

    verl's policy losses, in the same process, need the gradient of its own entropy.
    """
    from verl.utils import torch_functional

    places = [
        (torch_functional, "calculate_sum_pi_squared_from_logits", collision_of_logits),
        (torch_functional, "entropy_from_logits", entropy_of_logits),
    ]
    if hasattr(engine, "compute_entropy_from_logits"):
        places.append((engine, "compute_entropy_from_logits", entropy_of_logits))
    before = [getattr(owner, name) for owner, name, _ in places]
    for owner, name, function in places:
        setattr(owner, name, function)
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def _postprocess_output(self: Any, *args: Any, **keywords: Any) -> Any:
    """In place of TrainingWorker's, with METRICS as numbers, as the SFT trainers log what they are given.

    Ray sends the worker's class to other processes with its methods; this one, found there under its name,
    brings this module and its `install()` with it.
    """
    from verl.utils import tensordict_utils as tu

    output = _originals["_postprocess_output"](self, *args, **keywords)
    metrics = tu.get(output, "metrics")
    for name in METRICS:
        if name in metrics:
            ranks = metrics[name] if isinstance(metrics[name], list) else [metrics[name]]
            # Each rank's share was scaled by their number, as verl's loss is, of which it takes the mean.
            mean = sum(sum(metric.values) for metric in ranks) / len(ranks)
            metrics = {**metrics, name: mean}
    tu.assign_non_tensor(output, metrics=metrics)
    return output


install()
