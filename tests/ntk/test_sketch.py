"""Sketches: without bias, linear in the gradient, and the same however the rows are cut."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from benchmarks.small_gpt import SmallGPT
from torch import Tensor, nn

import finite_width as fw
from finite_width.ntk import counters
from finite_width.ntk.projections import KINDS, add_rows, hadamard

kinds = pytest.mark.parametrize("kind", list(KINDS))


class Words(nn.Module):
    """An embedding tied to the output layer, a convolution, a norm and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.conv, self.norm = nn.Embedding(11, 4, padding_idx=0), nn.Conv1d(4, 4, 3), nn.LayerNorm(4)
        self.out = nn.Linear(4, 11, bias=False)
        self.out.weight = self.embedding.weight
        self.scale = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.conv(self.embedding(x).mT).tanh().mean(2)
        return self.out(self.norm(hidden) * self.scale)[:, :3]


def models() -> dict[str, tuple[nn.Module, Tensor]]:
    torch.manual_seed(1)
    return {
        "mlp": (nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 2)), torch.randn(3, 6).double()),
        "words": (Words(), torch.randint(11, (3, 7))),
        "gpt": (SmallGPT(12, 5, 8, heads=2, depth=1), torch.randint(12, (3, 5))),
        "unrecognised": (nn.GRU(4, 3, batch_first=True), torch.randn(3, 5, 4).double()),
    }


def pick(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    result = result[0] if isinstance(result, tuple) else result
    return result.flatten(1)[:, :2]


def gram(features: Tensor) -> Tensor:
    return torch.einsum("nad,mbd->nmab", features, features)


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@kinds
@pytest.mark.parametrize("name", list(models()))
def test_without_bias(name: str, kind: str) -> None:
    """The mean over k seeds comes near the exact kernel as 1/√k."""
    model, x = models()[name]
    model = model.double()
    exact = fw.ntk.empirical_ntk(model, x, output=pick)
    seeds = 60
    each = [gram(fw.ntk.sketch(model, x, 64, kind=kind, seed=seed, output=pick)) for seed in range(seeds)]
    spread = sum(relative(one, exact) ** 2 for one in each) ** 0.5 / seeds**0.5
    assert relative(torch.stack(each).mean(0), exact) < 2 * spread / seeds**0.5


@kinds
def test_error_falls_as_one_over_root_dim(kind: str) -> None:
    model = nn.Sequential(nn.Linear(20, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2)).double()
    x = torch.randn(8, 20).double()
    exact = fw.ntk.empirical_ntk(model, x)
    dims = [64, 256, 1024, 4096]
    errors = []
    for dim in dims:
        squares = [relative(gram(fw.ntk.sketch(model, x, dim, kind=kind, seed=s)), exact) ** 2 for s in range(8)]
        errors.append((sum(squares) / len(squares)) ** 0.5)
    slopes = torch.tensor(errors).log().diff() / torch.tensor(dims).double().log().diff()
    assert abs(float(slopes.mean()) + 0.5) < 0.12, errors


@kinds
@pytest.mark.parametrize("name", list(models()))
def test_is_linear_in_the_gradients(name: str, kind: str) -> None:
    """The structured routes give what the projection of the Jacobian itself gives."""
    model, x = models()[name]
    model = model.double()
    found = fw.ntk.sketch(model, x, 32, kind=kind, seed=5, output=pick)
    projection = KINDS[kind](32, 5, torch.float64, x.device)
    total = projection.start(3, 2)
    parameters = dict(model.named_parameters())
    for row in range(3):
        for index in range(2):
            value = pick(model(x[row : row + 1]))[0, index]
            gradients = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
            for (label, parameter), gradient in zip(parameters.items(), gradients, strict=True):
                if gradient is not None:
                    size = parameter.shape[0] if parameter.dim() > 1 else None
                    part = gradient.reshape(1, 1, size or 1, -1)
                    add_rows(projection, total[row : row + 1, index : index + 1], label, part, 0, size)
    assert relative(found, projection.finish(total)) < 1e-12


@kinds
def test_one_projection_of_a_single_row_on_every_route(kind: str) -> None:
    """A weight [1, W] is projected alike where its structure is recognised and where autograd gives its Jacobian."""

    class Rerouted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1).double()

        def forward(self, x: Tensor) -> Tensor:
            if (x > 0).all():
                return self.layer(x)
            return (x * self.layer.weight).sum(1, keepdim=True) + self.layer.bias

    model, x = Rerouted(), torch.rand(5, 3).double()
    other = x.clone()
    other[4] *= -1
    structured, generic = fw.ntk.sketch(model, x, 64, kind=kind), fw.ntk.sketch(model, other, 64, kind=kind)
    assert relative(structured[:4], generic[:4]) < 1e-12


@kinds
def test_rows_alone_or_together(kind: str) -> None:
    model, x = models()["words"]
    model = model.double()
    together = fw.ntk.sketch(model, x, 32, kind=kind)
    alone = torch.cat([fw.ntk.sketch(model, row[None], 32, kind=kind) for row in x])
    assert relative(alone, together) < 1e-12
    assert relative(fw.ntk.sketch(model, x, 32, kind=kind, seed=1), together) > 0.5


def test_numpy_integers_are_integers() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    found = fw.ntk.sketch(model, x, np.int64(8), seed=np.int64(3))  # type: ignore[arg-type]
    assert torch.equal(found, fw.ntk.sketch(model, x, 8, seed=3))
    with pytest.raises(TypeError, match="seed must be an int, got bool"):
        fw.ntk.sketch(model, x, 8, seed=True)


def test_hadamard() -> None:
    matrix = torch.tensor([[1.0]])
    for _ in range(3):
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    assert torch.equal(hadamard(torch.eye(8)), matrix)


def test_counters_are_fixed_and_even() -> None:
    index = torch.arange(1 << 16)
    stream = counters.key(3, "layer", "sign")
    assert stream == counters.key(3, "layer", "sign") != counters.key(4, "layer", "sign")
    # SplitMix64 of seed 0: the published first outputs.
    first = [value % (1 << 64) for value in counters.bits(0, torch.tensor([1, 2])).tolist()]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    assert abs(float(counters.signs(stream, index, torch.float64).mean())) < 4 / 256
    counts = torch.bincount(counters.integers(stream, index, 16), minlength=16).double()
    assert float((counts - 4096).square().sum() / 4096) < 45  # χ² with 15 degrees of freedom
    normals = counters.normals(stream, index, torch.float64)
    assert abs(float(normals.mean())) < 4 / 256
    assert abs(float(normals.square().mean()) - 1) < 0.03
    assert abs(float(normals.pow(4).mean()) - 3) < 0.3
    assert torch.equal(normals[100:200], counters.normals(stream, index[100:200], torch.float64))


def test_bad_input() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="kind must be one of 'countsketch', 'gaussian', 'srht', got 'sparse'"):
        fw.ntk.sketch(model, x, 8, kind="sparse")
    with pytest.raises(ValueError, match="dim must be at least 1, got 0"):
        fw.ntk.sketch(model, x, 0)
    with pytest.raises(TypeError, match="seed must be an int"):
        fw.ntk.sketch(model, x, 8, seed=0.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="x1 has dtype"):
        fw.ntk.sketch(model, x.double(), 8)
