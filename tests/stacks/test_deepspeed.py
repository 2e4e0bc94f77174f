"""The transformers Trainer with DeepSpeed's engine, alone and as two ranks (this file is their script)."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import deepspeed
import pytest
import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from pages import two_ranks
from tiny import arguments, batch, examples, llama, losses, oracle, parameters
from transformers import LlamaForCausalLM, Trainer
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from deft_kernels.integrations.transformers import apply, patch_model, set_loss_function

# DeepSpeed has a CPU backend, on gloo; told to use a CPU, the Trainer would leave DeepSpeed out.
os.environ["DS_ACCELERATOR"] = "cpu"
os.environ.pop("ACCELERATE_USE_CPU", None)
# What a launcher sets.
for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_PORT": 29547}.items():
    os.environ.setdefault(name, str(value))
os.environ.setdefault("MASTER_ADDR", "127.0.0.1")

# Sums of fp32 in another order: losses were apart by at most 1.2e-7 of themselves, parameters by 2.2e-7.
CLOSE = 1e-6


def zero(folder, stage, size=8, accumulate=1):
    """TrainingArguments with DeepSpeed's ZeRO; from_pretrained reads them too, and partitions for stage 3."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # No clipping: accelerate would have DeepSpeed clip at 1, tests/integrations do not clip.
    config = {"zero_optimization": {"stage": stage}, "zero_allow_untested_optimizer": True}
    config |= {"gradient_clipping": 0.0, "train_micro_batch_size_per_gpu": "auto"}
    config |= {"gradient_accumulation_steps": "auto"}
    sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulate}
    return arguments(folder, use_cpu=False, deepspeed=config, **sizes)


def loaded(folder):
    if os.environ["RANK"] == "0":
        llama().save_pretrained(folder / "model")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    return LlamaForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def trained(args, model, route=None):
    """Three steps' losses and the whole parameters."""
    run = Trainer(model=model, args=args, train_dataset=examples())
    if route is apply:
        apply(run)
    run.train()
    assert isinstance(run.model_wrapped, deepspeed.DeepSpeedEngine)
    assert run.args.world_size == int(os.environ["WORLD_SIZE"])
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return losses(run), parameters(model)


@pytest.fixture(autouse=True)
def _forget():
    yield
    unset_hf_deepspeed_config()


@pytest.fixture(scope="module")
def by_hand():
    """The same three steps without trainer or DeepSpeed."""
    model = llama().train()
    set_loss_function(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rows, found = batch(24), []
    for start in (0, 8, 16):
        optimizer.zero_grad()
        loss = model(**{name: values[start : start + 8] for name, values in rows.items()}).loss
        loss.backward()
        optimizer.step()
        found.append(float(loss.detach()))
    return found, parameters(model)


def agree(found, wanted):
    (logged, end), (expected, parameters_then) = found, wanted
    assert logged == pytest.approx(expected, rel=CLOSE)
    torch.testing.assert_close(end, parameters_then, rtol=0, atol=CLOSE)


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (2, 4)])
@pytest.mark.parametrize(
    ("stage", "route"),
    [(1, patch_model), (2, patch_model), (2, set_loss_function), (3, set_loss_function), (3, apply)],
)
def test_it_trains_the_gated_loss(stage, route, size, accumulate, by_hand, tmp_path):
    args = zero(tmp_path, stage, size, accumulate)
    model = loaded(tmp_path)
    assert hasattr(model.lm_head.weight, "ds_id") == (stage == 3)
    if route is not apply:
        route(model)
    found = trained(args, model, route)
    assert found[0][0] == pytest.approx(oracle(llama(), batch()), rel=CLOSE)
    agree(found, by_hand)


def test_a_partitioned_head_is_refused_by_patch_model(tmp_path):
    _args = zero(tmp_path, 3)
    model = loaded(tmp_path)
    with pytest.raises(ValueError, match=r"ZeRO-3.*set_loss_function\(model\)"):
        patch_model(model)


def test_a_head_that_is_partitioned_after_patch_model_raises_in_the_first_step(tmp_path):
    model = llama()
    patch_model(model)
    run = Trainer(model=model, args=zero(tmp_path, 3), train_dataset=examples())
    with pytest.raises(ValueError, match=r"ZeRO-3.*set_loss_function\(model\)"):
        run.train()


def test_two_ranks_are_one(by_hand, tmp_path):
    two_ranks(__file__, tmp_path)
    for case in CASES:
        for rank in (0, 1):
            agree(torch.load(tmp_path / f"{case}{rank}.pt"), by_hand)


CASES = {"2": patch_model, "3": set_loss_function}

if __name__ == "__main__":
    # accelerate names no backend for several ranks of DeepSpeed without a GPU, and would train each alone.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)
    out = Path(sys.argv[1])
    rank = os.environ["RANK"]
    for stage, route in CASES.items():
        args = zero(out, int(stage), 2, 2)
        model = loaded(out)
        route(model)
        torch.save(trained(args, model), out / f"{stage}{rank}.pt")
        unset_hf_deepspeed_config()
