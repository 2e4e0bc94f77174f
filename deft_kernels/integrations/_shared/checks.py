"""Settings of a transformers-style trainer with which it would not train the gated loss: they raise, with
what to do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from .aligned import is_encoder_decoder, refuse_aligned
from .caller import calling_trainer


def check_trainer(trainer: Any) -> None:
    """Raises ValueError for settings of a trainer that its compute_loss_func would make void."""
    if trainer.compute_loss_func is not None:
        raise ValueError("compute_loss_func: the trainer has one already; leave it out, or do not call apply")
    check_settings(trainer)


def check_caller(loss: Any, shift: bool) -> Tensor | None:
    """`check_settings` of the trainer that calls `loss`, if one does; returns the labels that it shifted.

    For a loss that was given to a trainer without `apply`, which looks beforehand. A trainer compiles its
    model and no more, so a call that is compiled is none of a trainer's. Under context parallelism the
    trainer shifts the labels before it cuts each sequence, as nobody can afterwards; they are in its batch,
    and the loss is given the others. None where the trainer has shifted none.
    """
    if torch.compiler.is_compiling():
        return None
    trainer, batch = calling_trainer(loss)
    if trainer is None:
        return None
    check_settings(trainer)
    check_labels(trainer, shift)
    cut = _in_pieces(trainer)
    if batch is None:
        if cut or is_encoder_decoder(trainer.model):
            why = "how its labels are shifted" if cut else "whether the model would decode its own input"
            raise RuntimeError(
                "inputs: this trainer's compute_loss has no batch under this name, so that nothing tells "
                f"{why}; name it inputs there, as Trainer.compute_loss does"
            )
        return None
    shifted: Tensor | None = batch.get("shift_labels")
    if cut and shift and shifted is None:
        raise RuntimeError(
            "shift_labels: not in the batch under context parallelism, though the labels of a part of a "
            "sequence cannot be shifted; use a version of transformers that this package was tested with"
        )
    if is_encoder_decoder(trainer.model):
        _check_decoded(batch)
    return shifted


def _in_pieces(trainer: Any) -> bool:
    """Whether a rank has a part of each sequence."""
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    return parallelism is not None and bool(parallelism.cp_enabled)


def _check_decoded(batch: Mapping[str, Any]) -> None:
    if not {"decoder_input_ids", "decoder_inputs_embeds"} & batch.keys():
        raise ValueError(
            "decoder_input_ids: not in the batch, and the trainer keeps the labels from the model, which "
            "would decode its own input; use DataCollatorForSeq2Seq(tokenizer, model=model)"
        )


def check_labels(trainer: Any, shift: bool) -> None:
    if shift:
        refuse_aligned(trainer.model, "ComputeLoss")
    elif trainer not in _COUNTING_ALL:
        if not _counts_first_labels(trainer):
            raise ValueError(
                "shift: is False, and the trainer leaves each row's first label out of the number of items, "
                "as its model is causal; use integrations.transformers.apply(trainer, shift=False)"
            )
        _COUNTING_ALL.add(trainer)


def count_all_labels(trainer: Any) -> None:
    """For a loss of aligned labels, where a trainer of transformers 5.24 counts labels[..., 1:].

    Raises: RuntimeError for a trainer that does so all the same.
    """
    trainer._loss_shifts_labels = False
    if not _counts_first_labels(trainer):
        raise RuntimeError(
            "shift: is False, and this version of transformers leaves each row's first label out of the "
            "number of items; use a version that this package was tested with"
        )
    _COUNTING_ALL.add(trainer)


# That were asked, which is a message on several ranks.
_COUNTING_ALL: WeakSet[Any] = WeakSet()


def _counts_first_labels(trainer: Any) -> bool:
    """Whether a row's first label makes a difference to the number of items."""
    counts = []
    for first in (-100, 0):
        batch = {"labels": torch.tensor([[first, 0, 0]], device=trainer.args.device)}
        counts.append(trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)[1])
    without, with_first = counts
    return without is None or not torch.equal(torch.as_tensor(without), torch.as_tensor(with_first))


def check_settings(trainer: Any) -> None:
    """Raises ValueError for settings under which a trainer does not train its compute_loss_func."""
    refuse_label_smoothing(trainer.args)
    if getattr(trainer.args, "loss_type", None) == "chunked_nll":
        raise ValueError(
            "loss_type: 'chunked_nll' makes its own plain cross-entropy and no logits for compute_loss_func; "
            'set SFTConfig(loss_type="nll"), or leave compute_loss_func out and call '
            "deft_kernels.integrations.trl.apply(trainer)"
        )
    if fused_by_liger(trainer.args):
        raise ValueError(
            "use_liger_kernel: its fused cross-entropy makes no logits for compute_loss_func. Call "
            "deft_kernels.integrations.liger.install(model=trainer.model) instead of apply, or set "
            'liger_kernel_config={"fused_linear_cross_entropy": False}'
        )
    refuse_dividing_twice(trainer)
    refuse_means_of_means(trainer.args)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and parallelism.sp_enabled:
        raise ValueError(
            "parallelism_config: under DeepSpeed sequence parallelism the trainer takes the model's own loss "
            "and no compute_loss_func; use set_loss_function(model) or patch_model(model)"
        )


def refuse_dividing_twice(trainer: Any) -> None:
    """A loss that is a part of the whole step's already: transformers 5.2 to 5.5.3 have accelerate divide it,
    and a Trainer whose own loss is a mean of each batch."""
    if getattr(trainer, "loss_is_scaled_for_ga", None) is False and _accumulates(trainer):
        raise ValueError(
            f"loss_is_scaled_for_ga: is False on {type(trainer).__name__}, which would divide the gated loss "
            "once more, by the number of accumulated batches; remove it, or set it to True"
        )
    steps = trainer.accelerator.gradient_accumulation_steps
    if steps > 1 and not getattr(trainer, "is_deepspeed_enabled", False):
        raise ValueError(
            "gradient_accumulation_steps: this version of transformers divides accumulated gradients by "
            f"{steps} twice, plain cross-entropy's too; install transformers>=5.5.4, or do not accumulate"
        )


def _accumulates(trainer: Any) -> bool:
    return int(getattr(trainer.args, "gradient_accumulation_steps", 1)) > 1


def refuse_means_of_means(args: Any) -> None:
    """Each rank's number of items would then be its own, and the step a mean of the ranks' means."""
    if getattr(args, "world_size", 1) > 1 and not getattr(args, "average_tokens_across_devices", True):
        raise ValueError(
            f"average_tokens_across_devices: is False on {args.world_size} ranks, so that a token weighs "
            "more on a rank that has fewer of them; leave it True, its default"
        )


def fused_by_liger(args: Any) -> bool:
    config = getattr(args, "liger_kernel_config", None) or {}
    return bool(getattr(args, "use_liger_kernel", False)) and config.get("fused_linear_cross_entropy", True)


def refuse_label_smoothing(args: Any) -> None:
    if getattr(args, "label_smoothing_factor", 0):
        raise ValueError(
            "label_smoothing_factor: the trainer's own smoothing replaces the gated loss or is ignored; set "
            "it to 0 and pass label_smoothing= to the gated loss"
        )
