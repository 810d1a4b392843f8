"""The matrix product in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] + bias [N] -> [M, N]."""
    return a @ b if bias is None else torch.addmm(bias, a, b)
