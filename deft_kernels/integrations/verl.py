"""verl: the gated loss in its SFT trainer, by one flag, `model.external_lib=deft_kernels.integrations.verl`.

That flag names a module which verl imports, so this room, alone among them, acts when it is imported: it
calls `install()`. For another objective, name a module of your own that imports this one and calls `install`
again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..functional import row_statistics
from ..gated import gated_loss
from ..objectives import Objective, resolve

_objective: Objective = resolve("deft")
_originals: dict[str, Any] = {}


def sft_loss(
    config: Any, model_output: Any, data: Any, dp_group: Any = None
) -> tuple[Tensor, dict[str, Any]]:
    """verl's `sft_loss` with the row formula: the sum over the batch's tokens / batch_num_tokens * dp_size.

    Called with: model_output, of which log_probs and sum_pi_squared (or entropy), and data, as verl does.
    Raises: KeyError, ValueError when the engine does not give what the objective needs.
    """
    from verl.utils import tensordict_utils as tu
    from verl.utils.dataset.dataset_utils import DatasetPadMode

    pad_mode = tu.get_non_tensor_data(data=data, key="pad_mode", default=DatasetPadMode.NO_PADDING)
    if pad_mode != DatasetPadMode.NO_PADDING:
        raise ValueError(f"pad_mode: {pad_mode} is not supported with the gated loss; use no_padding")
    # The labels are rolled to their logits' places already, the mask is not.
    mask = torch.roll(data["loss_mask"].values(), shifts=-1, dims=0).bool()
    needed = _needed(_objective)
    for name in needed:
        if name not in model_output:
            raise KeyError(
                f"{name}: this engine does not make it, and objective {_objective.name!r} needs it; use the "
                'fsdp, fsdp2 or megatron engine, or install("dft") or install("neg_prob"), which need nothing'
            )
    given: dict[str, Tensor] = {}
    if "sum_pi_squared" in needed:
        given["log_collision"] = model_output["sum_pi_squared"].values().detach().log()
    if "entropy" in needed:
        given["entropy"] = model_output["entropy"].values().detach()
    logp = model_output["log_probs"].values()
    rows = gated_loss(logp, objective=_objective, valid=mask, **given)
    return rows.sum() / data["batch_num_tokens"] * data["dp_size"], {}


def install(objective: str | Objective = "deft") -> None:
    """Replace verl's `sft_loss`, and ask its engines for sum p^2 (or the entropy) when they train it.

    verl's own sum p^2 is made in the logits' dtype; it is replaced by `row_statistics`, which accumulates in
    fp32. May be called again, for another objective.
    Raises: ValueError for an objective that needs max p, a mean over the batch, or a gradient through its
        gate.
    """
    global _objective
    from verl.utils import torch_functional
    from verl.workers import engine_workers
    from verl.workers.utils import losses

    described = resolve(objective)
    if described.focus == "max_prob":
        raise ValueError("objective: verl gives no max p; use deft(order=2) or deft(order=1)")
    if not described.detach:
        raise ValueError("objective: verl's sum p^2 carries no gradient; detach=False cannot be honoured")
    if described.needs_batch:
        raise ValueError("objective: a micro-batch is not the batch; give cayley its mean_prob")
    _objective = described
    if _originals:
        return
    _originals["sft_loss"] = losses.sft_loss
    _originals["sum_pi_squared"] = torch_functional.calculate_sum_pi_squared_from_logits
    _originals["train_batch"] = engine_workers.TrainingWorker.train_batch
    _originals["infer_batch"] = engine_workers.TrainingWorker.infer_batch
    losses.sft_loss = sft_loss
    torch_functional.calculate_sum_pi_squared_from_logits = collision_of_logits
    engine_workers.TrainingWorker.train_batch = _asking(_originals["train_batch"])
    engine_workers.TrainingWorker.infer_batch = _asking(_originals["infer_batch"])


def uninstall() -> None:
    """Put verl's own functions back. Raises: RuntimeError when nothing is installed."""
    from verl.utils import torch_functional
    from verl.workers import engine_workers
    from verl.workers.utils import losses

    if not _originals:
        raise RuntimeError("verl: no gated loss is installed")
    losses.sft_loss = _originals.pop("sft_loss")
    torch_functional.calculate_sum_pi_squared_from_logits = _originals.pop("sum_pi_squared")
    engine_workers.TrainingWorker.train_batch = _originals.pop("train_batch")
    engine_workers.TrainingWorker.infer_batch = _originals.pop("infer_batch")


def collision_of_logits(logits: Tensor) -> Tensor:
    """sum p^2 of each row, [...], fp32, without a gradient."""
    with torch.no_grad():
        labels = torch.zeros(logits.shape[:-1], dtype=torch.long, device=logits.device)
        return row_statistics(logits.detach(), labels).collision


def _needed(objective: Objective) -> tuple[str, ...]:
    known = {"collision": ("sum_pi_squared",), "shannon": ("entropy",), "entropy": ("entropy",)}
    return known.get(objective.focus, ())


def _asking(original: Any) -> Any:
    import functools

    from verl.utils import tensordict_utils as tu

    # verl finds a method's dispatch mode in attributes of the function, which wraps() copies.
    @functools.wraps(original)
    def call(self: Any, data: Any, *args: Any, **kwargs: Any) -> Any:
        if getattr(self.loss_fn, "func", self.loss_fn) is sft_loss:
            needed = _needed(_objective)
            if "sum_pi_squared" in needed:
                tu.assign_non_tensor(data, calculate_sum_pi_squared=True)
            if "entropy" in needed:
                tu.assign_non_tensor(data, calculate_entropy=True)
        return original(self, data, *args, **kwargs)

    return call


install()
