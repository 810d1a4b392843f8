"""Jacobians by torch.autograd.grad, row by row: what the tests of the NTK compare with."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[N, O, P] by torch.autograd.grad, row by row."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for row in x.split(1):
        gradients = [
            torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
            for value in model(row).flatten()
        ]
        rows.append(torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients]))
    return torch.stack(rows)
