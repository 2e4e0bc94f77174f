"""What a model's class, or a trainer's, does beside its loss: repeated, taken into account or refused."""

from __future__ import annotations

import pytest
import torch
import transformers
from tiny import SIZES, V, arguments, batch, examples, llama, losses, trainer
from transformers import Trainer

from deft_kernels import deft_loss
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics
from deft_kernels.integrations.transformers import (
    ComputeLoss,
    apply,
    patch_model,
    set_loss_function,
    unpatch_model,
)


def qwen():
    """Its class has accepts_loss_kwargs = False: a Trainer gives no number of items to its forward."""
    torch.manual_seed(0)
    text = {
        **{name: SIZES[name] for name in SIZES if name not in ("head_dim", "pad_token_id", "bos_token_id")},
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
    }
    text |= {"bos_token_id": 1}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(
        text_config=text, vision_config={**vision, "fullatt_block_indexes": [0]},
        image_token_id=58, video_token_id=59, vision_start_token_id=56, vision_end_token_id=57,
    )  # fmt: skip
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


@pytest.mark.parametrize("give", [set_loss_function, patch_model])
def test_accumulated_batches_of_a_model_that_takes_no_number_of_items(give, tmp_path):
    """They once were a mean of the batches' means, without an error."""
    found = []
    for batches in (1, 4):
        model, statistics = qwen(), RunningStatistics()
        give(model, statistics=statistics)
        settings = {"per_device_train_batch_size": 8 // batches, "gradient_accumulation_steps": batches}
        run = trainer(tmp_path, model, callbacks=[StatisticsCallback(statistics)], **settings)
        run.train()
        found.append(losses(run))
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    unpatch_model(model)
    assert model.accepts_loss_kwargs is False


def test_a_padded_vocabulary_that_the_model_cuts_off():
    """By a slice that a head of 64 words does not show."""
    config = transformers.AutoConfig.for_model(
        "inkling_text", vocab_size=256, unpadded_vocab_size=200, hidden_size=16, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8, swa_num_attention_heads=2,
        swa_num_key_value_heads=1, swa_head_dim=8, d_rel=4, rel_extent=32, intermediate_size=24,
        moe_intermediate_size=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1,
        sliding_window_size=8, logits_mup_width_multiplier=1.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="does more to its logits than patch_model can repeat"):
        patch_model(transformers.InklingForCausalLM(config))


def bamba(z_loss):
    torch.manual_seed(0)
    config = transformers.BambaConfig(
        **{name: value for name, value in SIZES.items() if name != "head_dim"}, attn_layer_indices=[1],
        mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8, mamba_chunk_size=4,
        z_loss_coefficient=z_loss,
    )  # fmt: skip
    return transformers.BambaForCausalLM(config)


def test_a_term_that_the_model_adds_to_its_loss(tmp_path):
    for refused in (patch_model, lambda model: apply(trainer(tmp_path, model))):
        with pytest.raises(ValueError, match="BambaForCausalLM adds a term to its loss"):
            refused(bamba(0.1))
        refused(bamba(0.0))
    set_loss_function(bamba(0.1))


def bart():
    torch.manual_seed(0)
    config = transformers.BartConfig(
        vocab_size=V, d_model=16, decoder_layers=1, decoder_attention_heads=2, decoder_ffn_dim=24,
        init_std=0.4, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        max_position_embeddings=32,
    )  # fmt: skip
    return transformers.BartForCausalLM(config)


ALIGNED = [{**row, "labels": row["input_ids"].roll(-1)} for row in examples()]


def of_aligned(model) -> float:
    rows = {name: torch.stack([row[name] for row in ALIGNED[:8]]) for name in ALIGNED[0]}
    with torch.no_grad():
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
    return float(deft_loss(logits.double(), rows["labels"], backend="reference"))


@pytest.mark.parametrize("make", [bart, llama])
def test_aligned_labels_of_a_decoder_are_all_counted(make, tmp_path):
    """The trainer counts labels[..., 1:] for a causal class; the loss is of all of them."""
    model = make()
    expected = of_aligned(model)
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=ALIGNED)
    apply(run, shift=False)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]

    bare = Trainer(model=make(), args=arguments(tmp_path, max_steps=1), train_dataset=ALIGNED)
    bare.compute_loss_func = ComputeLoss(shift=False)
    if getattr(bare, "_loss_shifts_labels", False):
        with pytest.raises(ValueError, match="^shift: is False, and the trainer leaves"):
            bare.train()


def test_aligned_labels_by_the_models_own_loss_function(tmp_path):
    model = llama()
    expected = of_aligned(model)
    set_loss_function(model, shift=False)
    run = Trainer(model=model, args=arguments(tmp_path, max_steps=1), train_dataset=ALIGNED)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]
    unpatch_model(model)
    assert model.loss_type == "ForCausalLM"


def test_a_trainer_whose_own_loss_is_a_mean_of_each_batch(tmp_path):
    class Means(Trainer):
        loss_is_scaled_for_ga = False

    settings = arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    with pytest.raises(ValueError, match="^loss_is_scaled_for_ga: is False on Means"):
        apply(Means(model=llama(), args=settings, train_dataset=examples()))
    apply(Means(model=llama(), args=arguments(tmp_path), train_dataset=examples()))


def test_unpatching_puts_the_users_own_loss_function_back():
    def own(logits, labels, vocab_size, **_others):
        return logits.sum() * 0 + 7.0

    model = llama().train()
    model.loss_function = own
    set_loss_function(model)
    unpatch_model(model)
    assert model.loss_function is own and model(**batch()).loss.item() == 7.0


@pytest.mark.parametrize("give", [set_loss_function, patch_model])
def test_a_frozen_model_trains_on_after_a_step_that_raised(give):
    """As auto_find_batch_size does after one that ran out of memory."""
    model = llama().train()
    for parameter in model.model.parameters():
        parameter.requires_grad_(False)
    give(model)
    rows = batch()
    with pytest.raises(IndexError, match="labels: 999"):
        model(**{**rows, "labels": rows["labels"].index_fill(1, torch.tensor([5]), 999)})
    model(**rows).loss.backward()
    assert model.lm_head.weight.grad is not None
