"""What the routes through transformers refuse, with what to do instead."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from routes import ROUTES, prepared
from tiny import SIZES, V, batch, examples, llama, losses, oracle, parameters, trainer
from transformers import (
    BartConfig,
    BartForCausalLM,
    BartForConditionalGeneration,
    LlamaForCausalLM,
    LlamaForTokenClassification,
    MixtralConfig,
    MixtralForCausalLM,
)

from deft_kernels import objectives, reference
from deft_kernels.integrations import liger
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics


def test_a_trainer_left_as_it_was_by_a_wrong_flag(tmp_path):
    run = trainer(tmp_path, llama())
    with pytest.raises(TypeError, match="^log_statistics: expected True or False"):
        integration.apply(run, log_statistics="no")
    assert run.compute_loss_func is None


def test_a_lora_head():
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    with pytest.raises(ValueError, match="remove 'lm_head' from target_modules"):
        integration.patch_model(peft.get_peft_model(llama(), config))
    # The adapter may also come after the patch.
    model = llama().train()
    integration.patch_model(model)
    adapted = peft.get_peft_model(model, config)
    with pytest.raises(ValueError, match="remove 'lm_head' from target_modules"):
        adapted(**batch())
    # On the model's own logits it is part of them.
    integration.set_loss_function(peft.get_peft_model(llama(), config))


def test_label_smoothing_of_the_trainer(tmp_path):
    with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
        integration.apply(trainer(tmp_path, llama(), label_smoothing_factor=0.1))
    for route in ROUTES[1:]:
        run = prepared(route, tmp_path, label_smoothing_factor=0.1)
        with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
            run.train()


def test_settings_that_void_a_bare_compute_loss_func(tmp_path):
    """Given to the trainer without apply(), it sees them when it is called."""
    run = trainer(tmp_path, llama(), label_smoothing_factor=0.1)
    run.compute_loss_func = integration.ComputeLoss("deft")
    before = parameters(run.model)
    with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


@pytest.mark.parametrize("route", ROUTES)
def test_accumulated_gradients_that_would_be_divided_twice(route, tmp_path):
    """As by transformers 5.2 to 5.5.3, which leave accelerate the number of steps."""
    model = llama()
    if route == "loss_function":
        integration.set_loss_function(model)
    elif route == "patch_model":
        integration.patch_model(model)
    run = trainer(tmp_path, model, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    run.accelerator.gradient_accumulation_steps = 4
    with pytest.raises(ValueError, match="gradient_accumulation_steps.*transformers>=5.5.4"):
        if route == "compute_loss_func":
            integration.apply(run)
        else:
            StatisticsCallback(RunningStatistics()).add_to(run)


@pytest.mark.parametrize("route", ROUTES[1:])
def test_labels_taken_out_of_the_forward(route, tmp_path):
    """Without the callback that looks at the settings: the step itself must not train anything else."""
    model = llama()
    give = integration.set_loss_function if route == "loss_function" else integration.patch_model
    give(model)
    run = trainer(tmp_path, model, label_smoothing_factor=0.1)
    before = parameters(model)
    with pytest.raises((RuntimeError, ValueError), match="label_smoothing="):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_frozen_backbone_is_watched_too(tmp_path):
    model = llama()
    model.model.requires_grad_(False)
    integration.set_loss_function(model)
    with pytest.raises(RuntimeError, match="went past the gated loss"):
        trainer(tmp_path, model, label_smoothing_factor=0.1).train()
    integration.unpatch_model(model)
    integration.patch_model(model)
    trainer(tmp_path, model).train()


def test_a_loss_that_is_never_called(tmp_path):
    run = trainer(tmp_path, llama())
    StatisticsCallback(RunningStatistics()).add_to(run)
    before = parameters(run.model)
    with pytest.raises(RuntimeError, match="never called"):
        run.train()
    assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())


def test_two_losses(tmp_path):
    model = llama()
    integration.patch_model(model)
    with pytest.raises(ValueError, match="call unpatch_model"):
        integration.set_loss_function(model)
    run = trainer(tmp_path, llama())
    integration.apply(run)
    with pytest.raises(ValueError, match="compute_loss_func: the trainer has one"):
        integration.apply(run)
    # compute_loss_func on a patched model: the labels never reach the forward.
    run = trainer(tmp_path, model)
    integration.apply(run)
    with pytest.raises(ValueError, match="Leave out compute_loss_func"):
        run.train()


def test_an_auxiliary_router_loss(tmp_path):
    sizes = {**SIZES, "num_local_experts": 2, "num_experts_per_tok": 1, "output_router_logits": True}
    torch.manual_seed(0)
    model = MixtralForCausalLM(MixtralConfig(**sizes)).train()
    with pytest.raises(ValueError, match="output_router_logits.*set_loss_function"):
        integration.patch_model(model)
    outputs = model(**{name: x for name, x in batch().items() if name != "labels"})
    with pytest.raises(ValueError, match="output_router_logits.*set_loss_function"):
        integration.compute_loss_func(outputs, batch()["labels"])
    # The remedy: the model adds its auxiliary loss to the gated one.
    expected = oracle(model, batch())
    integration.set_loss_function(model)
    outputs = model(**batch())
    added = model.router_aux_loss_coef * outputs.aux_loss.item()
    assert outputs.loss.item() == pytest.approx(expected + added, rel=1e-5)


@pytest.mark.parametrize("odd", [lambda z: z.clamp(-5, 5), lambda z: F.dropout(z, 0.1), lambda z: z - 1])
def test_logits_that_are_more_than_a_product(odd):
    class Odd(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = odd(outputs.logits)
            return outputs

    model = Odd(llama().config)
    with pytest.raises(ValueError, match="set_loss_function"):
        integration.patch_model(model)
    assert "forward" not in vars(model.model), "the probe left something behind"


def test_a_head_with_dropout_that_only_training_shows():
    class Dropped(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            outputs = super().forward(*args, **kwargs)
            outputs.logits = F.dropout(outputs.logits, 0.1, self.training)
            return outputs

    model = Dropped(llama().config).eval()
    with pytest.raises(ValueError, match="set_loss_function"):
        integration.patch_model(model)
    assert not any(module.training for module in model.modules())


def test_what_is_no_plain_model():
    with pytest.raises(TypeError, match="expects a transformers model"):
        integration.patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="before torch.compile"):
        integration.patch_model(torch.compile(llama()))
    model = llama()
    model.forward = model.forward
    with pytest.raises(ValueError, match="replaced already"):
        integration.patch_model(model)


def test_keywords():
    for give in (integration.patch_model, integration.set_loss_function):
        with pytest.raises(TypeError, match="reduction: not a keyword"):
            give(llama(), reduction="sum")
        with pytest.raises(ValueError, match="objective: unknown name"):
            give(llama(), "deff")
        with pytest.raises(TypeError, match="statistics: expected a RunningStatistics"):
            give(llama(), statistics={})
    with pytest.raises(TypeError, match="label_smoothing: give it to ForCausalLM"):
        integration.for_causal_lm(torch.zeros(1, 2, V), torch.zeros(1, 2).long(), V, label_smoothing=0.1)
    with pytest.raises(ValueError, match="vocab_size"):
        integration.for_causal_lm(torch.zeros(1, 2, V), torch.zeros(1, 2).long(), V + 1)


@pytest.mark.parametrize(("name", "value"), [
    ("temperature", "1"), ("temperature", 0), ("backend", "cuda"), ("z_loss", -0.1), ("label_smoothing", 1.5),
    ("inplace", 1), ("chunk_bytes", 0), ("skip_ignored", None), ("weight", torch.zeros(V, V)),
    ("class_weight", torch.zeros(V).long()), ("weight", torch.zeros(V, requires_grad=True)),
])  # fmt: skip
def test_values_are_refused_where_they_are_written(name, value):
    """Not in the first training step, which comes when the data has been read."""
    gives = (
        lambda **k: integration.patch_model(llama(), **k),
        lambda **k: integration.set_loss_function(llama(), **k),
        lambda **k: integration.ComputeLoss(**k),
        lambda **k: liger.install(**k),
    )
    taken = 0
    for give in gives:
        with pytest.raises((TypeError, ValueError), match=f"^{name}: ") as error:
            give(**{name: value})
        taken += "not a keyword" not in str(error.value)
    assert taken


def test_outputs_and_labels():
    logits, labels = torch.zeros(1, 2, V), torch.zeros(1, 2).long()
    with pytest.raises(ValueError, match="outputs: hold no logits"):
        integration.compute_loss_func({"loss": logits.sum()}, labels)
    with pytest.raises(ValueError, match="labels: None"):
        integration.compute_loss_func({"logits": logits}, None)


def test_calls_of_a_patched_model():
    model = llama().train()
    integration.patch_model(model)
    rows = batch(2)
    with pytest.raises(ValueError, match="labels: a training forward"):
        model(input_ids=rows["input_ids"])
    with pytest.raises(ValueError, match="return_dict"):
        model(**rows, return_dict=False)
    with pytest.raises(ValueError, match="logits_to_keep"):
        model(**rows, logits_to_keep=1)


BART = {
    "vocab_size": V,
    "d_model": 16,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "max_position_embeddings": 32,
}
BART |= {f"{part}_{name}": 2 for part in ("encoder", "decoder") for name in ("attention_heads", "ffn_dim")}


def bart(make):
    torch.manual_seed(0)
    return make(BartConfig(**BART, dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2))


@pytest.mark.parametrize("make", [BartForCausalLM, BartForConditionalGeneration])
def test_models_whose_labels_are_aligned(make, tmp_path):
    for give in (integration.patch_model, integration.set_loss_function):
        with pytest.raises(ValueError, match=r"shift: .* aligned.*apply\(trainer, shift=False\)"):
            give(bart(make))
    run = trainer(tmp_path, bart(make))
    with pytest.raises(ValueError, match="shift: .* aligned"):
        integration.apply(run)
    run.compute_loss_func = integration.compute_loss_func
    with pytest.raises(ValueError, match="shift: .* aligned"):
        run.train()


def test_models_of_another_task(tmp_path):
    model = LlamaForTokenClassification(llama().config)
    with pytest.raises(ValueError, match="shift: .* aligned"):
        integration.apply(trainer(tmp_path, model))
    with pytest.raises(ValueError, match="shift: .* aligned"):
        integration.patch_model(model)


def test_an_encoder_decoder_without_the_decoders_input(tmp_path):
    """The trainer takes the labels away from the model, which would decode its input instead of them."""
    model = bart(BartForConditionalGeneration)
    run = trainer(tmp_path, model)
    integration.apply(run, shift=False)
    with pytest.raises(ValueError, match="decoder_input_ids.*DataCollatorForSeq2Seq"):
        run.train()
    rows = examples()
    for row in rows:
        row["decoder_input_ids"] = F.pad(row["input_ids"][:-1], (1, 0), value=2)
    run = trainer(tmp_path, model, max_steps=1)
    run.train_dataset = rows
    integration.apply(run, shift=False)
    first = {name: torch.stack([row[name] for row in rows[:8]]) for name in rows[0]}
    labels = first.pop("labels")
    with torch.no_grad():
        expected, _ = reference.loss(
            model.eval()(**first).logits.double(), labels, objective=objectives.resolve("deft")
        )
    run.train()
    assert losses(run) == [pytest.approx(float(expected), rel=1e-5)]


def test_what_is_no_trainer_and_no_tensor():
    for wrong in (None, llama()):
        with pytest.raises(TypeError, match="trainer: expected a transformers Trainer"):
            integration.apply(wrong)
    with pytest.raises(TypeError, match="class_weight: expected a Tensor"):
        integration.patch_model(llama(), class_weight=[1.0, 2.0])
    with pytest.raises(TypeError, match="weight: expected a Tensor"):
        integration.ComputeLoss(weight=[1.0, 2.0])
    with pytest.raises(TypeError, match="shift: expected a bool"):
        integration.ComputeLoss(shift="no")
