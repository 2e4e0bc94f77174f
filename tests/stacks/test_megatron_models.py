"""What else of Megatron-Core makes a loss: experts, further tokens, other models; and ways past it."""

from __future__ import annotations

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
from megatron.core.models.bert.bert_model import BertModel
from megatron.core.models.gpt import GPTModel
from megatron.core.models.mamba import MambaModel
from megatron.core.models.T5 import t5_spec
from megatron.core.models.T5.t5_model import T5Model
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron_gpt import (
    CLOSE,
    EXPERTS,
    LAYERS,
    B,
    T,
    V,
    agree,
    config,
    data,
    gpt,
    inputs,
    one_rank,
    oracle,
    own_logits,
    parameters,
    trained,
    without_cuda,
)
from pages import run_block

from deft_kernels.integrations import megatron

BALANCED = {**EXPERTS, "moe_aux_loss_coeff": 0.5}
SEVERAL = {"mtp_num_layers": 1}


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


@pytest.mark.parametrize("settings", [{}, BALANCED, SEVERAL], ids=["dense", "experts", "several tokens"])
def test_for_nll_everything_is_trained_as_without_it(settings):
    """The routers' own losses and those of further tokens keep their share of the gradient."""
    theirs, ours = gpt(**settings), gpt(**settings)
    losses = trained(theirs, parts=2)
    megatron.install("nll")
    try:
        assert trained(ours, parts=2) == pytest.approx(losses, rel=CLOSE)
    finally:
        megatron.uninstall()
    agree(parameters(ours), parameters(theirs))


def test_experts(installed):
    _, labels, mask = data()
    whole, parts = gpt(**EXPERTS), gpt(**EXPERTS)
    expected = oracle(own_logits(whole), labels, mask)
    losses = trained(whole)
    assert losses[0] == pytest.approx(expected, rel=CLOSE)
    assert trained(parts, parts=4) == pytest.approx(losses, rel=CLOSE)
    agree(parameters(parts), parameters(whole))


def test_the_losses_of_further_tokens_are_gated_too(installed):
    _, labels, mask = data()
    model, logits = gpt(**SEVERAL), []
    model.output_layer.register_forward_hook(lambda *call: logits.append(call[-1][0].transpose(0, 1)))
    MTPLossLoggingHelper.tracker.clear()
    losses = trained(model, steps=1)
    further, next_token = logits
    assert losses[0] == pytest.approx(oracle(next_token, labels, mask), rel=CLOSE)
    logged = float(MTPLossLoggingHelper.tracker["values"][0])
    rolled = [torch.nn.functional.pad(values[:, 1:], (0, 1)) for values in (labels, mask)]
    assert logged == pytest.approx(oracle(further, *rolled), rel=CLOSE)


def test_bfloat16(installed):
    """Without the optimizer, which wants bf16 parameters on a GPU."""
    _, labels, mask = data()
    model = Float16Module(config(bf16=True, params_dtype=torch.bfloat16), gpt().bfloat16())
    logits = own_logits(model)
    losses = model(**inputs(data()[0]), labels=labels)
    assert losses.dtype == torch.float32
    # The logits are the same bf16 numbers for both, and all after them is fp32.
    loss = (losses * mask).sum() / mask.sum()
    assert float(loss.detach()) == pytest.approx(oracle(logits, labels, mask), rel=CLOSE)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def bert():
    settings = {"num_tokentypes": 0, "vocab_size": V, "max_sequence_length": T, "add_binary_head": False}
    model = BertModel(config(), transformer_layer_spec=bert_layer_local_spec, **settings)
    tokens, _, _ = data()
    return model, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def t5():
    specs = t5_spec.get_t5_encoder_with_local_block_spec, t5_spec.get_t5_decoder_with_local_block_spec
    encoder, decoder = (spec(LAYERS) for spec in specs)
    model = T5Model(config(), config(), encoder, decoder, vocab_size=V, max_sequence_length=T)
    tokens, _, _ = data()
    seen = torch.zeros(B, 1, T, T, dtype=torch.bool)
    call = {"encoder_input_ids": tokens.flip(1), "decoder_input_ids": tokens, "encoder_attn_mask": seen}
    later = seen | inputs(tokens)["attention_mask"]
    return model, call | {"decoder_attn_mask": later, "encoder_decoder_attn_mask": seen}


class _NoLayers(MegatronModule):
    """In place of the Mamba layers, whose kernels and norms are for CUDA only."""

    def __init__(self, config, **_):
        super().__init__(config)

    def forward(self, hidden_states, **_):
        return hidden_states


def mamba():
    model = MambaModel(config(), ModuleSpec(module=_NoLayers), vocab_size=V, max_sequence_length=T)
    return model, inputs(data()[0])


@pytest.mark.parametrize("build", [bert, t5, mamba])
def test_other_models(build, installed):
    """With the labels of their own datasets, which are -1 where nothing is to be predicted."""
    torch.manual_seed(0)
    model, call = build()
    _, labels, mask = data()
    filled = labels.masked_fill(mask == 0, -1)
    name = "labels" if build is mamba else "lm_labels"

    def output(**given):
        found = model(**call, **given)
        return found[0] if isinstance(found, tuple) else found

    expected = oracle(output(), labels, mask)
    losses = output(**{name: filled})
    assert losses.shape == labels.shape
    assert not losses[mask == 0].any()
    loss = (losses * mask).sum() / mask.sum()
    assert float(loss.detach()) == pytest.approx(expected, rel=CLOSE)
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


class OwnLoss(GPTModel):
    """A model whose loss does not come to Megatron's."""

    def compute_language_model_loss(self, labels, logits):
        rows = logits.flatten(0, 1), labels.transpose(0, 1).flatten()
        return torch.nn.functional.cross_entropy(*rows, reduction="none").view(T, -1).transpose(0, 1)


theirs = tensor_parallel.vocab_parallel_cross_entropy  # as `from ... import` binds it, before install()


class BoundBefore(GPTModel):
    def compute_language_model_loss(self, labels, logits):
        return theirs(logits, labels.transpose(0, 1).contiguous()).transpose(0, 1)


@pytest.mark.parametrize("cls", [OwnLoss, BoundBefore])
def test_a_step_past_the_gated_loss_raises_before_its_backward(cls, installed):
    model = gpt(cls)
    before = parameters(model)
    with pytest.raises(RuntimeError, match="went past the gated loss.*uninstall"):
        trained(model)
    assert all(parameter.grad is None for parameter in model.parameters())
    agree(parameters(model), before)


def test_a_step_past_it_raises_after_one_that_was_gated(installed):
    """What one step made does not vouch for the next."""
    trained(gpt(), steps=1)
    with pytest.raises(RuntimeError, match="went past"):
        trained(gpt(OwnLoss), steps=1)


def test_transformer_engines_loss_raises_in_a_whole_model(installed):
    model = gpt(cross_entropy_loss_fusion=True, cross_entropy_fusion_impl="te")
    with pytest.raises(ValueError, match="native"):
        trained(model)


def test_without_it_a_model_may_have_any_loss():
    megatron.install()
    megatron.uninstall()
    assert len(trained(gpt(OwnLoss), steps=1)) == 1


def test_evaluation_by_the_schedule_is_gated_too(installed):
    _, labels, mask = data()
    model = gpt()
    losses = trained(model, parts=2, steps=1, evaluate=True)
    assert losses == pytest.approx([oracle(own_logits(model), labels, mask)], rel=CLOSE)
