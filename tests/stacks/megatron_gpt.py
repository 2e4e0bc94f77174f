"""A tiny GPTModel trained by Megatron-Core's own schedule, DDP and optimizer; as a script, on two ranks.

A GPU is absent, so `without_cuda` stands in for it, three calls in all:
- device="cuda" in PyTorch's own calls: the schedules, DDP and the optimizer make their small tensors there;
- torch.cuda.current_device, which DDP's buffers and the pipeline's messages ask for their place;
- torch.cuda.synchronize, after the pipeline's messages;
and Megatron's generators for dropout, which lie on the GPU, are not forked: dropout is 0. Its own LayerNorm
refuses sequence parallelism, as Apex's, a CUDA extension, would be there: `_norm` is that one's stand-in. And
the routers of 0.16.1 ask for a name that only TransformerEngine's import defines.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec, get_gpt_mtp_block_spec
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_config import TransformerConfig
from pages import run_block
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from deft_kernels import objectives, reference

B, T, V = 8, 12, 62
LAYERS = 2
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    # Their auxiliary loss is of a micro-batch, so that 8 would not be 4 x 2.
    "moe_aux_loss_coeff": 0.0,
    "moe_token_dispatcher_type": "allgather",
    "add_bias_linear": False,
}
# Sums of fp32 in another order: losses of about 4 were apart by at most 2.5e-7 of themselves, parameters of
# about 1 by 1.2e-7 after three steps. Of losses relative, of parameters absolute.
CLOSE = 1e-6


class _OnTheCPU(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        return func(*args, **kwargs)


def _norm(_cls: type, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> nn.Module:
    norm = nn.LayerNorm(hidden_size, eps)
    for parameter in norm.parameters():
        # Each rank has a part of the sequence, and finalize_model_grads adds their gradients up.
        parameter.sequence_parallel = config.sequence_parallel
    return norm


@contextlib.contextmanager
def without_cuda() -> Iterator[None]:
    with (
        mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
        mock.patch.object(torch.cuda, "synchronize", lambda: None),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
        mock.patch.object(WrappedTorchNorm, "__new__", _norm),
        mock.patch.object(CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext()),
        _OnTheCPU(),
    ):
        yield


@contextlib.contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def data() -> tuple[Tensor, Tensor, Tensor]:
    """tokens, labels, loss mask, [B, T]; each row another number of masked tokens."""
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(V, (B, T + 1), generator=generator)
    mask = (torch.arange(T) >= torch.arange(B)[:, None] % T).float()
    return text[:, :-1], text[:, 1:], mask


def config(**settings: Any) -> TransformerConfig:
    given = {
        "num_layers": LAYERS,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "ffn_hidden_size": 24,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        # Sharper than a fresh model's: the gates are then far from 1 and from each other.
        "init_method_std": 0.4,
        "use_cpu_initialization": True,
        "calculate_per_token_loss": True,
        "finalize_model_grads_func": finalize_model_grads,
        "pipeline_dtype": torch.float32,
        # Kernels of extensions that are not there.
        "gradient_accumulation_fusion": False,
        "masked_softmax_fusion": False,
        "bias_dropout_fusion": False,
    }
    return TransformerConfig(**{**given, **settings})


def gpt(cls: type[GPTModel] = GPTModel, tied: bool = False, **settings: Any) -> GPTModel:
    """This rank's part of the model: its layers of a pipeline, its shards of each tensor."""
    torch.manual_seed(0)
    described = config(**settings)
    experts = {"num_experts": described.num_moe_experts, "moe_grouped_gemm": False}
    spec = get_gpt_layer_local_spec(**experts)
    mtp = None
    if described.mtp_num_layers:
        mtp = get_gpt_mtp_block_spec(described, spec, use_transformer_engine=False)
    return cls(
        described,
        spec,
        vocab_size=V,
        max_sequence_length=T,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        share_embeddings_and_output_weights=tied,
        mtp_block_spec=mtp,
    )


def inputs(tokens: Tensor) -> dict[str, Tensor]:
    later = torch.ones(1, 1, T, T, dtype=torch.bool).triu(1)
    return {
        "input_ids": tokens,
        "position_ids": torch.arange(T).expand_as(tokens),
        "attention_mask": later,
    }


