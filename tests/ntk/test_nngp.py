"""The conjugate kernel: which features it takes, and what it refuses."""

import pytest
import torch
import torch.nn.functional as F
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
    with pytest.raises(ValueError, match=r"model cannot take x1 with shape \[6, 4\]: broken"):
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
    with pytest.raises(ValueError, match=r"x1 must have at least one row, got shape \[0, 4\]"):
        fw.ntk.nngp_kernel(mlp(), x(0))
    with pytest.raises(TypeError, match="x1 must be a tensor"):
        fw.ntk.nngp_kernel(mlp(), "x")
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, got NoneType"):
        fw.ntk.nngp_kernel(None, x())
    with pytest.raises(ValueError, match=r"model cannot take x2 with shape \[6, 3\]: mat1 and mat2"):
        fw.ntk.nngp_kernel(mlp(), x(), x(features=3))
    with pytest.raises(TypeError, match=r"x1 has dtype torch.float32, but the model's parameters have torch.float64"):
        fw.ntk.nngp_kernel(mlp(), x().float())
    with pytest.raises(ValueError, match=r"model cannot take x1.*integers stay integers"):
        fw.ntk.nngp_kernel(mlp(), x().long())
    with pytest.raises(TypeError, match="the inputs of layer '4' must be float32 or float64, got bfloat16"):
        fw.ntk.nngp_kernel(mlp().bfloat16(), x().bfloat16())
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


class Between(nn.Module):
    """Two layers, with one function before and one between them."""

    def __init__(self, before=lambda value: value, between=torch.tanh):
        super().__init__()
        torch.manual_seed(0)
        self.before, self.between = before, between
        self.first, self.last = nn.Linear(4, 6).double(), nn.Linear(6, 1).double()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, value):
        self.calls += 1
        return self.last(self.between(self.first(self.before(value))))


class BatchAttention(nn.Module):
    """Rows taken for positions: batch_first was forgotten."""

    def __init__(self):
        super().__init__()
        self.attention, self.last = nn.MultiheadAttention(4, 2).double(), nn.Linear(4, 1).double()

    def forward(self, value):
        return self.last(self.attention(value, value, value)[0])


class Counter(Between):
    """Every call gives other features, without random numbers."""

    def forward(self, value):
        return super().forward(value * (1 + self.calls))


NOT_ROW_BY_ROW = {
    "batch statistics": (lambda: Between(lambda value: value - value.mean(0)), "the model mixes rows"),
    "rows before": (lambda: Between(lambda value: value.cumsum(0)), "the model mixes rows"),
    "norm of all rows": (lambda: Between(between=lambda h: h / h.norm()), "the model mixes rows"),
    "attention over rows": (BatchAttention, "the model mixes rows"),
    "functional dropout": (lambda: Between(between=F.dropout), "model draws random numbers"),
    "state": (Counter, "two forwards of the same rows differ"),
}


@pytest.mark.parametrize("rows", [2, 3, 6])
@pytest.mark.parametrize("name", NOT_ROW_BY_ROW)
def test_rows_that_mix_and_random_numbers_are_refused(name, rows):
    make, message = NOT_ROW_BY_ROW[name]
    model, generator = make(), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        fw.ntk.nngp_kernel(model, x(rows))
    assert torch.equal(generator, torch.get_rng_state())
    assert fw.ntk.nngp_kernel(model, x(rows), check=False).shape == (rows, rows)


def test_a_model_that_takes_no_single_row_is_accepted_from_two_rows_on():
    model = Between(lambda value: value.squeeze())
    torch.testing.assert_close(fw.ntk.nngp_kernel(model, x(2)), fw.ntk.nngp_kernel(Between(), x(2)))


def test_the_input_and_the_buffers_stay_as_they_are():
    x1, x2 = x(), x(3, seed=1)
    model = Between(lambda value: value.relu_())
    K = fw.ntk.nngp_kernel(model, x1, x2)
    assert torch.equal(x1, x())
    assert torch.equal(x2, x(3, seed=1))
    assert model.calls == 0
    torch.testing.assert_close(K, fw.ntk.nngp_kernel(Between(), x().relu(), x2.relu()))


@pytest.mark.parametrize("reference", [False, True])
def test_autocast_around_the_call_changes_nothing(reference):
    model = mlp().float()
    with fw.reference_only() if reference else torch.enable_grad():
        expected = fw.ntk.nngp_kernel(model, x().float())
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(fw.ntk.nngp_kernel(model, x().float()), expected)
