"""Fused, gated token losses for fine-tuning language models: one call, `deft_loss(logits, labels)`."""

from . import objectives, parallel, reference
from .core.groups import VocabShard
from .core.statistics import RowStatistics
from .functional import deft_loss, row_statistics
from .gated import gated_loss
from .linear import fused_linear_deft_loss, fused_linear_row_statistics
from .modules import DEFTLoss, FusedLinearDEFTLoss
from .objectives import Objective
from .version import __version__

__all__ = [
    "DEFTLoss",
    "FusedLinearDEFTLoss",
    "Objective",
    "RowStatistics",
    "VocabShard",
    "__version__",
    "deft_loss",
    "fused_linear_deft_loss",
    "fused_linear_row_statistics",
    "gated_loss",
    "objectives",
    "parallel",
    "reference",
    "row_statistics",
]
