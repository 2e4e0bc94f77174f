"""States of parts of the vocabulary, in one process: what the ranks of `test_parallel` send each other."""

from __future__ import annotations

import math

import pytest
import torch
from rows import make
from torch import Tensor

from deft_kernels import objectives
from deft_kernels.backends.pytorch import backend as pytorch_backend
from deft_kernels.backends.states import identity, state_size
from deft_kernels.core.spec import Spec
from deft_kernels.core.statistics import Field
from deft_kernels.operators import implementation

# Three parts, the last narrower than a warp's first tile of fp32 logits (128 columns).
V, WIDTHS = 656, (320, 300, 36)
SPECS = {
    "five numbers": Spec(objectives.deft()),
    "entropy": Spec(objectives.eaft(), statistics=True),
    "smoothing": Spec(objectives.deft(), label_smoothing=0.1, temperature=0.7),
    "ties": Spec(objectives.deft(math.inf, detach=False)),
    "seven numbers": Spec(objectives.of_statistics(), label_smoothing=0.1),
}


def parts(logits: Tensor, labels: Tensor, spec: Spec) -> list[Tensor]:
    """The state of each part, labels counted from its first column."""
    start, states = 0, []
    for part in logits.split(WIDTHS, dim=1):
        own = labels - start
        own = own.where((own >= 0) & (own < part.shape[1]), part.shape[1])
        states.append(implementation(spec).row_states(part, own, None, -100, spec))
        start += part.shape[1]
    return states


def case(name: str, backend: str, device: str) -> tuple[Tensor, Tensor, Spec]:
    fields = {
        k: getattr(SPECS[name], k) for k in ("objective", "label_smoothing", "temperature", "statistics")
    }
    logits, labels = make("peaked", 3, V, torch.float32)
    logits[1, [5, 400, 655]] = logits[1].max() + 1  # one largest logit in each part
    return logits.to(device), labels.to(device), Spec(**fields, backend=backend)


@pytest.mark.parametrize("name", SPECS)
def test_parts_make_a_whole(name, backend, device):
    logits, labels, spec = case(name, backend, device)
    states = torch.stack(parts(logits, labels, spec))
    assert states.shape == (3, 3, state_size(spec))
    loss, rows = implementation(spec).states_loss(states, labels, None, V, -100, spec)
    whole_loss, whole = implementation(spec).row_loss(logits, labels, None, -100, spec)
    torch.testing.assert_close(loss, whole_loss, rtol=1e-6, atol=1e-7)
    if not spec.needs_max:
        # Only some offset near the largest logit is wanted: the whole row may take another one.
        scale = torch.exp2(rows[Field.OFFSET] - whole[Field.OFFSET])
        rows[Field.SUM] *= scale
        rows[Field.A] *= scale
        rows[Field.OFFSET] = whole[Field.OFFSET]
    torch.testing.assert_close(rows, whole, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("name", SPECS)
def test_identity_changes_nothing(name, backend, device):
    logits, labels, spec = case(name, backend, device)
    states = parts(logits, labels, spec)
    nothing = identity(3, spec, logits, torch.float32)
    finish = implementation(spec).states_loss
    plain = finish(torch.stack(states), labels, None, V, -100, spec)
    padded = finish(torch.stack([nothing, *states, nothing]), labels, None, V, -100, spec)
    torch.testing.assert_close(padded, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SPECS)
def test_a_split_part_is_one_state(name, device, monkeypatch):
    """Few rows: several programs reduce a part of the vocabulary, and their states become the one that is
    sent. The PyTorch backend has no splits; its state is what they are compared with."""
    from deft_kernels.backends.triton import backend as triton_backend

    logits, labels, spec = case(name, "triton", device)
    monkeypatch.setattr(triton_backend.tuning, "splits", lambda *_: 3)
    split = parts(logits, labels, spec)[0]
    plain = pytorch_backend.row_states(
        logits[:, : WIDTHS[0]], labels.where(labels < WIDTHS[0], WIDTHS[0]), None, -100, spec
    )
    if spec.label_smoothing > 0:
        plain[:, 5] *= spec.temperature  # the kernels divide at the end
    if not spec.needs_entropy:
        split[:, 3] = plain[:, 3] = 0.0  # not asked for
    torch.testing.assert_close(split, plain, rtol=1e-5, atol=1e-5)


def test_ignored_rows_travel_as_zeros(backend, device):
    logits, labels, spec = case("five numbers", backend, device)
    labels[:] = -100
    logits[:] = math.nan
    assert not implementation(spec).row_states(logits, labels, None, -100, spec).isnan().any()
