"""How many examples: a hundred of each property, always the same; `--examples 20000` draws others."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, Phase, settings

ALWAYS = 100


def pytest_addoption(parser: pytest.Parser) -> None:
    help = "of each property on the PyTorch backend, newly drawn; one in 25 as many on the kernels"
    parser.addoption("--examples", type=int, default=None, help=help)


def pytest_configure(config: pytest.Config) -> None:
    wanted = config.getoption("--examples", None)
    quiet = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": False}
    quiet["phases"] = [phase for phase in Phase if phase is not Phase.explain]
    settings.register_profile("always", max_examples=ALWAYS, derandomize=True, database=None, **quiet)
    settings.register_profile("wanted", max_examples=wanted or ALWAYS, **quiet)
    settings.load_profile("always" if wanted is None else "wanted")
