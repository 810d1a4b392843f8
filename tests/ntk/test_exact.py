"""The kernel of every kind of model against float64 Jacobians, row by row with torch.autograd.grad."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finite_width as fw

N, M = 5, 4


def jacobian(model: nn.Module, x: Tensor) -> Tensor:
    """[N, O, P] by one backward per row and output: nothing shared with the library."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for row in range(len(x)):
        outputs = []
        for index in range(model(x[row : row + 1].clone()).numel()):
            result = model(x[row : row + 1].clone()).flatten()[index]
            gradients = torch.autograd.grad(result, parameters, allow_unused=True)
            parts = [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]
            parts = [torch.view_as_real(part) if part.is_complex() else part for part in parts]
            outputs.append(torch.cat([part.flatten() for part in parts]))
        rows.append(torch.stack(outputs))
    return torch.stack(rows)


def exact(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    return torch.einsum("nap,mbp->nmab", jacobian(model, x1), jacobian(model, x2))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class ConvTwice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.layer(x))).mean((2, 3))


class Autoencoder(nn.Module):
    """The same weight as W and as its transpose."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 6))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(F.linear(x, self.weight)), self.weight.t())


class Functional(nn.Module):
    """Parameters used without modules: F.linear, W.T, matmul, addmm and a bare scale."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(7, 6)), nn.Parameter(torch.randn(7))
        self.c, self.d = nn.Parameter(torch.randn(7, 5)), nn.Parameter(torch.randn(4, 5))
        self.e, self.f = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3))
        self.scale = nn.Parameter(torch.randn(3))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(F.linear(x, self.a, self.b))
        h = torch.tanh(h @ self.c)
        h = torch.tanh(h @ self.d.T)
        return torch.addmm(self.f, h, self.e) * self.scale + self.scale.sum()


class BareOutput(nn.Module):
    """A parameter that is the output itself, beside one that is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.offset, self.unused = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(2))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :3] * self.offset.exp() + self.offset


class Attention(nn.Module):
    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.batch_first else x.transpose(0, 1)
        h = self.norm(h + self.attention(h, h, h, need_weights=False)[0])
        return self.out(h).mean(1 if self.batch_first else 0)


class CrossAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, bias=True, add_bias_kv=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x[:, :2], x, x)[0].mean(1)


class Words(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.layer = nn.Embedding(11, 4, padding_idx=0), nn.Linear(4, 4)
        self.out = nn.Linear(4, 11, bias=False)
        if tied:
            self.out.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.layer(self.embedding(x))).mean(1))[:, :3]


class TimeFirst(nn.Module):
    """Rows in the middle axis, with as many positions as the probe has rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm, self.out = nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(torch.tanh(self.layer(x.transpose(0, 1))))
        return self.out(h.cumsum(0).tanh()).mean(0)


class Merged(nn.Module):
    """Rows and positions merged in one axis, once row by row and once position by position; convolution frames."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.conv, self.norm = nn.Conv1d(1, 3, 2), nn.BatchNorm1d(5)

    def forward(self, x: Tensor) -> Tensor:
        rows, steps, width = x.shape
        h = self.norm(torch.tanh(self.one(x.reshape(rows * steps, width)))).reshape(rows, steps, 5)
        frames = self.conv(h.reshape(rows * steps, 1, 5)).reshape(rows, steps, -1).mean((1, 2))
        h = torch.tanh(self.two(h.transpose(0, 1).reshape(steps * rows, 5))).reshape(steps, rows, 5)
        return self.three(h.mean(0)) + frames[:, None]


class Normed(nn.Module):
    """One batch norm behind a dense layer and behind a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.dense, self.conv, self.out = nn.Linear(6, 5), nn.Conv1d(1, 5, 2), nn.Linear(5, 2)
        self.norm = trained_norm(nn.BatchNorm1d(5))

    def forward(self, x: Tensor) -> Tensor:
        at_one, at_several = self.norm(self.dense(x)), self.norm(self.conv(x.unsqueeze(1)))
        return self.out(torch.tanh(at_one) + torch.tanh(at_several).sum(2))


