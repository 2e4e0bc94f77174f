"""transformers' context parallelism on two ranks (gloo, CPU): each has two stretches of every sequence.

torch's ring attention has no kernel for a CPU, so the model has no attention: embeddings and a head. Its rows
do not depend on each other. Tested are the labels across the parts, their number and the gradients.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import ranks
import test_trl
import torch
from accelerate.utils import ParallelismConfig
from routes import ROUTES, prepared
from test_columns import both
from test_columns import prepared as with_columns
from test_statistics_on_ranks import as_torchrun
from tiny import arguments, batch, examples, llama, losses, oracle, parameters, trainer
from transformers import Trainer

from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations import trl

RANKS = 2


class OnCpu(ParallelismConfig):
    def _validate_accelerator(self, accelerator):
        """accelerate asks for a GPU here, and for nothing else that would fail."""


def settings() -> dict:
    return {"parallelism_config": OnCpu(cp_size=RANKS), "ddp_backend": "gloo"}


def embedding_and_head():
    return llama(num_hidden_layers=0)


def trained(route: str, **given) -> tuple[list[float], list[float], dict]:
    with tempfile.TemporaryDirectory() as folder:
        run = prepared(route, Path(folder), embedding_and_head(), **given)
        run.train()
    return losses(run), losses(run, "nll"), parameters(run.model)


def trained_in_parts() -> None:
    as_torchrun()
    for route in ROUTES:
        found = trained(route, **settings())
        torch.save(found, f"{os.environ['DEFT_TEST_FOLDER']}/{route}.{torch.distributed.get_rank()}.pt")


def evaluated_in_parts() -> None:
    as_torchrun()
    wanted = oracle(embedding_and_head(), batch(), "nll")
    for route in ("compute_loss_func", "loss_function"):
        with tempfile.TemporaryDirectory() as folder:
            run = prepared(route, Path(folder), embedding_and_head(), **settings())
            metrics = run.evaluate()
        # Every rank's mean is of its own part; the statistics are over all ranks' tokens.
        assert metrics["eval_nll"] == pytest.approx(wanted, rel=1e-5), route


def trl_in_parts() -> None:
    """Its fused head takes the shifted labels; rows are padded so that the parts are of one length."""
    as_torchrun()
    tokenizer = test_trl.trained_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        more = {"pad_to_multiple_of": 2 * RANKS, **settings()}
        run = test_trl.prepared(Path(folder), tokenizer, embedding_and_head(), **more)
        rows = test_trl.first_batch(run)
        trl.apply(run)
        run.train()
    for name, objective in (("loss", "deft"), ("nll", "nll")):
        wanted = oracle(embedding_and_head(), rows, objective)
        assert losses(run, name)[0] == pytest.approx(wanted, rel=1e-5), name


def columns_raise() -> None:
    as_torchrun()
    found = [{**row, "domain": "code", "trust": 1.0} for row in examples()]
    for route in ROUTES:
        with tempfile.TemporaryDirectory() as folder:
            run = with_columns(route, Path(folder), both(), found, embedding_and_head(), **settings())
            with pytest.raises(ValueError, match="^columns: not available with shift_labels"):
                run.train()


def a_batch_that_cannot_be_seen() -> None:
    class Renamed(Trainer):
        def compute_loss(self, model, rows, return_outputs=False, num_items_in_batch=None):
            labels = rows["labels"]
            outputs = model(**{name: x for name, x in rows.items() if name != "labels"})
            return self.compute_loss_func(outputs, labels, num_items_in_batch)

        def training_step(self, model, rows, num_items_in_batch=None):
            return self.compute_loss(model.train(), self._prepare_inputs(rows))

    as_torchrun()
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(Path(folder), **settings())
        run = Renamed(model=embedding_and_head(), args=args, train_dataset=examples())
        integration.apply(run)
        with pytest.raises(RuntimeError, match="^inputs: .* nothing tells how its labels are shifted"):
            run.train()


CASES = [trained_in_parts, trl_in_parts, evaluated_in_parts, columns_raise, a_batch_that_cannot_be_seen]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    os.environ["DEFT_TEST_FOLDER"] = str(tmp_path_factory.mktemp("parts"))
    return ranks.run(CASES, ranks=RANKS, gpus=False)


@pytest.mark.parametrize("case", [case.__name__ for case in CASES])
def test_on_two_ranks(case, outcomes):
    assert outcomes[case] == ["passed"] * RANKS, "\n".join(outcomes[case])


@pytest.mark.parametrize("route", ROUTES)
def test_two_parts_train_as_one_process(route, outcomes):
    means, plain, end = trained(route)
    assert means[0] == pytest.approx(oracle(embedding_and_head(), batch()), rel=1e-5)
    for rank in range(RANKS):
        theirs = torch.load(Path(os.environ["DEFT_TEST_FOLDER"], f"{route}.{rank}.pt"))
        assert (theirs[0], theirs[1]) == (pytest.approx(means, rel=1e-5), pytest.approx(plain, rel=1e-5))
        for name, parameter in theirs[2].items():
            torch.testing.assert_close(parameter, end[name], rtol=1e-4, atol=1e-6)


def test_sequence_parallelism_takes_no_compute_loss_func(tmp_path):
    run = trainer(tmp_path, embedding_and_head())
    run.accelerator.state.parallelism_config = ParallelismConfig(sp_size=2, sp_backend="deepspeed")
    try:
        with pytest.raises(ValueError, match="^parallelism_config: under DeepSpeed sequence parallelism"):
            integration.apply(run)
    finally:
        run.accelerator.state.parallelism_config = None


def test_labels_that_a_collator_has_shifted(tmp_path):
    """A batch may bring shift_labels without context parallelism: all three take them."""
    found = []
    for row in examples():
        shifted = torch.nn.functional.pad(row["labels"][1:], (0, 1), value=-100)
        shifted[4] = -100  # as at a border of packed texts
        found.append({**row, "shift_labels": shifted})
    rows = {name: torch.stack([row[name] for row in found[:8]]) for name in found[0]}
    wanted = {**rows, "labels": torch.nn.functional.pad(rows["shift_labels"], (1, 0), value=-100)[:, :-1]}
    for route in ROUTES:
        run = prepared(route, tmp_path, remove_unused_columns=False)
        run.train_dataset = found
        run.train()
        assert losses(run)[0] == pytest.approx(oracle(llama(), wanted), rel=1e-5), route
