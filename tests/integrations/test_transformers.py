"""The three routes through transformers' own Trainer, on a CPU."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from tiny import SIZES, V, batch, examples, llama, losses, oracle, parameters, trainer
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from deft_kernels import objectives
from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

ROUTES = ("compute_loss_func", "loss_function", "patch_model")


def prepared(route, folder, model=None, objective="deft", **settings):
    """A Trainer that trains `objective` by one of the routes, with its statistics logged."""
    model = llama() if model is None else model
    if route == "compute_loss_func":
        run = trainer(folder, model, **settings)
        integration.apply(run, objective)
        return run
    statistics = RunningStatistics()
    give = integration.set_loss_function if route == "loss_function" else integration.patch_model
    give(model, objective, statistics=statistics)
    run = trainer(folder, model, **settings)
    StatisticsCallback(statistics).add_to(run)
    return run


@pytest.mark.parametrize("objective", ["deft", "eaft", objectives.tsallis(0.5), "nll"], ids=str)
@pytest.mark.parametrize("route", ROUTES)
def test_the_first_loss_is_the_oracles(route, objective, tmp_path):
    expected = oracle(llama(), batch(), objective)
    run = prepared(route, tmp_path, objective=objective, max_steps=1)
    run.train()
    assert losses(run) == [pytest.approx(expected, rel=1e-5)]


@pytest.mark.parametrize("route", ROUTES)
def test_a_batch_of_8_is_4_of_2_accumulated(route, tmp_path):
    whole = prepared(route, tmp_path)
    whole.train()  # before the other is made: what accelerate divides by is shared in a process
    parts = prepared(route, tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    parts.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-5)
    start, end = parameters(llama()), parameters(parts.model)
    for name, parameter in parameters(whole.model).items():
        torch.testing.assert_close(parameter, end[name])
        assert not torch.equal(parameter, start[name]), f"{name} was not trained"


@pytest.mark.parametrize("route", ROUTES)
def test_all_routes_give_the_parameters_of_a_loop_over_the_logits(route, tmp_path):
    model = llama().train()
    for step in range(3):
        rows = {name: values[8 * step : 8 * step + 8] for name, values in batch(24).items()}
        logits = model(input_ids=rows["input_ids"], attention_mask=rows["attention_mask"]).logits
        logp = F.log_softmax(logits[:, :-1].double(), -1)
        labels = rows["labels"][:, 1:]
        chosen = logp.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        alpha = logp.exp().square().sum(-1).detach()
        loss = (((1 - (alpha * chosen).exp()) / alpha)[labels != -100]).mean()
        model.zero_grad()
        loss.backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
    run = prepared(route, tmp_path)
    run.train()
    trained = parameters(run.model)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(trained[name], parameter.detach(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("route", ROUTES)
def test_evaluation(route, tmp_path):
    """Gated where the loss is over logits, the model's own where it is inside a patched forward."""
    model = llama()
    plain, gated = oracle(model, batch(), "nll"), oracle(model, batch())
    run = prepared(route, tmp_path, model)
    metrics = run.evaluate()
    assert metrics["eval_loss"] == pytest.approx(plain if route == "patch_model" else gated, rel=1e-5)
    logged = run.state.log_history[-1]
    if route == "patch_model":
        assert "eval_nll" not in logged
    else:
        assert logged["eval_nll"] == pytest.approx(plain, rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_the_logs_have_plain_cross_entropy_and_the_gate(route, tmp_path):
    model = llama()
    rows = batch()
    plain = oracle(model, rows, "nll")
    with torch.no_grad():
        p = model(input_ids=rows["input_ids"]).logits[:, :-1].softmax(-1)
    labels = rows["labels"][:, 1:]
    valid = labels != -100
    p_y = p.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    alpha = p.square().sum(-1)
    run = prepared(route, tmp_path, model, max_steps=2)
    run.train()
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    expected = {
        "nll": plain,
        "mean_alpha": alpha[valid].mean().item(),
        "mean_gate": (p_y**alpha)[valid].mean().item(),
        "mean_entropy": -(p * p.log()).sum(-1)[valid].mean().item(),
        "top1": (p.argmax(-1) == labels)[valid].float().mean().item(),
    }
    assert {name: first[name] for name in expected} == pytest.approx(expected, rel=1e-5)


def test_accumulated_statistics_are_means_over_tokens(tmp_path):
    run = prepared(
        "patch_model", tmp_path, max_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=4
    )
    run.train()
    assert losses(run, "nll") == [pytest.approx(oracle(llama(), batch(), "nll"), rel=1e-5)]


@pytest.mark.parametrize("route", ROUTES)
def test_lora(route, tmp_path):
    import peft

    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
    torch.manual_seed(0)
    model = peft.get_peft_model(llama(), config)
    expected = oracle(model, batch())
    before = parameters(model)
    run = prepared(route, tmp_path, model)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    for name, parameter in parameters(run.model).items():
        assert torch.equal(parameter, before[name]) == ("lora" not in name), name


@pytest.mark.parametrize("route", ROUTES)
def test_a_head_that_peft_trains_whole(route, tmp_path):
    """modules_to_save: the copy that PEFT trains is the head, and the one it was copied from stays."""
    import peft

    settings = {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"], "init_lora_weights": False}
    model = peft.get_peft_model(llama(), peft.LoraConfig(**settings, r=2))
    expected, before = oracle(model, batch()), parameters(model)
    run = prepared(route, tmp_path, model)
    run.train()
    assert losses(run)[0] == pytest.approx(expected, rel=1e-5)
    trained = {name for name, p in parameters(model).items() if not torch.equal(p, before[name])}
    assert {name for name in trained if "lora" not in name} == {
        "base_model.model.lm_head.modules_to_save.default.weight"
    }


@pytest.mark.parametrize("route", ROUTES)
def test_torch_compile(route, tmp_path, pytestconfig):
    eager = prepared(route, tmp_path, llama(num_hidden_layers=1))
    settings = {"torch_compile": True, "torch_compile_backend": pytestconfig.getoption("compile_backend")}
    compiled = prepared(route, tmp_path, llama(num_hidden_layers=1), **settings)
    eager.train(), compiled.train()
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-5)
    assert losses(compiled, "nll") == pytest.approx(losses(eager, "nll"), rel=1e-5)


@pytest.mark.parametrize("route", ROUTES)
def test_gradient_checkpointing_and_bf16(route, tmp_path):
    plain = prepared(route, tmp_path)
    saved = prepared(route, tmp_path, gradient_checkpointing=True)
    mixed = prepared(route, tmp_path, bf16=True)
    plain.train(), saved.train(), mixed.train()
    assert losses(saved) == pytest.approx(losses(plain), rel=1e-5)
    # bf16 logits near 5 are off by up to 2^-7; a mean over 50 tokens by less than that.
    assert losses(mixed) == pytest.approx(losses(plain), abs=2**-7)


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


class TestRefusals:
    def test_a_lora_head(self):
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

    def test_label_smoothing_of_the_trainer(self, tmp_path):
        with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
            integration.apply(trainer(tmp_path, llama(), label_smoothing_factor=0.1))
        for route in ROUTES[1:]:
            run = prepared(route, tmp_path, label_smoothing_factor=0.1)
            with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
                run.train()

    def test_settings_that_void_a_bare_compute_loss_func(self, tmp_path):
        """Given to the trainer without apply(), it sees them when it is called."""
        run = trainer(tmp_path, llama(), label_smoothing_factor=0.1)
        run.compute_loss_func = integration.ComputeLoss("deft")
        before = parameters(run.model)
        with pytest.raises(ValueError, match="label_smoothing_factor.*pass label_smoothing="):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    @pytest.mark.parametrize("route", ROUTES)
    def test_accumulated_gradients_that_would_be_divided_twice(self, route, tmp_path):
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
    def test_labels_taken_out_of_the_forward(self, route, tmp_path):
        """Without the callback that looks at the settings: the step itself must not train anything else."""
        model = llama()
        give = integration.set_loss_function if route == "loss_function" else integration.patch_model
        give(model)
        run = trainer(tmp_path, model, label_smoothing_factor=0.1)
        before = parameters(model)
        with pytest.raises((RuntimeError, ValueError), match="label_smoothing="):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_a_frozen_backbone_is_watched_too(self, tmp_path):
        model = llama()
        model.model.requires_grad_(False)
        integration.set_loss_function(model)
        with pytest.raises(RuntimeError, match="went past the gated loss"):
            trainer(tmp_path, model, label_smoothing_factor=0.1).train()
        integration.unpatch_model(model)
        integration.patch_model(model)
        trainer(tmp_path, model).train()

    def test_a_loss_that_is_never_called(self, tmp_path):
        run = trainer(tmp_path, llama())
        StatisticsCallback(RunningStatistics()).add_to(run)
        before = parameters(run.model)
        with pytest.raises(RuntimeError, match="never called"):
            run.train()
        assert all(torch.equal(p, before[name]) for name, p in run.model.named_parameters())

    def test_two_losses(self, tmp_path):
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

    def test_an_auxiliary_router_loss(self, tmp_path):
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
    def test_logits_that_are_more_than_a_product(self, odd):
        class Odd(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                outputs = super().forward(*args, **kwargs)
                outputs.logits = odd(outputs.logits)
                return outputs

        model = Odd(llama().config)
        with pytest.raises(ValueError, match="set_loss_function"):
            integration.patch_model(model)
        assert "forward" not in vars(model.model), "the probe left something behind"

    def test_a_head_with_dropout_that_only_training_shows(self):
        class Dropped(LlamaForCausalLM):
            def forward(self, *args, **kwargs):
                outputs = super().forward(*args, **kwargs)
                outputs.logits = F.dropout(outputs.logits, 0.1, self.training)
                return outputs

        model = Dropped(llama().config).eval()
        with pytest.raises(ValueError, match="set_loss_function"):
            integration.patch_model(model)
        assert not any(module.training for module in model.modules())

    def test_what_is_no_plain_model(self):
        with pytest.raises(TypeError, match="expects a transformers model"):
            integration.patch_model(torch.nn.Linear(2, 2))
        with pytest.raises(TypeError, match="before torch.compile"):
            integration.patch_model(torch.compile(llama()))
        model = llama()
        model.forward = model.forward
        with pytest.raises(ValueError, match="replaced already"):
            integration.patch_model(model)

    def test_keywords(self):
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

    def test_outputs_and_labels(self):
        logits, labels = torch.zeros(1, 2, V), torch.zeros(1, 2).long()
        with pytest.raises(ValueError, match="outputs: hold no logits"):
            integration.compute_loss_func({"loss": logits.sum()}, labels)
        with pytest.raises(ValueError, match="labels: None"):
            integration.compute_loss_func({"logits": logits}, None)

    def test_calls_of_a_patched_model(self):
        model = llama().train()
        integration.patch_model(model)
        rows = batch(2)
        with pytest.raises(ValueError, match="labels: a training forward"):
            model(input_ids=rows["input_ids"])
        with pytest.raises(ValueError, match="return_dict"):
            model(**rows, return_dict=False)
        with pytest.raises(ValueError, match="logits_to_keep"):
            model(**rows, logits_to_keep=1)


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


def test_the_dataset_has_prompts_of_different_lengths():
    counts = {int((row["labels"] != -100).sum()) for row in examples(8)}
    assert len(counts) == 8
