"""Kernels through batch and instance norm where torch's own backward of a single row is wrong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import finite_width as fw


class Tokens(nn.Module):
    """Makes the pixels of an image a sequence; cotangents of the image then lie with channels last."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).transpose(1, 2)


class Mixed(nn.Module):
    """A weight over channels by an operation that is not recognised, so that autograd takes it row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nchw,dc->ndhw", x, self.weight)


def frozen(norm: nn.Module) -> nn.Module:
    return norm.requires_grad_(False)


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm2d(4),
    "batch, frozen": lambda: frozen(nn.BatchNorm2d(4)),
    "batch, not affine": lambda: nn.BatchNorm2d(4, affine=False),
    "instance": lambda: nn.InstanceNorm2d(4),
    "instance, affine": lambda: nn.InstanceNorm2d(4, affine=True),
    "instance, running": lambda: nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
    "instance, running, frozen": lambda: frozen(nn.InstanceNorm2d(4, affine=True, track_running_stats=True)),
}


def network(norm: str, first: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(first, NORMS[norm](), Tokens(), nn.Flatten(), nn.Linear(48, 2)).double().eval()
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if "num_batches" not in name and name.startswith("1."):
            nn.init.uniform_(value.data, 0.5, 2)
    return model


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """[N, N, O, O] from Jacobians that no batch of a single row takes part in."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    outputs = model(torch.cat([x, x]))[: len(x)]
    gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in outputs.flatten()]
    rows = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients])
    jacobian = rows.unflatten(0, outputs.shape)
    return torch.einsum("nap,mbp->nmab", jacobian, jacobian)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("method", ["auto", "jacobian", "products"])
@pytest.mark.parametrize("norm", NORMS)
def test_cotangents_with_channels_last(norm: str, method: str, rows: int) -> None:
    for first in (nn.Conv2d(4, 4, 3, padding=1), Mixed()):
        model, x = network(norm, first), torch.randn(rows, 4, 3, 4, dtype=torch.float64)
        expected = exact(model, x)
        kernel = fw.ntk.empirical_ntk(model, x, method=method)
        assert float((kernel - expected).norm() / expected.norm()) <= 1e-12
        vector = torch.randn(2 * rows, dtype=torch.float64)
        product = expected.permute(0, 2, 1, 3).reshape(2 * rows, 2 * rows) @ vector
        assert float((fw.ntk.NTKOperator(model, x) @ vector - product).norm() / product.norm()) <= 1e-12


def test_instance_norm_has_a_structure() -> None:
    model, x = network("instance, affine", nn.Conv2d(4, 4, 3, padding=1)), torch.randn(3, 4, 3, 4, dtype=torch.float64)
    expected = exact(model, x)
    kernel = fw.ntk.empirical_ntk(model, x, method="structured")
    assert float((kernel - expected).norm() / expected.norm()) <= 1e-12


@pytest.mark.parametrize("shape", [(2, 4, 1, 1), (2, 4, 1)])
def test_instance_norm_of_one_position(shape: tuple[int, ...]) -> None:
    """torch's own refusal comes through."""
    norm = nn.InstanceNorm2d(4, affine=True) if len(shape) == 4 else nn.InstanceNorm1d(4, affine=True)
    with pytest.raises(ValueError, match="more than 1 spatial element"):
        fw.ntk.empirical_ntk(nn.Sequential(norm, nn.Flatten(), nn.Linear(4, 2)), torch.randn(shape))


class Direct(nn.Module):
    """A batch norm by torch's own function, its arguments by name."""

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.mixed, self.norm, self.eps = Mixed(), nn.BatchNorm2d(4), eps

    def forward(self, x: Tensor) -> Tensor:
        norm, options = self.norm, {"training": False, "momentum": 0.1, "eps": self.eps, "cudnn_enabled": False}
        y = torch.batch_norm(
            self.mixed(x),
            norm.weight,
            norm.bias,
            norm.running_mean,
            norm.running_var,
            **options,  # type: ignore[arg-type]
        )
        return nn.functional.batch_norm(y, norm.running_mean, norm.running_var, eps=self.eps).flatten(1)


@pytest.mark.parametrize("method", ["auto", "jacobian", "products"])
def test_torchs_own_function(method: str) -> None:
    torch.manual_seed(0)
    model, x = Direct().double().eval(), torch.randn(3, 4, 2, 2, dtype=torch.float64)
    expected = exact(model, x)
    kernel = fw.ntk.empirical_ntk(model, x, method=method)
    assert float((kernel - expected).norm() / expected.norm()) <= 1e-12
    with pytest.raises(ValueError, match="eps must be"):
        fw.ntk.empirical_ntk(Direct(-1e-3).double().eval(), x, method=method)
