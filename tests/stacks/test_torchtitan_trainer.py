"""torchtitan's own trainer, from its command line, with the configurations of the page."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import titan
import torch
from pages import two_ranks
from torch.distributed.device_mesh import init_device_mesh
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed.spmd_types import set_current_spmd_mesh
from torchtitan.distributed.utils import set_spmd_backend

from deft_kernels import objectives, reference
from deft_kernels.integrations.torchtitan import DEFTLoss

ACCUMULATED = ("--training.local_batch_size", "2", "--training.global_batch_size", "8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("torchtitan")
    titan.save(folder)
    titan.run(folder, "seed")
    return folder


@pytest.fixture(scope="module")
def whole(folder):
    return titan.run(folder, "whole")


def close(losses, parameters, whole):
    """In fp32 other portions of the batch differ by the order of sums: measured over three steps, on one rank
    and on two, at most 4e-7 of the loss and 2.4e-7 of a parameter (one unit in its last place)."""
    assert losses == pytest.approx(whole.losses, rel=4e-6)
    assert parameters.keys() == whole.parameters.keys()
    for name, p in whole.parameters.items():
        torch.testing.assert_close(parameters[name], p, rtol=1e-6, atol=1e-6)


def oracle(folder, objective, parameters=None, name="whole"):
    """The float64 reference on the logits of the trainer's own model, on its first batch."""
    titan.RUNS["folder"] = folder
    with titan.process_group():
        trainer = getattr(titan, name)().build()
        (model,) = trainer.model_parts
        trainer.checkpointer.load()
        if parameters is not None:
            for name, p in model.named_parameters():
                p.detach().to_local().copy_(parameters[name])
        inputs, labels = next(iter(trainer.dataloader))
        with torch.no_grad():
            logits = model(inputs["input"], positions=inputs["positions"])
        trainer.close()
    loss, _ = reference.loss(logits.double(), labels, objective=objectives.resolve(objective))
    return float(loss)


def test_the_first_loss_is_the_oracles(folder, whole):
    expected = oracle(folder, "deft")
    assert whole.losses[0] == pytest.approx(expected, rel=1e-6)
    assert abs(expected - oracle(folder, "nll")) > 1
    assert len(whole.losses) == 3


def test_8_is_4_times_2(folder, whole):
    run = titan.run(folder, "whole", *ACCUMULATED)
    close(run.losses, run.parameters, whole)


def test_in_chunks_and_validation_is_gated_too(folder, whole):
    """torchtitan validates after the first step and, as the configuration says, after the third."""
    chunked = titan.run(folder, "chunked", *ACCUMULATED)
    close(chunked.losses, chunked.parameters, whole)
    expected = oracle(folder, "deft", whole.parameters)
    for name in ("whole", "chunked"):
        run = titan.run(folder, name, "--validator.enable")
        close(run.losses, run.parameters, whole)
        assert len(run.validation) == 2
        assert run.validation[1] == pytest.approx(expected, rel=1e-6)


def test_lora(folder):
    """torchtitan's own adapters, on all linear layers and the head."""
    expected = oracle(folder, "deft", name="lora")
    run, chunked = titan.run(folder, "lora"), titan.run(folder, "lora_in_chunks")
    assert run.losses[0] == pytest.approx(expected, rel=1e-6)
    close(chunked.losses, chunked.parameters, run)
    adapters = [p for name, p in run.parameters.items() if "lora_b" in name]
    assert adapters and all(p.any() for p in adapters)  # they start as nothing


def test_compiled_by_the_real_backend(folder, whole):
    run = titan.run(folder, "whole", "--compile.enable", "--compile.components", "loss")
    close(run.losses, run.parameters, whole)


def test_logits_in_bfloat16(folder, whole):
    """The trainer's default: mixed_precision_param makes the model's logits bfloat16."""
    run = titan.run(folder, "whole", "--training.mixed_precision_param", "bfloat16", "--training.steps", "1")
    # bfloat16 has 8 bits: logits of about 3 are off by some 1e-2 each, the mean of their losses by less.
    assert run.losses[0] == pytest.approx(whole.losses[0], abs=1e-2)


