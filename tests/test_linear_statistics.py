"""Statistics from hidden states: all equal the statistics of the logits that F.linear makes, in float64.

V = 37, D = 5 and N = 7 rows in chunks of 2, so that the last chunk is short, as in `test_linear`.
"""

from __future__ import annotations

from functools import cache

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.nn.functional as F
from sampling import first_of
from torch import Tensor

from deft_kernels import RowStatistics, VocabShard, fused_linear_row_statistics, row_statistics

N, D, V = 7, 5, 37
DIFFERENTIABLE = ("logp", "lse", "collision", "entropy", "max_prob")
KEYWORDS = {
    "plain": {},
    "scaled, capped": {"logit_scale": 0.7, "softcap": 5.0, "temperature": 1.3},
    "shifted": {"shift": True},
    "one chunk": {"chunk_bytes": 2**20},
}
# fp32: products in the order of another library; bf16: logits rounded to it, of up to 8.
CLOSE = {torch.float32: {"rtol": 1e-5, "atol": 2e-6}, torch.bfloat16: {"rtol": 5e-2, "atol": 5e-2}}


def problem(device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(hidden, weight, bias, labels)."""
    generator = torch.Generator().manual_seed(5)
    made = [torch.randn(*s, generator=generator).to(device, dtype) for s in ((1, N, D), (V, D), (V,))]
    labels = torch.randint(0, V, (1, N), generator=generator)
    labels[0, 1] = labels[0, 4] = -100
    return *made, labels.to(device)


def mixed(r: RowStatistics) -> Tensor:
    """Something of every statistic, each with a weight that no other has."""
    return r.logp - 0.3 * r.entropy + r.collision.sqrt() * 0.2 + 0.1 * r.max_prob.log() + 0.01 * r.lse**2


def gradients(r: RowStatistics, valid: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    upstream = torch.linspace(0.5, 1.5, valid.numel(), dtype=torch.float64, device=valid.device)
    rows = mixed(r)[valid] * upstream.to(r.logp).reshape(valid.shape)[valid]
    return list(torch.autograd.grad(rows.sum(), leaves))


@pytest.mark.sampled
@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("name", KEYWORDS)
def test_statistics_and_gradients(name, dtype, backend, device):
    *tensors, labels = problem(device, dtype)
    keywords = {"chunk_bytes": 2 * V * dtype.itemsize, **KEYWORDS[name]}
    leaves = [t.clone().requires_grad_() for t in tensors]
    ours = fused_linear_row_statistics(*leaves[:2], labels, leaves[2], backend=backend, **keywords)
    exact = [t.double().requires_grad_() for t in tensors]
    own = {k: v for k, v in keywords.items() if k != "chunk_bytes"}
    theirs = row_statistics(F.linear(*exact), labels, backend="reference", **own)
    assert ours.logp.shape == labels.shape and ours.alpha is None and ours.gate is None
    for field in DIFFERENTIABLE:
        torch.testing.assert_close(
            getattr(ours, field).double(), getattr(theirs, field), **CLOSE[dtype], msg=field
        )
    if dtype == torch.float32:
        assert torch.equal(ours.correct, theirs.correct) and torch.equal(ours.predicted, theirs.predicted)
    counted = F.pad(labels[:, 1:], (0, 1), value=-100) if keywords.get("shift") else labels
    valid = counted != -100
    assert not ours.entropy[~valid].any()
    for ours_of, theirs_of in zip(
        gradients(ours, valid, leaves), gradients(theirs, valid, exact), strict=True
    ):
        assert ours_of.dtype == dtype
        scale = theirs_of.abs().max()
        torch.testing.assert_close(ours_of.double() / scale, theirs_of / scale, **CLOSE[dtype])


def test_the_reference_backend_and_the_default():
    *tensors, labels = problem("cpu", torch.float64)
    given = (*tensors[:2], labels, tensors[2])
    oracle = fused_linear_row_statistics(*given, backend="reference")
    for field in DIFFERENTIABLE:
        ours = getattr(fused_linear_row_statistics(*given), field)
        torch.testing.assert_close(ours, getattr(oracle, field), rtol=1e-11, atol=1e-12)


def test_nothing_is_as_large_as_the_logits(monkeypatch):
    """The largest tensor that the call makes is a chunk, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode

    from deft_kernels.operators import chunks, eager, hidden

    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor):
                Sizes.largest = max(Sizes.largest, result.numel())
            return result

    # The mode would make one operator of the call, and see nothing inside.
    for module in (eager, hidden):
        monkeypatch.setattr(module, "watched", lambda *_: False)
    assert chunks.chunk_rows(512, 4096, 4, 8 * 4096 * 4) == 8
    states, weight = torch.randn(512, 4, requires_grad=True), torch.randn(4096, 4)
    labels = torch.zeros(512, dtype=torch.int64)
    with Sizes():
        r = fused_linear_row_statistics(states, weight, labels, chunk_bytes=8 * 4096 * 4)
        (r.logp.sum() + r.entropy.sum()).backward()
    assert states.grad is not None
    assert Sizes.largest == 8 * 4096