def _loss(mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """As Megatron-LM's pretrain_gpt.py: the sum over the mask, the number of tokens, what is logged."""
    total, tokens = (losses * mask).sum(), mask.sum().int()
    return total, tokens, {"lm loss": torch.stack([total.detach(), tokens.float()])}


def forward_step(batches: Iterator[tuple[Tensor, ...]], model: Any) -> tuple[Tensor, Any]:
    tokens, labels, mask = next(batches)
    return model(**inputs(tokens), labels=labels, loss_mask=mask), partial(_loss, mask)


def trained(model: GPTModel, parts: int = 1, steps: int = 3, evaluate: bool = False) -> list[float]:
    """Each step's mean loss over the tokens of all ranks; [] on a rank whose stage makes none."""
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    # Plain descent, so that a gradient that is off by a factor shows.
    settings = OptimizerConfig(optimizer="sgd", lr=0.1, sgd_momentum=0.0, weight_decay=0.0, clip_grad=0.0)
    optimizer = get_megatron_optimizer(settings, [wrapped])
    ranks, rank = parallel_state.get_data_parallel_world_size(), parallel_state.get_data_parallel_rank()
    rows = [values.chunk(ranks)[rank].chunk(parts) for values in data()]
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        wrapped.zero_grad_buffer()
        with torch.set_grad_enabled(not evaluate):
            logged = get_forward_backward_func()(
                forward_step_func=forward_step,
                data_iterator=iter(list(zip(*rows, strict=True))),
                model=[wrapped],
                num_microbatches=parts,
                seq_length=T,
                micro_batch_size=B // ranks // parts,
                forward_only=evaluate,
            )
        if not evaluate:
            optimizer.step()
        if logged:
            sums = torch.stack([entry["lm loss"] for entry in logged]).sum(0)
            torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group())
            losses.append(float(sums[0] / sums[1]))
    return losses


def parameters(model: GPTModel) -> dict[str, tuple[Tensor, int | None]]:
    """By name: this rank's shard, and the dimension in which it is one."""
    ranks = parallel_state.get_tensor_model_parallel_world_size()
    return {
        name: (p.detach().clone(), getattr(p, "partition_dim", None) if ranks > 1 else None)
        for name, p in model.named_parameters()
    }


def oracle(logits: Tensor, labels: Tensor, mask: Tensor, objective: str = "deft") -> float:
    """The float64 reference on logits [B, T, V] over the tokens that the mask leaves."""
    counted = labels.masked_fill(mask == 0, -100)
    loss, _ = reference.loss(logits.detach().double(), counted, objective=objectives.resolve(objective))
    return float(loss)


def own_logits(model: GPTModel) -> Tensor:
    tokens, _, _ = data()
    with torch.no_grad():
        return model(**inputs(tokens))


def agree(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert found.keys() == wanted.keys()
    for name, (parameter, _) in found.items():
        torch.testing.assert_close(
            parameter, wanted[name][0], rtol=0, atol=CLOSE, msg=lambda m, n=name: f"{n}: {m}"
        )


# Of what each rank has some, and counts from 0.
COUNTED = {"pipeline": "decoder.layers.", "experts": "local_experts."}


def renamed(name: str, case: str, rank: int) -> str:
    """A rank's parameter by its name in the whole model; one layer, or two experts, a rank."""
    start, counted, rest = name.partition(COUNTED[case])
    number, dot, end = rest.partition(".")
    first = rank * {"pipeline": LAYERS // 2, "experts": EXPERTS["num_moe_experts"] // 2}[case]
    return f"{start}{counted}{int(number) + first}{dot}{end}" if counted else name


def _load(model: GPTModel, whole: dict[str, Tensor], case: str) -> None:
    """A rank's layers or experts of the whole model; Megatron would draw others for them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(whole[renamed(name, case, torch.distributed.get_rank())])


# What each case splits between two ranks, and the settings of its model.
SPLITS: dict[str, tuple[dict[str, int], dict[str, Any]]] = {
    "data": ({}, {}),
    "tensor": ({"tensor_model_parallel_size": 2}, {"tensor_model_parallel_size": 2}),
    "sequence": (
        {"tensor_model_parallel_size": 2},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "pipeline": ({"pipeline_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}),
    "experts": ({"expert_model_parallel_size": 2}, {**EXPERTS, "expert_model_parallel_size": 2}),
}


def main(folder: Path) -> None:
    torch.distributed.init_process_group("gloo")
    run_block("megatron")
    rank = torch.distributed.get_rank()
    for case, (split, settings) in SPLITS.items():
        parallel_state.initialize_model_parallel(**split)
        with without_cuda():
            model = gpt(**settings)
            if case in COUNTED:
                _load(model, torch.load(folder / f"{case}.pt"), case)
            losses = trained(model, parts=4)
            torch.save((losses, parameters(model)), folder / f"{case}{rank}.pt")
        parallel_state.destroy_model_parallel()
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
