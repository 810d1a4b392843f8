"""The conjugate kernel: which features it takes, and what it refuses."""

import pytest
import torch
from torch import nn

import finite_width as fw


def x(rows=6, features=4, seed=0):
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def mlp():
    torch.manual_seed(0)
    layers = [nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 5), nn.ReLU(), nn.Linear(5, 2)]
    return nn.Sequential(*layers).double()


def test_inputs_of_the_last_linear_layer():
    model = mlp()
    with torch.no_grad():
        h1, h2 = model[:4](x()), model[:4](x(3, seed=1))
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x(), x(3, seed=1)), h1 @ h2.T)
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x()), h1 @ h1.T)
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x(), normalize=True), h1 @ h1.T / 5)


def test_a_layer_by_name():
    model = mlp()
    with torch.no_grad():
        h = model[:2](x())
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x(), layer="2"), h @ h.T)


def test_a_layer_that_is_not_linear_and_features_of_several_axes():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2), nn.Flatten()).double()
    images = x(5, 16).reshape(5, 1, 4, 4)
    with torch.no_grad():
        h = model[:2](images).flatten(1)
        before = model[0](images).flatten(1)
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, images, layer="2"), h @ h.T)
    # The in-place ReLU overwrites its input; the features are what came in.
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, images, layer="1"), before @ before.T)


def test_many_rows_are_fed_in_blocks():
    model = mlp()
    many = x(2500)
    with torch.no_grad():
        h = model[:4](many)
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, many, many[:3]), h @ h[:3].T)


def test_last_called_not_last_defined():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.second, self.first = nn.Linear(8, 1), nn.Linear(4, 8)

        def forward(self, value):
            return self.second(torch.tanh(self.first(value)))

    model = Backwards().double()
    with torch.no_grad():
        h = torch.tanh(model.first(x()))
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x()), h @ h.T)


def test_the_model_comes_back_as_it_was_after_an_exception():
    class Broken(nn.Sequential):
        def forward(self, value):
            super().forward(value)
            raise RuntimeError("broken")

    model = Broken(nn.Linear(4, 2)).double()
    with pytest.raises(RuntimeError, match="broken"):
        fw.ntk.nngp_kernel(model, x())
    assert not model[0]._forward_pre_hooks


def test_refusals():
    with pytest.raises(ValueError, match=r"'9' is not a layer of Sequential; it has 0, 1"):
        fw.ntk.nngp_kernel(mlp(), x(), layer="9")
    with pytest.raises(ValueError, match=r"has no nn.Linear"):
        fw.ntk.nngp_kernel(nn.Sequential(nn.Conv1d(1, 1, 1)), torch.ones(2, 1, 3))
    with pytest.raises(ValueError, match=r"'1' \(Dropout\) is in train mode.*call model.eval\(\)"):
        fw.ntk.nngp_kernel(nn.Sequential(nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 1)).double(), x())
    with pytest.raises(ValueError, match="several positions per row"):
        fw.ntk.nngp_kernel(mlp(), x(6, 12).reshape(6, 3, 4))
    with pytest.raises(ValueError, match="empty"):
        fw.ntk.nngp_kernel(mlp(), x(0))
    with pytest.raises(TypeError, match="x1 must be a tensor"):
        fw.ntk.nngp_kernel(mlp(), "x")
    shared = nn.Linear(4, 4).double()
    with pytest.raises(ValueError, match="called more than once"):
        fw.ntk.nngp_kernel(nn.Sequential(shared, nn.ReLU(), shared), x())

    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 1), nn.Linear(4, 1)

        def forward(self, value):
            return self.used(value)

    with pytest.raises(ValueError, match="did not call layer 'unused'"):
        fw.ntk.nngp_kernel(Unused().double(), x(), layer="unused")
