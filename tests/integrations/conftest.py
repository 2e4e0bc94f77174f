"""The stacks must not reach for a hub, and are to be tried on the CPU whatever the machine has."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["WANDB_DISABLED"] = "true"
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    help = (
        "of torch.compile; aot_eager has Dynamo and autograd's tracing, inductor half a minute of C++ a route"
    )
    parser.addoption("--compile-backend", default="aot_eager", help=help)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
