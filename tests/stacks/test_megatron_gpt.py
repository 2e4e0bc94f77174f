"""Whole GPTModels of Megatron-Core, trained by its schedule; on two ranks by megatron_gpt.py."""

from __future__ import annotations

import megatron_gpt
import pytest
import torch
from megatron_gpt import (
    CLOSE,
    EXPERTS,
    agree,
    data,
    gpt,
    one_rank,
    oracle,
    own_logits,
    parameters,
    renamed,
    trained,
    without_cuda,
)
from pages import run_block, two_ranks

from deft_kernels.integrations import megatron


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory):
    with one_rank(tmp_path_factory.mktemp("store")):
        yield


@pytest.fixture(autouse=True)
def _without_cuda():
    with without_cuda():
        yield


@pytest.fixture
def installed():
    run_block("megatron")
    yield
    megatron.uninstall()


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_loss_is_the_oracles_and_8_is_4_times_2(fused, installed):
    _, labels, mask = data()
    fusion = {"cross_entropy_loss_fusion": fused}
    whole, parts = gpt(**fusion), gpt(**fusion)
    expected = oracle(own_logits(whole), labels, mask)
    losses = trained(whole)
    assert losses[0] == pytest.approx(expected, rel=CLOSE)
    assert losses[2] < losses[0]
    assert trained(parts, parts=4) == pytest.approx(losses, rel=CLOSE)
    agree(parameters(parts), parameters(whole))


def test_in_place_of_the_logits(installed):
    kept, overwritten = gpt(), gpt()
    losses = trained(kept)
    megatron.uninstall()
    megatron.install(inplace=True)
    assert trained(overwritten) == losses
    agree(parameters(overwritten), parameters(kept))


def test_without_calculate_per_token_loss_it_is_a_mean_of_the_micro_batches_means(installed):
    """The page's trap: Megatron's own averaging, with its cross-entropy too."""
    ends = []
    for parts in (1, 4):
        model = gpt(calculate_per_token_loss=False)
        trained(model, parts, steps=1)
        ends.append(model.output_layer.weight.detach())
    assert float((ends[0] - ends[1]).abs().max()) > 1000 * CLOSE


def test_two_ranks_are_one(installed, tmp_path):
    wanted = {}
    for case, settings in (("pipeline", {}), ("experts", EXPERTS)):
        model = gpt(**settings)
        torch.save({name: value for name, (value, _) in parameters(model).items()}, tmp_path / f"{case}.pt")
        wanted[case] = trained(model), parameters(model)
    two_ranks(megatron_gpt.__file__, tmp_path)
    for case in megatron_gpt.SPLITS:
        losses, end = wanted.get(case, wanted["pipeline"])
        ranks = [torch.load(tmp_path / f"{case}{rank}.pt") for rank in (0, 1)]
        assert ranks[1][0] == pytest.approx(losses, rel=CLOSE)
        # A pipeline's last stage makes the loss.
        assert ranks[0][0] == ([] if case == "pipeline" else ranks[1][0])
        if case in megatron_gpt.COUNTED:
            found = {
                renamed(name, case, rank): entry
                for rank, (_, own) in enumerate(ranks)
                for name, entry in own.items()
            }
        else:
            found = {
                name: (value if dim is None else torch.cat([value, ranks[1][1][name][0]], dim), None)
                for name, (value, dim) in ranks[0][1].items()
            }
        agree(found, end)
