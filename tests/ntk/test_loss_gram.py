"""Inner products of loss gradients against one torch.autograd.grad per example."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from benchmarks.small_gpt import SmallGPT, next_token_loss
from torch import Tensor, nn

import finite_width as fw

cross_entropy = functools.partial(F.cross_entropy, reduction="none")


def gradients(model: nn.Module, loss_fn: Any, x: Tensor, y: Tensor) -> Tensor:
    """[N, P], row by row: nothing shared with the library."""
    rows = []
    for row in range(len(x)):
        loss = loss_fn(model(x[row : row + 1]), y[row : row + 1]).sum()
        found = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        pairs = zip(model.parameters(), found, strict=True)
        rows.append(torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in pairs]))
    return torch.stack(rows)


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert float((found - expected).norm() / expected.norm()) < tolerance


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4)).double()


def test_classifier() -> None:
    model, x1, x2 = mlp(), torch.randn(7, 6).double(), torch.randn(5, 6).double()
    y1, y2 = torch.randint(4, (7,)), torch.randint(4, (5,))
    g1, g2 = gradients(model, cross_entropy, x1, y1), gradients(model, cross_entropy, x2, y2)
    close(fw.ntk.loss_gram(model, cross_entropy, x1, y1, x2, y2), g1 @ g2.T)
    symmetric = fw.ntk.loss_gram(model, cross_entropy, x1, y1)
    close(symmetric, g1 @ g1.T)
    assert torch.equal(symmetric, symmetric.T)


def test_float_targets_and_keyword_inputs() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 2).double()

        def forward(self, *, image: Tensor) -> Tensor:
            return self.layer(image).tanh()

    def squared(result: Tensor, y: Tensor) -> Tensor:
        return (result - y).square().sum(1)

    model, x, y = Named(), torch.randn(5, 6).double(), torch.randn(5, 2).double()
    g = gradients(nn.Sequential(model.layer, nn.Tanh()), squared, x, y)
    close(fw.ntk.loss_gram(model, squared, {"image": x}, y), g @ g.T)


@pytest.mark.parametrize("sizes", [(16, 6, 8), (300, 40, 16)], ids=["short rows, wide layers", "long rows"])
def test_small_gpt(sizes: tuple[int, int, int]) -> None:
    vocabulary, length, width = sizes
    model = SmallGPT(vocabulary, length, width, heads=2).double()
    x1, x2 = torch.randint(vocabulary, (5, length)), torch.randint(vocabulary, (3, length))
    g1, g2 = gradients(model, next_token_loss, x1, x1), gradients(model, next_token_loss, x2, x2)
    close(fw.ntk.loss_gram(model, next_token_loss, x1, x1, x2, x2), g1 @ g2.T)
    close(fw.ntk.loss_gram(model, next_token_loss, x1, x1), g1 @ g1.T)


def test_params_replace_the_models_own() -> None:
    model, other, x, y = mlp(), mlp(), torch.randn(5, 6).double(), torch.randint(4, (5,))
    g = gradients(other, cross_entropy, x, y)
    close(fw.ntk.loss_gram(model, cross_entropy, x, y, params=dict(other.named_parameters())), g @ g.T)


def test_bad_input() -> None:
    model, x, y = mlp(), torch.randn(5, 6).double(), torch.randint(4, (5,))
    with pytest.raises(ValueError, match=r"one loss per row, shape \[\d\], got \[\]; use reduction='none'"):
        fw.ntk.loss_gram(model, F.cross_entropy, x, y)
    with pytest.raises(ValueError, match=r"y1 must have one target per row of x1: \[5, \.\.\.\], got \[4\]"):
        fw.ntk.loss_gram(model, cross_entropy, x, y[:4])
    with pytest.raises(ValueError, match="y2 must be given with x2"):
        fw.ntk.loss_gram(model, cross_entropy, x, y, x)
    with pytest.raises(TypeError, match=r"y1 must be a torch\.Tensor"):
        fw.ntk.loss_gram(model, cross_entropy, x, [0] * 5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^y1 has dtype torch.float32, but the model's parameters have torch.float64"):
        fw.ntk.loss_gram(model, F.mse_loss, x, torch.ones(5, 4))
    with pytest.raises(TypeError, match=r"^x1 has dtype torch.float32"):
        fw.ntk.loss_gram(model, cross_entropy, x.float(), y)
    with pytest.raises(TypeError, match=r"^y2 has dtype torch.int32, but y1 has torch.int64"):
        fw.ntk.loss_gram(model, cross_entropy, x, y, x, y.int())
    with pytest.raises(ValueError, match=r"^x2 has shape \[5, 5\], but x1 has \[5, 6\]"):
        fw.ntk.loss_gram(model, cross_entropy, x, y, x[:, :5], y)
    with pytest.raises(ValueError, match=r"^params has the key 'weight', but"):
        fw.ntk.loss_gram(model, cross_entropy, x, y, params={"weight": x})
    normed = nn.Sequential(mlp(), nn.BatchNorm1d(4).double())
    with pytest.raises(ValueError, match=r"^model: module '1' \(BatchNorm1d\) is in train mode"):
        fw.ntk.loss_gram(normed, cross_entropy, x, y)
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        fw.ntk.loss_gram(model, "cross_entropy", x, y)  # type: ignore[arg-type]