class Branches(nn.Module):
    """A branch that depends on the data of one row at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return torch.stack([self.left(row) if row.sum() > 0 else self.right(row) for row in x])


class Rare(nn.Module):
    """The whole batch takes another path where a row is large: the rows probed do not show it."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        if (x.abs() > 50).any():
            large = (x.abs() > 50).any(1, keepdim=True)
            return torch.where(large, self.right(x), self.left(x))
        return self.left(x)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.block, x, use_reentrant=False).tanh())


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x, weight) ** 3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        inner = grad * 3 * F.linear(x, weight) ** 2
        return inner @ weight, inner.reshape(-1, inner.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


class CustomFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight, self.out = nn.Linear(6, 6), nn.Parameter(torch.randn(5, 6)), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(Cube.apply(torch.tanh(self.first(x)), self.weight))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.core, self.out = kind(6, 5, batch_first=True), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.core(x)[0][:, -1])


class Cell(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.GRUCell(6, 5), nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(len(x), 5)
        for step in range(x.shape[1]):
            state = self.cell(x[:, step], state)
        return self.out(state)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 3, dtype=torch.complex128))
        self.layer = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        product = torch.tanh(self.layer(x)).to(torch.complex128) @ self.weight
        return product.real * product.imag


class Bilinear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Bilinear(6, 6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x.sin())


class Buffered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("scale", torch.randn(6))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x * self.scale)


class Overwriting(nn.Module):
    """Operations that write in place, on the input, after a layer and into a slice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x.mul_(0.5)
        h = F.relu_(self.first(x))
        h = self.second(h)
        h[:, :3] = h[:, 3:] * 2
        h.mul_(0.3)
        return self.third(h).mul_(2)


def frozen() -> nn.Module:
    model = mlp()
    model[0].weight.requires_grad_(False)
    model[4].bias.requires_grad_(False)
    return model


def mlp() -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(6, 7), nn.ReLU(inplace=True), nn.Linear(7, 5, bias=False), nn.GELU(), nn.Linear(5, 3)
    )


def conv(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(*layers, nn.Tanh(), nn.Flatten(), nn.LazyLinear(2))


def wide_convs(bias: bool) -> list[nn.Module]:
    """Two layers that are worth Winograd's form."""
    return [nn.Conv2d(24, 25, 3, padding=1, bias=bias), nn.ReLU(), nn.Conv2d(25, 24, 3, padding=1, bias=bias)]


