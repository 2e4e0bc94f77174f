"""A patched model under FSDP2, whatever FSDP was told, against the model with the loss on its own logits.

Two ranks (gloo, CPU). The counterpart is sharded alike; its head runs inside FSDP's hooks.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import ranks
import torch
import torch.distributed as dist
from tiny import batch, llama
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from deft_kernels import objectives
from deft_kernels.integrations import liger
from deft_kernels.integrations.running import RunningStatistics
from deft_kernels.integrations.transformers import patch_model, set_loss_function

RANKS = 2
# How the head lies: with the rest of the model, as a group of its own, or in one with the last norm.
HEADS: dict[str, Callable[[Any], Any]] = {
    "with the rest": lambda model: None,
    "apart": lambda model: model.lm_head,
    "with the norm": lambda model: [model.model.norm, model.lm_head],
}


def own(rows: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: values.chunk(RANKS)[dist.get_rank()] for name, values in rows.items()}


def sharded(model: Any, head: str, told: Callable[[FSDPModule], None] | None, **policy: Any) -> Any:
    mesh = init_device_mesh("cpu", (RANKS,))
    keywords: dict[str, Any] = {"mesh": mesh}
    if policy:
        keywords["mp_policy"] = MixedPrecisionPolicy(**policy)
    for layer in model.model.layers:
        fully_shard(layer, **keywords)
    group = HEADS[head](model)
    if group is not None:
        fully_shard(group, **keywords)
    fully_shard(model, **keywords)
    for module in model.modules():
        if isinstance(module, FSDPModule) and told is not None:
            told(module)
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad.full_tensor() for n, p in model.named_parameters() if p.grad is not None}


def agree(
    head: str,
    told: Callable[[FSDPModule], None] | None = None,
    prepare: Callable[[Any], None] = lambda model: None,
    tolerance: tuple[float, float] = (1e-4, 1e-7),
    objective: Any = "deft",
    steps: int = 1,
    **policy: Any,
) -> None:
    whole = llama().train()
    prepare(whole)
    model = copy.deepcopy(whole)
    patch_model(model, objective)
    set_loss_function(whole, objective)
    rows = own(batch())
    items = (batch()["labels"][:, 1:] != -100).sum()
    found: list[Any] = []
    for one in (model, whole):
        one = sharded(one, head, told, **policy)
        for step in range(steps):
            if steps > 1:
                one.set_requires_gradient_sync(step == steps - 1)
            loss = one(**rows, num_items_in_batch=items).loss
            loss.backward()
        found.append((loss.detach(), gradients(one)))
    (loss, ours), (wanted_loss, wanted) = found
    torch.testing.assert_close(loss, wanted_loss, rtol=tolerance[0], atol=tolerance[1])
    assert ours.keys() == wanted.keys() and ours
    for name, gradient in ours.items():
        rtol, atol = tolerance
        atol = max(atol, rtol * wanted[name].abs().max().item())
        torch.testing.assert_close(
            gradient, wanted[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{head}, {n}: {m}"
        )


def plain() -> None:
    for head in HEADS:
        agree(head)


def divided_by(factor: float) -> Callable[[FSDPModule], None]:
    def told(module: FSDPModule) -> None:
        module.set_gradient_divide_factor(factor)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other sum with a factor

    return told


def summed_or_divided() -> None:
    """Not divided, as torchtitan has it, whose loss is divided by all tokens; by another factor."""
    for head in HEADS:
        agree(head, divided_by(1.0))
    agree("apart", divided_by(5.0))


def in_bf16() -> None:
    """Parameters and products of bf16. Hidden states are rounded alike; the weight's gradient is summed in
    fp32 here and by F.linear's backward there."""
    for head in HEADS:
        agree(head, tolerance=(2.0**-6, 1e-6), param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def accumulated_without_reducing() -> None:
    for head in HEADS:
        agree(head, steps=2)


def gradient_made_in_the_backward() -> None:
    """Logits made anew in the backward, for which the weight has to be gathered again."""
    for head in HEADS:
        agree(head, objective=lambda r: -r.logp * r.collision)
        agree(head, objective=objectives.deft().within("p>=0.01"))


def frozen() -> None:
    def trunk(model: Any) -> None:
        model.model.requires_grad_(False)

    def its_head(model: Any) -> None:
        model.lm_head.requires_grad_(False)

    for head in ("with the rest", "apart"):
        agree(head, prepare=trunk)
        agree(head, prepare=its_head)


def statistics_and_evaluation() -> None:
    """The statistics come out of the head's call, and evaluation runs the head's own forward again."""
    statistics = RunningStatistics()
    model, whole = llama().train(), llama().train()
    patch_model(model, statistics=statistics)
    mesh = init_device_mesh("cpu", (RANKS,))
    fully_shard(model.lm_head, mesh=mesh, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16))
    model = fully_shard(model, mesh=mesh)
    rows = own(batch())
    model(**rows).loss.backward()
    found = statistics.means()
    patch_model(whole, statistics=statistics)
    whole(**rows).loss.backward()
    assert isinstance(model.lm_head, FSDPModule)
    assert found == pytest.approx(statistics.means(), rel=1e-5)
    model.eval()
    with torch.no_grad():
        assert model(**rows).logits.shape[-1] == whole.config.vocab_size


def liger_with_the_head_apart() -> None:
    """Its forward reads lm_head.weight outside the head's call; install(model=) has the hooks run."""
    from liger_kernel.transformers import apply_liger_kernel_to_llama

    told = divided_by(1.0)
    rows = own(batch())
    items = (batch()["labels"][:, 1:] != -100).sum()
    model, whole = llama().train(), llama().train()
    off = {"rope": False, "rms_norm": False, "swiglu": False, "cross_entropy": False}
    apply_liger_kernel_to_llama(model=model, fused_linear_cross_entropy=True, **off)
    liger.install(model=model)
    try:
        set_loss_function(whole)
        model, whole = sharded(model, "apart", told), sharded(whole, "apart", told)
        for one in (model, whole):
            one(**rows, num_items_in_batch=items).loss.backward()
    finally:
        liger.uninstall()
    wanted = gradients(whole)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-4, atol=1e-6)


CASES = [
    plain,
    summed_or_divided,
    in_bf16,
    accumulated_without_reducing,
    gradient_made_in_the_backward,
    frozen,
    statistics_and_evaluation,
    liger_with_the_head_apart,
]


@cache
def outcomes() -> dict[str, list[str]]:
    return ranks.run(CASES, RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case):
    for rank, outcome in enumerate(outcomes()[case]):
        assert outcome == "passed", f"rank {rank}: {outcome}"