def test_two_ranks(folder, whole):
    """FSDP2, also in chunks and with accumulation, and tensor parallelism, by both of torchtitan's DTensor
    backends. Its default, spmd_types, needs a newer torch than 2.13 for more than one rank."""
    partial, full = (f"--parallelism.spmd_backend {name}_dtensor" for name in ("partial", "full"))
    runs = [
        f"whole --training.local_batch_size 4 {partial}",
        f"whole {' '.join(ACCUMULATED)} {full} --validator.enable",
        f"chunked --training.local_batch_size 4 {partial}",
        f"whole --parallelism.tensor_parallel_degree 2 {partial}",
        f"chunked --parallelism.tensor_parallel_degree 2 {full}",
    ]
    two_ranks(titan.__file__, folder, *runs)
    results = torch.load(folder / "ranks.pt")
    assert list(results) == runs
    for line, (losses, _, parameters) in results.items():
        if line == runs[1]:
            # torchtitan's own cross-entropy is logged twice as large there too, by torch 2.13: the division
            # by the tokens sums the partial losses over the ranks, and the trainer does so once more.
            losses = [loss / 2 for loss in losses]
        close(losses, parameters, whole)


def test_the_placements_are_those_of_torchtitans_cross_entropy():
    """Partial where ranks hold other rows: the trainer adds up local parts."""
    from torch.distributed.tensor import Partial, Replicate, Shard, distribute_tensor

    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        logits, labels = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
        for placement, expected in ((Shard(0), Partial()), (Shard(1), Partial()), (Replicate(), Replicate())):
            pred, target = (distribute_tensor(t, mesh, [placement]) for t in (logits, labels))
            for config in (DEFTLoss.Config(), CrossEntropyLoss.Config()):
                loss, _ = config.build(compile_config=None)(pred, target)
                assert loss.placements == (expected,)
        local = pred.to_local()
        loss, _ = DEFTLoss.Config(objective="nll").build(compile_config=None)(pred, target)
        reference_loss, _ = CrossEntropyLoss.Config().build(compile_config=None)(local, labels)
        torch.testing.assert_close(loss.to_local(), reference_loss)
    finally:
        torch.distributed.destroy_process_group()


def test_plain_shards_of_the_vocabulary_are_refused():
    """What the spmd_types backend gives a loss under tensor parallelism, as far as one process has it."""
    torch.distributed.init_process_group("fake", rank=0, world_size=2)
    set_spmd_backend("spmd_types")
    try:
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        logits, labels = torch.randn(4, 6, 11), torch.randint(11, (4, 6))
        with set_current_spmd_mesh(mesh), pytest.raises(ValueError, match="spmd_backend"):
            DEFTLoss.Config().build(compile_config=None)(logits, labels)
    finally:
        set_spmd_backend("partial_dtensor")
        torch.distributed.destroy_process_group()


def test_a_step_compiled_ahead_of_time_is_refused(folder):
    """Its artifact holds the loss it was compiled with; its fingerprint does not name one."""
    settings = SimpleNamespace(enable=False, precompile_artifact_dir="artifacts")
    for config in (DEFTLoss.Config(), ChunkedLossWrapper.Config(loss_fn=DEFTLoss.Config())):
        with pytest.raises(ValueError, match="precompile_artifact_dir"):
            config.build(compile_config=settings)


def test_objectives_from_the_command_line(folder, whole):
    expected = oracle(folder, "nll")
    for name, option in (("whole", "--loss.objective"), ("chunked", "--loss.loss-fn.objective")):
        run = titan.run(folder, name, option, "nll", "--training.steps", "1")
        assert run.losses[0] == pytest.approx(expected, rel=1e-6)
    for objective, message in (("cayley", "mean_prob"), ("def", "objective")):
        with pytest.raises(ValueError, match=message):
            titan.run(folder, "whole", "--loss.objective", objective)