def trained_norm(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics and affine parameters that are not 0 and 1."""
    for name, value in norm.named_buffers():
        if name.endswith("running_mean") or name.endswith("running_var"):
            value.uniform_(0.5, 2)
    for value in norm.parameters():
        nn.init.uniform_(value, 0.5, 2)
    return norm


class Rectified(nn.Module):
    """ReLUs before convolutions: shared by two layers and a skip, and what they were made from written afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 5, 3), nn.Conv2d(5, 5, 3, padding=1)
        self.third, self.last = nn.Conv2d(5, 4, 2), nn.LazyLinear(2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        y = torch.relu(h)
        h = self.second(y) + y
        z = h.relu()
        h.mul_(3)
        w = F.relu(self.third(z) + self.third(y))
        return self.last((w.mean(1) + h.mean(1)[:, 1:, 1:]).flatten(1))


class RectifiedRows(nn.Module):
    """ReLUs before dense layers: shared by two layers and a skip, at several positions, and written over afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 7), nn.Linear(7, 7, bias=False)
        self.third, self.last = nn.Linear(7, 7), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        before = self.first(x)
        after = torch.relu(before)
        hidden = F.relu(self.second(after) + self.third(after) + after)
        both = torch.stack([hidden, before * 2], 1)  # two positions of each row
        pair = self.third(F.relu(both)).sum(1)
        again = F.relu(pair)
        result = self.last(again)
        before.detach().add_(1)
        return result + self.last(F.relu(pair.tanh()))


vector, series, image, volume = (6,), (4, 6), (3, 7, 6), (2, 4, 5, 4)
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp, in-place ReLU": (mlp, vector),
    "one output": (lambda: nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 1)), vector),
    "tied weights": (Tied, vector),
    "module called twice": (Twice, vector),
    "convolution called twice": (ConvTwice, image),
    "weight and its transpose": (Autoencoder, vector),
    "functional": (Functional, vector),
    "bare parameter": (BareOutput, vector),
    "weight norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        vector,
    ),
    "spectral norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        vector,
    ),
    "conv": (lambda: conv(nn.Conv2d(3, 4, 3), nn.ReLU(True), nn.Conv2d(4, 5, (2, 3))), image),
    "conv stride padding dilation": (
        lambda: conv(nn.Conv2d(3, 4, 3, stride=2, padding=(2, 1), dilation=(2, 1))),
        image,
    ),
    "conv after ReLU": (Rectified, image),
    "dense after ReLU": (RectifiedRows, vector),
    "conv after ReLU, 1d": (lambda: conv(nn.Conv1d(4, 5, 3), nn.ReLU(), nn.Conv1d(5, 9, 2, dilation=2)), series),
    "conv after ReLU, 3d": (lambda: conv(nn.Conv3d(2, 3, 2, padding=1), nn.ReLU(), nn.Conv3d(3, 2, 3)), volume),
    "conv, more padding than kernel": (
        lambda: conv(nn.Conv2d(3, 9, 1, padding=1), nn.ReLU(), nn.Conv2d(9, 4, (1, 2), padding=(2, 1))),
        image,
    ),
    "conv, wide groups": (
        lambda: conv(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 18, 2, padding=1, groups=2)),
        image,
    ),
    "conv, frozen": (lambda: conv(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 2).requires_grad_(False)), image),
    "conv groups": (
        lambda: conv(nn.Conv2d(3, 6, 3, groups=3), nn.ReLU(), nn.Conv2d(6, 4, 2, groups=2, bias=False)),
        image,
    ),
    "conv same, even kernel": (lambda: conv(nn.Conv2d(3, 4, (2, 4), padding="same", dilation=(1, 2))), image),
    "conv circular": (lambda: conv(nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular")), image),
    "conv reflect": (lambda: conv(nn.Conv2d(3, 4, 3, padding=2, padding_mode="reflect")), image),
    "conv 1d": (lambda: conv(nn.Conv1d(4, 5, 3, stride=2, padding=1)), series),
    "conv 3d": (lambda: conv(nn.Conv3d(2, 3, (2, 3, 2), padding=(0, 1, 0))), volume),
    "conv transposed": (lambda: conv(nn.ConvTranspose2d(3, 4, 3, stride=2, padding=1, output_padding=1)), image),
    "conv transposed, groups": (lambda: conv(nn.ConvTranspose1d(4, 6, 3, stride=2, groups=2, dilation=2)), series),
    "conv transposed 3d": (lambda: conv(nn.ConvTranspose3d(2, 3, 2)), volume),
    "wide conv, few positions": (lambda: conv(nn.Conv2d(3, 40, 3, stride=3), nn.ReLU(), nn.Conv2d(40, 40, 2)), image),
    "conv, Winograd's form": (lambda: conv(nn.Conv2d(3, 24, 1), nn.ReLU(), *wide_convs(bias=True)), image),
    "batch norm": (lambda: conv(nn.Conv2d(3, 4, 3), trained_norm(nn.BatchNorm2d(4))), image),
    "batch norm 1d": (
        lambda: nn.Sequential(nn.Linear(6, 5), trained_norm(nn.BatchNorm1d(5)), nn.Tanh(), nn.Linear(5, 2)),
        vector,
    ),
    "batch norm, at one position and at several": (Normed, vector),
    "batch norm without affine": (lambda: conv(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), image),
    "layer norm": (lambda: nn.Sequential(trained_norm(nn.LayerNorm((4, 6))), nn.Linear(6, 3), nn.Flatten()), series),
    "group norm": (lambda: conv(nn.Conv2d(3, 4, 3), trained_norm(nn.GroupNorm(2, 4))), image),
    "instance norm": (lambda: conv(trained_norm(nn.InstanceNorm2d(3, affine=True))), image),
    "rms norm": (lambda: nn.Sequential(trained_norm(nn.RMSNorm(6)), nn.Linear(6, 3)), vector),
    "sequence": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), series),
    "wide sequence": (
        lambda: nn.Sequential(
            nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 50), nn.Tanh(), nn.Flatten(), nn.Linear(200, 2)
        ),
        series,
    ),
    "attention": (lambda: Attention(True), (4, 8)),
    "attention, time first": (lambda: Attention(False), (4, 8)),
    "attention between sequences": (CrossAttention, (4, 8)),
    "transformer layer": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(32, 2)),
        (4, 8),
    ),
    "embedding with padding": (lambda: Words(False), (5,)),
    "tied embedding": (lambda: Words(True), (5,)),
    "rows on the second axis": (TimeFirst, series),
    "rows merged with positions": (Merged, series),
    "frozen parameters": (frozen, vector),
    "buffers": (Buffered, vector),
    "writes in place": (Overwriting, vector),
    "complex parameters": (Complex, vector),
    "LSTM": (lambda: Recurrent(nn.LSTM), series),
    "GRU": (lambda: Recurrent(nn.GRU), series),
    "GRU cell": (Cell, series),
    "bilinear": (Bilinear, vector),
    "custom autograd function": (CustomFunction, vector),
    "branches on data": (Branches, vector),
    "checkpointed block": (Checkpointed, vector),
    "prelu": (lambda: nn.Sequential(nn.Linear(6, 5), nn.PReLU(5), nn.Linear(5, 3)), vector),
    "output in three axes": (lambda: nn.Sequential(nn.Conv1d(4, 2, 3)), series),
}


def build(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    torch.manual_seed(3)
    make, shape = MODELS[name]
    model = make().eval()
    if "embedding" in name:
        x1, x2 = torch.randint(0, 11, (N, *shape)), torch.randint(0, 11, (M, *shape))
        x1[0, 1] = x2[1, 0] = 0  # padding
    else:
        x1, x2 = torch.randn(N, *shape, dtype=torch.float64), torch.randn(M, *shape, dtype=torch.float64)
    with torch.no_grad():
        model.double()(x1[:1].clone())  # lazy layers
    for value in model.parameters():
        if value.is_complex():
            value.data = value.data.to(torch.complex128)
    return model, x1, x2


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("name", MODELS)
def test_against_jacobians(name: str) -> None:
    model, x1, x2 = build(name)
    left, right = jacobian(model, x1), jacobian(model, x2)
    expected = torch.einsum("nap,mbp->nmab", left, right)
    before = [x1.clone(), x2.clone()]
    result = fw.ntk.empirical_ntk(model, x1, x2)
    assert result.shape == expected.shape
    assert error(result, expected) <= 1e-12
    assert torch.equal(x1, before[0])
    assert torch.equal(x2, before[1])
    diagonal = fw.ntk.empirical_ntk(model, x1, x2, compute="diagonal")
    assert error(diagonal, expected.diagonal(dim1=2, dim2=3)) <= 1e-12
    trace = fw.ntk.empirical_ntk(model, x1, x2, compute="trace", check=False)
    assert error(trace, expected.diagonal(dim1=2, dim2=3).sum(2)) <= 1e-12
    symmetric = fw.ntk.empirical_ntk(model, x1)
    assert error(symmetric, torch.einsum("nap,mbp->nmab", left, left)) <= 1e-12
    assert torch.equal(symmetric, symmetric.permute(1, 0, 3, 2))
    parts = fw.ntk.per_parameter_ntk(model, x1, x2)
    assert list(parts) == [key for key, value in model.named_parameters() if value.requires_grad]
    assert error(torch.stack(list(parts.values())).sum(0), expected) <= 1e-12
    str(fw.ntk.explain(model, x1, x2))


@pytest.mark.parametrize("method", ["jacobian", "products"])
@pytest.mark.parametrize(
    "name", ["mlp, in-place ReLU", "conv", "tied weights", "LSTM", "complex parameters", "branches on data"]
)
def test_other_methods(name: str, method: str) -> None:
    model, x1, x2 = build(name)
    expected = exact(model, x1, x2)
    for compute, part in [
        ("full", expected),
        ("diagonal", expected.diagonal(dim1=2, dim2=3)),
        ("trace", expected.diagonal(dim1=2, dim2=3).sum(2)),
    ]:
        assert error(fw.ntk.empirical_ntk(model, x1, x2, method=method, compute=compute), part) <= 1e-12
    symmetric = fw.ntk.empirical_ntk(model, x1, method=method)
    assert error(symmetric, exact(model, x1, x1)) <= 1e-12
    assert torch.equal(symmetric, symmetric.permute(1, 0, 3, 2))


@pytest.mark.parametrize(
    "name",
    [
        "mlp, in-place ReLU",
        "conv",
        "conv after ReLU",
        "dense after ReLU",
        "conv, wide groups",
        "conv, Winograd's form",
        "batch norm",
        "attention",
        "sequence",
        "embedding with padding",
    ],
)
def test_float32(name: str) -> None:
    model, x1, x2 = build(name)
    expected = exact(model, x1, x2)
    model.float()
    single = [x.float() if x.is_floating_point() else x for x in (x1, x2)]
    result = fw.ntk.empirical_ntk(model, *single)
    assert result.dtype == torch.float32
    assert error(result, expected) <= 1e-5


def test_units_over_a_black_border_stay_closed() -> None:
    """Without biases they are exactly 0, where a ReLU's derivative is 0: a rounding error more would make it 1."""
    torch.manual_seed(0)
    model = conv(*wide_convs(bias=False), nn.ReLU()).double().eval()
    images = torch.randn(3, 24, 7, 6, dtype=torch.float64)
    images[:, :, :, 2:] = 0
    with torch.no_grad():
        model(images)  # lazy layers
    assert error(fw.ntk.empirical_ntk(model, images), exact(model, images, images)) <= 1e-12


def test_a_branch_that_the_probe_does_not_see() -> None:
    torch.manual_seed(0)
    model = Rare().double()
    x = torch.randn(7, 6, dtype=torch.float64)
    x[6] = 100
    assert error(fw.ntk.empirical_ntk(model, x), exact(model, x, x)) <= 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "mlp, in-place ReLU",
        "conv",
        "tied weights",
        "embedding with padding",
        "LSTM",
        "custom autograd function",
        "complex parameters",
    ],
)
def test_operator(name: str) -> None:
    model, x1, x2 = build(name)
    kernel = exact(model, x1, x2)
    outputs = kernel.shape[2]
    matrix = kernel.permute(0, 2, 1, 3).reshape(N * outputs, M * outputs)
    op = fw.ntk.NTKOperator(model, x1, x2)
    assert op.shape == matrix.shape
    assert op.T.shape == matrix.t().shape
    v, u = torch.randn(M * outputs, 3, dtype=torch.float64), torch.randn(N * outputs, dtype=torch.float64)
    assert error(op @ v, matrix @ v) <= 1e-11
    assert error(op.T @ u, matrix.t() @ u) <= 1e-11
    assert error(op.diagonal(), matrix.diagonal()) <= 1e-12
    assert error(op.to_dense(), matrix) <= 1e-12
    assert error(op.T.to_dense(), matrix.t()) <= 1e-12


