"""PyTorch's sample inputs of nn.CrossEntropyLoss, out of its wheel, with this package's loss in its place.

Run by `run.sh samples`; needs expecttest, which PyTorch's test modules import.
"""

from __future__ import annotations

import adapters
import pytest
import torch
from torch.testing._internal import common_modules as modules

(INFO,) = (info for info in modules.module_db if info.module_cls is torch.nn.CrossEntropyLoss)
DTYPES = (torch.float64, torch.float32)


def samples(dtype: torch.dtype) -> list[modules.ModuleInput]:
    torch.manual_seed(0)
    return INFO.module_inputs_func(INFO, "cpu", dtype, True, True)


@pytest.mark.parametrize("index", range(len(samples(torch.float64))))
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
def test_sample(dtype: torch.dtype, index: int) -> None:
    sample = samples(dtype)[index]
    options = sample.constructor_input.kwargs
    z, y = sample.forward_input.args
    theirs = torch.nn.CrossEntropyLoss(**options)(z, y)
    upstream = torch.randn_like(theirs)
    (expected,) = torch.autograd.grad(theirs, z, upstream)
    if y.is_floating_point():
        with pytest.raises(adapters.NoCounterpart):
            adapters.CrossEntropyLoss(**options)(z, y)
        pytest.skip("class probabilities as target")
    ours = adapters.CrossEntropyLoss(**options)(z, y)
    (gradient,) = torch.autograd.grad(ours, z, upstream)
    if bool((y == options.get("ignore_index", -100)).all()) and options["reduction"] == "mean":
        assert theirs.isnan() and ours == 0  # a mean of nothing
        return
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(gradient, expected)
