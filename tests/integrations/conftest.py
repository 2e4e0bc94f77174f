"""The stacks must not reach for a hub, and are to be tried on the CPU whatever the machine has."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["WANDB_DISABLED"] = "true"
os.environ.setdefault("TRITON_INTERPRET", "1")

import processes
import pytest
import sampling
import torch

# What ranks would import one by one; they ask for the interpreter all the same.
processes.IMPORTED += ["transformers.trainer", "accelerate", "trl.trainer.sft_trainer"]


def pytest_addoption(parser: pytest.Parser) -> None:
    help = (
        "of torch.compile; aot_eager has Dynamo and autograd's tracing, inductor half a minute of C++ a route"
    )
    parser.addoption("--compile-backend", default="aot_eager", help=help)
    sampling.add_option(parser)


def pytest_configure(config: pytest.Config) -> None:
    sampling.describe(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    sampling.leave_out(config, items)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
