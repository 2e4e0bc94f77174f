"""`num_items` as a tensor, which a trainer makes by counting: as strict as a number if the host sees it."""

from __future__ import annotations

import math

import pytest
import torch

from deft_kernels import deft_loss, fused_linear_deft_loss

CALLS = {
    "logits": lambda labels, num_items: deft_loss(torch.ones(3, 5), labels, num_items=num_items),
    "hidden": lambda labels, num_items: fused_linear_deft_loss(
        torch.ones(3, 2), torch.ones(5, 2), labels, num_items=num_items
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("wrong", [-1, -0.5, -math.inf, math.nan, math.inf, 1e20])
def test_a_number_that_counts_nothing_raises(call, wrong):
    labels = torch.tensor([1, 2, 3])
    for given in (torch.tensor(wrong), torch.tensor([wrong])):
        with pytest.raises(ValueError, match=r"num_items: expected .*, got (-|nan|inf|1)"):
            call(labels, given)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_complex_number_raises(call):
    with pytest.raises(TypeError, match=r"^num_items: expected a real dtype, got torch\.complex64"):
        call(torch.tensor([1, 2, 3]), torch.tensor(1 + 1j))


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_count_divides(call):
    labels = torch.tensor([1, 2, 3])
    for given in (torch.tensor(6), torch.tensor([6.0]), torch.tensor(6, dtype=torch.int32)):
        torch.testing.assert_close(call(labels, given), call(labels, 6))


def test_compiled_and_differentiable_numbers_are_taken():
    labels, logits = torch.tensor([1, 2, 3]), torch.randn(3, 5)
    number = torch.tensor(6.0, requires_grad=True)
    deft_loss(logits, labels, num_items=number).backward()
    assert number.grad is not None

    def loss(logits, labels, number):
        return deft_loss(logits, labels, num_items=number)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits, labels, torch.tensor(6)), loss(logits, labels, 6))
