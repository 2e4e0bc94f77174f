"""Fused, gated token losses for fine-tuning language models: one call, `deft_loss(logits, labels)`."""

from . import objectives, reference
from .functional import deft_loss, gated_loss, row_statistics
from .modules import DEFTLoss
from .objectives import Objective
from .statistics import RowStatistics

__version__ = "0.1.0"

__all__ = [
    "DEFTLoss",
    "Objective",
    "RowStatistics",
    "deft_loss",
    "gated_loss",
    "objectives",
    "reference",
    "row_statistics",
]
