"""The loss classes of torchtitan: alone, compiled, in chunks, on two ranks (this file is their script)."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import titan_device  # noqa: F401  torchtitan looks for its device once in a session
import torch
from pages import run_block, two_ranks
from torchtitan.components.loss import ChunkedLossWrapper
from torchtitan.config import CompileConfig

from deft_kernels import objectives, reference
from deft_kernels.integrations.torchtitan import DEFTLoss

B, T, D, V = 8, 12, 16, 61


class Tiny(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = torch.nn.Embedding(V, D)
        self.mixer = torch.nn.Linear(D, D)
        self.lm_head = torch.nn.Linear(D, V, bias=False)

    def forward(self, ids, skip_lm_head=False):
        hidden = torch.tanh(self.mixer(self.embedding(ids)))
        return hidden if skip_lm_head else self.lm_head(2 * hidden)


def data():
    """Ids and labels as torchtitan's loader gives them: shifted already, prompts of other lengths ignored."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(V, (B, T + 1), generator=generator)
    labels = ids[:, 1:].clone()
    for i in range(B):
        labels[i, :i] = -100
    return ids[:, :-1], labels


def built(config, compile_config=None):
    return config.build(compile_config=compile_config)


def trained(accumulate, steps=3):
    """As torchtitan's train_step: the sum over the micro-batches, each over the global number of tokens."""
    model, (ids, labels) = Tiny(), data()
    loss_fn = built(run_block("torchtitan")["llama3_deft"]().loss)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    losses = []
    for _ in range(steps):
        total = 0.0
        for rows, targets in zip(ids.chunk(accumulate), labels.chunk(accumulate), strict=True):
            loss, metrics = loss_fn(model(rows), targets, (labels != -100).sum())
            assert metrics == {}
            loss.backward()
            total += float(loss.detach())
        optimizer.step(), optimizer.zero_grad()
        losses.append(total)
    return losses, {name: p.detach() for name, p in model.named_parameters()}


def test_the_first_loss_is_the_oracles_and_8_is_4_times_2():
    (whole, end), (parts, same) = trained(1), trained(4)
    ids, labels = data()
    expected, _ = reference.loss(
        Tiny()(ids).double(), labels, objective=objectives.resolve("deft"), ignore_index=-100
    )
    assert whole[0] == pytest.approx(float(expected.detach()), rel=1e-5)
    assert whole[2] < whole[0]
    assert parts == pytest.approx(whole, rel=1e-5)
    torch.testing.assert_close(same, end)


def test_in_chunks_the_gradients_are_the_same():
    ids, labels = data()
    tokens = (labels != -100).sum()
    whole, chunked = Tiny(), Tiny()
    expected, _ = built(DEFTLoss.Config())(whole(ids), labels, tokens)
    expected.backward()
    config = run_block("torchtitan", 1)["llama3_deft_in_chunks"]().loss
    config.num_chunks = 4
    wrapper = built(config)
    assert isinstance(wrapper, ChunkedLossWrapper)

    class Head(torch.nn.Module):  # of Tiny, whose head doubles what it is given
        def forward(self, hidden):
            return chunked.lm_head(2 * hidden)

    wrapper.set_lm_head(Head())
    loss, _ = wrapper(chunked(ids, skip_lm_head=True), labels, tokens)
    loss.backward()
    torch.testing.assert_close(loss, expected.detach())
    for mine, theirs in zip(chunked.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_compiled_by_torchtitan():
    ids, labels = data()
    logits = Tiny()(ids).detach().requires_grad_()
    plain, _ = built(DEFTLoss.Config(objective="eaft"))(logits, labels)
    (expected,) = torch.autograd.grad(plain, logits)
    # A backend that only traces: what is tried is that nothing breaks the graph.
    settings = CompileConfig(enable=True, components=["loss"], backend="aot_eager")
    loss, _ = built(DEFTLoss.Config(objective="eaft"), settings)(logits, labels)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)


def test_an_objective_of_the_batch_is_refused():
    with pytest.raises(ValueError, match="mean_prob"):
        built(DEFTLoss.Config(objective="cayley"))
    with pytest.raises(ValueError, match="objective"):
        built(DEFTLoss.Config(objective="def"))


def test_several_tokens_ahead_are_refused():
    ids, labels = data()
    logits = Tiny()(ids)
    with pytest.raises(TypeError, match="MTPLoss"):
        built(DEFTLoss.Config())([logits, logits], labels, torch.tensor(5), positions=ids)


def test_logits_split_by_tensor_parallelism(tmp_path):
    ids, labels = data()
    model = Tiny()
    loss, _ = built(DEFTLoss.Config())(model(ids), labels)
    loss.backward()
    two_ranks(__file__, tmp_path / "ranks.pt")
    split, gradient = torch.load(tmp_path / "ranks.pt")
    torch.testing.assert_close(split, loss.detach())
    torch.testing.assert_close(gradient, model.lm_head.weight.grad)


if __name__ == "__main__":
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    mesh = torch.distributed.init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
    ids, labels = data()
    model = Tiny()
    with torch.no_grad():
        hidden = 2 * model(ids, skip_lm_head=True)
    weight = distribute_tensor(model.lm_head.weight.detach(), mesh, [Shard(0)]).requires_grad_()
    logits = DTensor.from_local(hidden, mesh) @ weight.t()  # 61 columns: 31 and 30
    assert logits.placements == (Shard(2),)
    loss, _ = built(DEFTLoss.Config())(logits, labels)
    assert not isinstance(loss, DTensor)
    loss.backward()
    gradient = weight.grad.full_tensor()
    if mesh.get_rank() == 0:
        torch.save((loss.detach(), gradient), Path(sys.argv[1]))
    torch.distributed.barrier()  # a rank that takes its groups down while the other still sends is aborted
    torch.distributed.destroy_process_group()
