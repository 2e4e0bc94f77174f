"""The three routes of transformers.md to a trainer with the gated loss, by name."""

from __future__ import annotations

from tiny import llama, trainer

from deft_kernels.integrations import transformers as integration
from deft_kernels.integrations.callback import StatisticsCallback
from deft_kernels.integrations.running import RunningStatistics

ROUTES = ("compute_loss_func", "loss_function", "patch_model")


def prepared(route, folder, model=None, objective="deft", **settings):
    """A Trainer that trains `objective` by one of the routes, with its statistics logged."""
    model = llama() if model is None else model
    if route == "compute_loss_func":
        run = trainer(folder, model, **settings)
        integration.apply(run, objective)
        return run
    statistics = RunningStatistics()
    give = integration.set_loss_function if route == "loss_function" else integration.patch_model
    give(model, objective, statistics=statistics)
    run = trainer(folder, model, **settings)
    StatisticsCallback(statistics).add_to(run)
    return run
