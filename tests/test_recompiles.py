"""Numbers under torch.compile: which are constants of the graph, and which may change from call to call."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter

from deft_kernels import deft_loss

LOGITS, LABELS = torch.randn(4, 7), torch.tensor([0, 3, 6, 2])


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled(name: str, values: list) -> int:
    """The number of graphs made for calls with these values of one keyword, each checked."""
    counter = CompileCounter()
    call = torch.compile(lambda z, value: deft_loss(z, LABELS, **{name: value}), backend=counter)
    for value in values:
        assert torch.equal(call(LOGITS, value), deft_loss(LOGITS, LABELS, **{name: value}))
    return counter.frame_count


@pytest.mark.parametrize("name", ["temperature", "logit_scale", "z_loss"])
def test_each_new_value_is_compiled(name):
    assert compiled(name, [0.25, 0.5, 0.75, 0.25]) == 3


@pytest.mark.parametrize(
    ("values", "graphs"),
    [
        ([2.0, 3.0, 4.5, 5.0, 6.0], 2),
        ([2, 3, 4, 5, 6], 2),
        ([torch.tensor(float(n)) for n in range(2, 7)], 1),
    ],
    ids=["floats", "ints", "tensors"],
)
def test_a_number_of_items_may_change(values, graphs):
    assert compiled("num_items", values) <= graphs


@pytest.mark.parametrize(("name", "value"), [("temperature", np.float32(1.5)), ("ignore_index", np.int64(3))])
def test_numbers_of_numpy(name, value):
    compiled(name, [value])
