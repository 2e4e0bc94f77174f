"""A model's own forward with the gated loss in it: what it is given, what it repeats, and taking it back."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import SIZES, V, batch, llama, oracle
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.running import RunningStatistics

FAMILIES = {
    "gemma2": (Gemma2ForCausalLM, Gemma2Config, {"final_logit_softcapping": 2.0}),
    "cohere": (CohereForCausalLM, CohereConfig, {"logit_scale": 0.25}),
    "granite": (GraniteForCausalLM, GraniteConfig, {"logits_scaling": 3.0}),
    "tied": (LlamaForCausalLM, LlamaConfig, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_the_model_does_to_its_logits_is_repeated(family):
    make, config, settings = FAMILIES[family]
    torch.manual_seed(0)
    model = make(config(**{**SIZES, **settings})).train()
    other = copy.deepcopy(model)
    integration.set_loss_function(other)
    expected = oracle(model, batch())
    integration.patch_model(model)
    loss, wanted = model(**batch()).loss, other(**batch()).loss
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    loss.backward(), wanted.backward()
    gradients = {name: p.grad for name, p in other.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-4, atol=1e-7)


def test_patching_takes_positional_arguments_and_aligned_labels():
    model = llama().train()
    rows = batch()
    expected = oracle(model, rows)
    integration.patch_model(model)
    outputs = model(rows["input_ids"], rows["attention_mask"], labels=rows["labels"])
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    aligned = F.pad(rows["labels"], (0, 1), value=-100)[:, 1:]
    outputs = model(input_ids=rows["input_ids"], labels=rows["labels"], shift_labels=aligned)
    assert outputs.loss.item() == pytest.approx(expected, rel=1e-5)
    assert outputs.logits is None


def test_patching_takes_the_calls_ignore_index_and_no_keyword_of_the_loss():
    rows = batch()
    rows["labels"][rows["labels"] == -100] = 7
    results = []
    for give in (integration.set_loss_function, integration.patch_model):
        model = llama().train()
        give(model)
        results.append(model(**rows, ignore_index=7).loss.item())
        with pytest.raises(TypeError, match="label_smoothing: give it to"):
            model(**rows, label_smoothing=0.1)
    rows["labels"][rows["labels"] == 7] = -100
    assert results == [pytest.approx(oracle(llama(), rows), rel=1e-5)] * 2


def test_for_causal_lm_takes_aligned_labels():
    logits, labels = torch.randn(2, 5, V), torch.randint(0, V, (2, 5))
    aligned = F.pad(labels, (0, 1), value=-100)[:, 1:]
    loss = integration.for_causal_lm(logits, labels, V)
    assert torch.equal(loss, integration.for_causal_lm(logits, None, V, shift_labels=aligned))
    doubled = integration.for_causal_lm(logits, labels, V, num_items_in_batch=torch.tensor(4))
    torch.testing.assert_close(doubled, loss * 2)


def test_a_batch_without_labels_is_zero():
    rows = batch()
    rows["labels"].fill_(-100)
    for give in (integration.set_loss_function, integration.patch_model):
        model = llama().train()
        give(model)
        loss = model(**rows, num_items_in_batch=torch.tensor(0)).loss
        loss.backward()
        assert loss.item() == 0.0
        assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


def test_a_copy_of_a_patched_model_trains_itself():
    model = llama().train()
    for give in (integration.patch_model, integration.set_loss_function):
        give(model)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        other(**batch()).loss.backward()
        assert all(p.grad is None for p in model.parameters())
        assert other.lm_head.weight.grad.any()
        integration.unpatch_model(model)
        model = other
        integration.unpatch_model(model)
        model.zero_grad()


def test_unpatching_restores_the_model():
    for give in (integration.patch_model, integration.set_loss_function):
        model = llama().train()
        before = model(**batch()).loss.item()
        give(model)
        assert model(**batch()).loss.item() != pytest.approx(before, rel=1e-2)
        integration.unpatch_model(model)
        assert model(**batch()).loss.item() == before
        with pytest.raises(ValueError, match="no gated loss"):
            integration.unpatch_model(model)


def test_generation_of_a_patched_model_is_its_own():
    model = llama()
    ids = batch(2)["input_ids"]
    before = model.generate(ids, max_new_tokens=4, do_sample=False)
    integration.patch_model(model)
    model.train()
    assert torch.equal(before, model.generate(ids, max_new_tokens=4, do_sample=False))


def test_keywords_reach_the_loss():
    rows = batch()
    plain = {}
    for name, value in {"temperature": 2.0, "z_loss": 0.1, "label_smoothing": 0.2}.items():
        results = []
        for give in (integration.patch_model, integration.set_loss_function):
            model = llama().train()
            give(model, **{name: value})
            results.append(model(**rows).loss.item())
        assert results[0] == pytest.approx(results[1], rel=1e-5)
        plain[name] = results[0]
    assert len({round(value, 3) for value in (*plain.values(), oracle(llama(), rows))}) == 4


def test_own_objectives_and_their_statistics():
    statistics = RunningStatistics()
    model = llama().train()
    integration.patch_model(model, lambda r: -r.logp, statistics=statistics)
    assert model(**batch()).loss.item() == pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)
    assert set(statistics.means()) == {"nll", "mean_entropy", "top1"}
    assert statistics.means() == {}


def test_models_without_a_prefix_or_whose_backbone_is_called_by_parts():
    torch.manual_seed(0)
    sizes = {"vocab_size": V, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1, "dropout": 0.0}
    opt = OPTForCausalLM(OPTConfig(**sizes, num_attention_heads=2, word_embed_proj_dim=8)).train()

    class NoPrefix(LlamaForCausalLM):
        base_model_prefix = "language_model"

    for model in (opt, NoPrefix(llama().config).train()):
        expected = oracle(model, batch())
        integration.patch_model(model)
        assert model(**batch()).loss.item() == pytest.approx(expected, rel=1e-5)