@pytest.mark.parametrize("name", ["rows merged with positions", "rows on the second axis", "attention, time first"])
def test_one_row_against_many(name: str) -> None:
    """A single row would not tell how rows lie in a layer's input."""
    model, x1, x2 = build(name)
    for left, right in [(x1[:1], x2), (x1, x2[:1]), (x1[:1], x2[:1]), (x1[:2], x2[:3])]:
        assert error(fw.ntk.empirical_ntk(model, left, right), exact(model, left, right)) <= 1e-12


class OutArgument(nn.Module):
    """A matrix product into a given tensor, beside a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.out = nn.Linear(6, 6), nn.Linear(6, 3)
        self.register_buffer("turn", torch.randn(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        turned = torch.matmul(x, self.turn, out=torch.empty_like(x))
        return self.out(self.layer(turned).tanh())


def test_products_into_a_given_tensor() -> None:
    torch.manual_seed(0)
    model = OutArgument().double()
    x = torch.randn(4, 6, dtype=torch.float64)
    assert error(fw.ntk.empirical_ntk(model, x), exact(model, x, x)) <= 1e-12


def test_a_compiled_model() -> None:
    model, x1, x2 = build("mlp, in-place ReLU")
    expected = exact(model, x1, x2)
    compiled = torch.compile(model, backend="eager")
    compiled(x1)
    assert error(fw.ntk.empirical_ntk(compiled, x1, x2), expected) <= 1e-12
    compiled = torch.compile(model, backend="aot_eager")
    assert error(fw.ntk.empirical_ntk(compiled, x1, x2), expected) <= 1e-12


@pytest.mark.parametrize(
    "name",
    [
        "mlp, in-place ReLU",
        "conv groups",
        "conv after ReLU",
        "dense after ReLU",
        "conv, wide groups",
        "wide conv, few positions",
        "sequence",
        "tied weights",
        "embedding with padding",
    ],
)
def test_references_and_kernels(name: str) -> None:
    model, x1, x2 = build(name)
    expected = exact(model, x1, x2)
    with fw.reference_only():
        assert error(fw.ntk.empirical_ntk(model, x1, x2), expected) <= 1e-12
        symmetric = fw.ntk.empirical_ntk(model, x1)
    assert torch.equal(symmetric, symmetric.permute(1, 0, 3, 2))
    assert error(symmetric, exact(model, x1, x1)) <= 1e-12