def test_compiled_in_one_graph(device):
    *tensors, labels = problem(device)

    def policy(hidden, weight, bias):
        r = fused_linear_row_statistics(hidden, weight, labels, bias)
        return ((r.logp + 2.0).exp() * 0.1 - 0.01 * r.entropy).sum()

    torch.compiler.reset()
    leaves, traced = ([t.clone().requires_grad_() for t in tensors] for _ in range(2))
    expected = policy(*leaves)
    found = torch.compile(policy, fullgraph=True, backend="aot_eager")(*traced)
    torch.testing.assert_close(found, expected)
    expected.backward()
    found.backward()
    for one, other in zip(traced, leaves, strict=True):
        torch.testing.assert_close(one.grad, other.grad)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"hidden": torch.randn(1, N, D + 1)}, "^weight: expected shape"),
        ({"labels": torch.zeros(1, N)}, "^labels: expected an integer"),
        ({"weight": torch.randn(V, D).half()}, "^weight: is torch.float16"),
        ({"bias": torch.randn(V + 1)}, "^bias: expected shape"),
        ({"chunk_bytes": 0}, "^chunk_bytes: expected a positive"),
        ({"z_loss": 1e-4}, "^z_loss: not a keyword of fused_linear_row_statistics"),
        ({"objective": "deft"}, "^objective: not a keyword"),
    ],
)
def test_bad_input(change, error):
    hidden, weight, bias, labels = problem("cpu")
    given = {"hidden": hidden, "weight": weight, "labels": labels, "bias": bias} | change
    with pytest.raises((TypeError, ValueError), match=error):
        fused_linear_row_statistics(**given)


def split_heads() -> None:
    """Of a head in parts, one of which may be empty, every rank gets the whole head's statistics, and the
    gradients of its own rows."""
    *tensors, labels = problem(ranks.device())
    widths = {2: (20, 17), 3: (20, 0, 17)}[dist.get_world_size()]
    rank, start = dist.get_rank(), sum(widths[: dist.get_rank()])

    def own(tensor: Tensor) -> Tensor:
        return tensor[start : start + widths[rank]]

    hidden, weight, bias = tensors
    alone = [t.clone().requires_grad_() for t in tensors]
    mine = [t.clone().requires_grad_() for t in (hidden, own(weight), own(bias))]
    whole = fused_linear_row_statistics(*alone[:2], labels, alone[2])
    for group in (dist.group.WORLD, VocabShard(dist.group.WORLD, start, V)):
        given = {"chunk_bytes": 2 * 19 * 4, "group": group}
        r = fused_linear_row_statistics(*mine[:2], labels, mine[2], **given)
        for ours, theirs in zip(r, whole, strict=True):
            if theirs is not None:
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
        found, expected = (gradients(s, labels != -100, x) for s, x in ((r, mine), (whole, alone)))
        torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=2e-6)
        for i in (1, 2):
            torch.testing.assert_close(found[i], own(expected[i]), rtol=1e-4, atol=2e-6)
        whole = fused_linear_row_statistics(*alone[:2], labels, alone[2])


@cache
def outcomes(count: int) -> dict[str, list[str]]:
    return ranks.run([split_heads], count)


@pytest.mark.parametrize("count", first_of([3, 2]))
def test_in_processes(count):
    for rank, outcome in enumerate(outcomes(count)["split_heads"]):
        assert outcome == "passed", f"rank {rank} of {count}: {outcome}"
