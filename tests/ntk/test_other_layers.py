"""Kernels of models with this library's own layers: Tensor-Train layers, and variational layers in mean mode."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import finite_width as fw


def exact(model: nn.Module, x: Tensor) -> Tensor:
    parameters = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for row in range(len(x)):
        outputs = model(x[row : row + 1])[0]
        gradients = [torch.autograd.grad(each, parameters, retain_graph=True, allow_unused=True) for each in outputs]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            torch.zeros_like(p).flatten() if g is None else g.flatten()
                            for g, p in zip(each, parameters, strict=True)
                        ]
                    )
                    for each in gradients
                ]
            )
        )
    jacobian = torch.stack(rows)
    return torch.einsum("nap,mbp->nmab", jacobian, jacobian)


def error(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).norm() / expected.norm())


def test_tensor_train_layers() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(fw.tt.TTLinear(12, 8, rank=2), nn.Tanh(), nn.Linear(8, 2)).double()
    x = torch.randn(6, 12, dtype=torch.float64)
    expected = exact(model, x)
    assert error(fw.ntk.empirical_ntk(model, x), expected) <= 1e-12
    vector = torch.randn(12, dtype=torch.float64)
    matrix = expected.permute(0, 2, 1, 3).reshape(12, 12)
    assert error(fw.ntk.NTKOperator(model, x) @ vector, matrix @ vector) <= 1e-12


def test_variational_layers_in_mean_mode_alone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(fw.bayes.BayesLinear(12, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x = torch.randn(6, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"model draws random numbers|two forwards of the same rows differ"):
        fw.ntk.empirical_ntk(model, x)
    with fw.bayes.mean_mode(model):
        assert error(fw.ntk.empirical_ntk(model, x), exact(model, x)) <= 1e-12
