"""What a trainer knows while it calls the loss, read from the trainer's frame. No other file reads frames.

Two facts have no public way to the loss. A `Trainer` calls its compute_loss_func with outputs, labels and
the number of items, and not with itself: a loss that was given to it without `apply` cannot ask for its
settings. TRL's `SFTTrainer` calls a model with its fused head without the number of items, by which it
divides afterwards. Neither has a callback between a forward and its loss.

Only frames that may be the wanted ones are opened. Before Python 3.13 an opened frame keeps what its names
stood for alive until it ends, and in a training loop those are a batch and its logits.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from types import CodeType
from typing import Any

# Every loss of a Trainer is made inside one of them; their names are those that a subclass overrides.
OF_TRAINERS = frozenset(("compute_loss", "training_step", "prediction_step"))


def running(wanted: Callable[[CodeType], bool]) -> Iterator[Mapping[str, Any]]:
    """The local names of the calls under way in this thread whose code is wanted, innermost first."""
    frame = sys._getframe(1)
    while frame is not None:
        if wanted(frame.f_code):
            yield frame.f_locals
        frame = frame.f_back  # type: ignore[assignment]  # None at the end


def calling_trainer(loss: Any) -> tuple[Any, Mapping[str, Any] | None]:
    """(trainer, batch): the trainer whose compute_loss_func is `loss` and which calls it now.

    (None, None) in a loop that is no trainer's, where there is nothing to ask for; the batch is None where no
    method of the trainer has one by the name `inputs`.
    """
    trainer = None
    for names in running(lambda code: code.co_name in OF_TRAINERS):
        caller: Any = names.get("self")
        if getattr(caller, "compute_loss_func", None) is not loss:
            continue
        trainer = caller
        if isinstance(names.get("inputs"), Mapping):
            return trainer, names["inputs"]
    return trainer, None


class Argument:
    """An argument of a method, to be asked for while the method runs.

    Raises: RuntimeError for a method without an argument of that name, as another version may have.
    """

    def __init__(self, method: Callable[..., Any], name: str):
        plain: Any = inspect.unwrap(method)
        if name not in inspect.signature(plain).parameters:
            raise RuntimeError(
                f"{name}: this version's {method.__qualname__} has no such argument, by which the gated loss "
                "sees what it is divided by; use a version that this package was tested with"
            )
        self.code: CodeType = plain.__code__
        self.name = name

    def value(self, otherwise: Any) -> Any:
        """Of the innermost call of the method that is under way; `otherwise` when there is none."""
        for names in running(lambda code: code is self.code):
            return names[self.name]
        return otherwise
