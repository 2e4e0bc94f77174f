"""Megatron-Core's own call of its loss, the vocabulary on one rank and on two (this file is their script)."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.common.language_module import language_module
from pages import run_block, two_ranks

from deft_kernels import objectives, reference
from deft_kernels.integrations import megatron

B, T, D, V = 8, 6, 16, 62


def data():
    generator = torch.Generator().manual_seed(1)
    hidden = 2 * torch.randn(B, T, D, generator=generator)
    weight = torch.randn(V, D, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    mask = (torch.arange(T) >= torch.arange(B)[:, None] % T).float()
    return hidden, weight, labels, mask


def language_model_loss(logits, labels, fused=False, implementation="native"):
    """[B, T] losses by the method that GPTModel inherits; logits [T, B, V / ranks], labels [B, T]."""
    owner = SimpleNamespace(
        config=SimpleNamespace(cross_entropy_loss_fusion=fused, cross_entropy_fusion_impl=implementation),
        pg_collection=SimpleNamespace(tp=parallel_state.get_tensor_model_parallel_group()),
    )
    return language_module.LanguageModule.compute_language_model_loss(owner, labels, logits)


def trained(accumulate, fused=False, steps=3):
    """Losses and this rank's rows of the head after a few steps; the mask and the mean are the trainer's."""
    hidden, weight, labels, mask = data()
    rank, ranks = parallel_state.get_tensor_model_parallel_rank(), torch.distributed.get_world_size()
    head = weight.chunk(ranks)[rank].clone().requires_grad_()
    losses = []
    for _ in range(steps):
        total = 0.0
        for part in zip(*(x.chunk(accumulate) for x in (hidden, labels, mask)), strict=True):
            logits = (part[0] @ head.t()).transpose(0, 1).contiguous()
            loss = (language_model_loss(logits, part[1], fused) * part[2]).sum() / mask.sum()
            loss.backward()
            total += float(loss.detach())
        with torch.no_grad():
            head -= 0.5 * head.grad
            head.grad = None
        losses.append(total)
    return losses, head.detach()


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory):
    store = tmp_path_factory.mktemp("store") / "store"
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


@pytest.fixture
def installed():
    run_block("megatron")
    yield
    megatron.uninstall()


def test_the_first_loss_is_the_oracles_and_8_is_4_times_2(installed):
    hidden, weight, labels, mask = data()
    counted = labels.masked_fill(mask == 0, -100)
    expected, _ = reference.loss(
        hidden.double() @ weight.double().t(), counted, objective=objectives.resolve("deft")
    )
    (whole, end), (parts, same) = trained(1), trained(4)
    assert whole[0] == pytest.approx(float(expected), rel=1e-5)
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(same, end)


def test_its_native_fusion_trains_the_gated_loss_too(installed):
    assert trained(1, fused=True)[0] == trained(1)[0]


def test_transformer_engines_fusion_raises(installed):
    hidden, weight, labels, _ = data()
    with pytest.raises(ValueError, match="native"):
        language_model_loss((hidden @ weight.t()).transpose(0, 1), labels, True, "te")


def test_for_nll_it_is_what_it_replaces_with_label_smoothing_too():
    hidden, weight, labels, _ = data()
    logits = (hidden @ weight.t()).transpose(0, 1).contiguous()
    targets = labels.transpose(0, 1).contiguous()
    for smoothing in (0.0, 0.1):
        theirs = tensor_parallel.vocab_parallel_cross_entropy(logits.clone(), targets, smoothing)
        megatron.install("nll")
        ours = tensor_parallel.vocab_parallel_cross_entropy(logits, targets, smoothing)
        megatron.uninstall()
        torch.testing.assert_close(ours, theirs)


def test_install_and_uninstall():
    before = tensor_parallel.vocab_parallel_cross_entropy, language_module.fused_vocab_parallel_cross_entropy
    with pytest.raises(RuntimeError, match="no gated loss"):
        megatron.uninstall()
    with pytest.raises(ValueError, match="mean_prob"):
        megatron.install("cayley")
    with pytest.raises(TypeError, match="reduction"):
        megatron.install(reduction="mean")
    megatron.install()
    with pytest.raises(RuntimeError, match="already"):
        megatron.install()
    megatron.uninstall()
    after = tensor_parallel.vocab_parallel_cross_entropy, language_module.fused_vocab_parallel_cross_entropy
    assert after == before


def test_two_ranks_with_half_of_the_vocabulary_each(installed, tmp_path):
    losses, end = trained(1)
    two_ranks(__file__, tmp_path)
    for fused in (False, True):
        parts = [torch.load(tmp_path / f"{fused}{rank}.pt") for rank in (0, 1)]
        assert parts[0][0] == parts[1][0] == pytest.approx(losses, rel=1e-5)
        torch.testing.assert_close(torch.cat([head for _, head in parts]), end)


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo")
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    run_block("megatron")
    for fused in (False, True):
        rank = torch.distributed.get_rank()
        torch.save(trained(2, fused), Path(sys.argv[1]) / f"{fused}{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
