"""As for tests/integrations: no hub, no GPU."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["WANDB_DISABLED"] = "true"
os.environ.setdefault("TRITON_INTERPRET", "1")
# Axolotl and verl report their use and build caches unless told not to.
os.environ["DO_NOT_TRACK"] = "1"
os.environ["AXOLOTL_DO_NOT_TRACK"] = "1"

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
