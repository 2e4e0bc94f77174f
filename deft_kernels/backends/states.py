"""The state of a row's softmax over a part of the vocabulary, as rows of a tensor that ranks exchange.

With x_j = k z_j - offset, k = log2(e) / temperature, and offset = k max z_j rounded (at least -2^28):

    0 peak = max z_j    1 s = sum 2^x_j    2 u = sum 2^(2 x_j)    3 t = sum 2^x_j x_j    4 target = z_y

Then, if asked for: the sum of w_j z_j (label smoothing), how many columns have the largest logit (exact
gradients through max p), and 1 + the first of these columns (statistics). The sums s, u and t leave out one
column with the largest logit, for which the peak stands: its 2^x is about 1, and a sum with that 1 loses the
digits of a confident row. The offset is computed from the peak, so it is not stored. In a part without the
target z_y is -inf, as in the identity (-inf, 0, 0, 0, -inf).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..core.spec import Spec


def state_size(spec: Spec) -> int:
    """Numbers in a state: 5, and one more each for label smoothing, exact max p and statistics."""
    return 5 + (spec.label_smoothing > 0) + spec.peaks + spec.statistics


def identity(count: int, spec: Spec, like: Tensor, dtype: torch.dtype) -> Tensor:
    """States [count, size] of a part of the vocabulary without a single column."""
    states = torch.zeros(count, state_size(spec), dtype=dtype, device=like.device)
    states[:, 0] = states[:, 4] = -math.inf
    return states
