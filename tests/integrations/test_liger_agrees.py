"""install("nll") against Liger's own function, whose kernel runs in Triton's interpreter."""

from __future__ import annotations

import itertools

import liger_kernel.ops.cross_entropy as cross_entropy
import liger_kernel.transformers.functional as functional
import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter

from deft_kernels import objectives
from deft_kernels.integrations import liger

N, D, V = 6, 5, 13


@pytest.fixture
def ligers(monkeypatch):
    """Its kernel asks floats for their dtype and calls a tanh of CUDA's, the interpreter has neither."""
    as_it_was = interpreter._implicit_cvt

    def converted(argument):
        if not isinstance(argument, float):
            return as_it_was(argument)
        return tl.tensor(
            interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32
        )

    def tanh(x):
        return 1.0 - 2.0 / (tl.exp(2.0 * x) + 1.0)

    monkeypatch.setattr(interpreter, "_implicit_cvt", converted)
    monkeypatch.setattr(cross_entropy, "tanh", tanh)
    original = functional.liger_fused_linear_cross_entropy
    yield original
    if functional.liger_fused_linear_cross_entropy is not original:
        liger.uninstall()


def inputs() -> tuple:
    generator = torch.Generator().manual_seed(2)
    hidden, head = (torch.randn(size, D, generator=generator).requires_grad_() for size in (N, V))
    bias = torch.randn(V, generator=generator).requires_grad_()
    return hidden, head, torch.tensor([1, 2, -100, 4, 12, 0]), bias


def result(call, keywords) -> list[torch.Tensor]:
    """Loss, accuracy and gradients, for an upstream that is not 1."""
    hidden, head, target, bias = inputs()
    made = call(hidden, head, target, bias, return_token_accuracy=True, **keywords)
    upstream = torch.linspace(0.5, 2.0, made.loss.numel()).reshape(made.loss.shape)
    (made.loss * upstream).sum().backward()
    return [made.loss.detach(), made.token_accuracy.detach(), hidden.grad, head.grad, bias.grad]


WEIGHTS = torch.linspace(0.2, 3.0, V)
OPTIONS = {
    "ce_weight": (None, WEIGHTS),
    "lse_square_scale": (0.0, 0.1),
    "label_smoothing": (0.0, 0.2),
    "softcap": (None, 2.0),
    "reduction": ("mean", "sum", "none"),
}


@pytest.mark.parametrize("reduction", OPTIONS["reduction"])
def test_every_combination_is_ligers(ligers, reduction):
    liger.install("nll")
    *names, _ = OPTIONS
    for values in itertools.product(*(OPTIONS[name] for name in names)):
        keywords = dict(zip(names, values, strict=True)) | {"reduction": reduction}
        found = result(functional.liger_fused_linear_cross_entropy, keywords)
        wanted = result(ligers, keywords)
        for name, ours, theirs in zip(
            ("loss", "accuracy", "hidden", "head", "bias"), found, wanted, strict=True
        ):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-5, atol=1e-6, msg=lambda m, n=name, k=keywords: f"{n} with {k}: {m}"
            )


def test_the_z_loss_of_a_gated_loss_is_divided_by_the_rows(ligers):
    """Whatever the objective, the z-loss is what Liger would add."""
    liger.install("deft")
    given = {"ce_weight": WEIGHTS, "lse_square_scale": 0.1}
    with_z = result(functional.liger_fused_linear_cross_entropy, given)[0]
    without = result(functional.liger_fused_linear_cross_entropy, {"ce_weight": WEIGHTS})[0]
    theirs = result(ligers, given)[0] - result(ligers, {"ce_weight": WEIGHTS})[0]
    torch.testing.assert_close(with_z - without, theirs, rtol=1e-4, atol=1e-6)


def test_no_rows_to_count(ligers):
    liger.install("nll")
    hidden, head, target, _ = inputs()
    call = functional.liger_fused_linear_cross_entropy
    loss = call(hidden, head, torch.full_like(target, -100), None, WEIGHTS, lse_square_scale=0.1)
    assert loss.item() == 0.0


def test_what_it_cannot_divide_raises(ligers):
    liger.install(objectives.deft().within("p>=0.1"))
    hidden, head, target, _ = inputs()
    with pytest.raises(ValueError, match="lse_square_scale: not available with class weights and a band"):
        functional.liger_fused_linear_cross_entropy(hidden, head, target, None, WEIGHTS, lse_square_scale=0.1)


def test_token_scaling_is_not_quite_dft(ligers):
    """Liger scales by p what it has added up, z-loss and smoothing too; the objective scales itself alone."""
    liger.install("dft")
    call = functional.liger_fused_linear_cross_entropy
    scaled = {"use_token_scaling": True}
    torch.testing.assert_close(result(call, {})[0], result(ligers, scaled)[0])
    both = {"lse_square_scale": 0.1}
    assert result(call, both)[0] > result(ligers, scaled | both)[0] * 1.1
    hidden, head, target, _ = inputs()
    with pytest.raises(ValueError, match=r'use_token_scaling.*install\("dft"\), which leaves z-loss'):
        call(hidden, head, target, use_token_scaling=True)
