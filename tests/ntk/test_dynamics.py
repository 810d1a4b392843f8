"""Gradient flow against gradient descent, the linearised module against the model, diagnostics against formulas."""

import math

import pytest
import torch
from torch import nn

import finite_width as fw


def mlp(outputs=1, width=12, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, width), nn.Tanh(), nn.Linear(width, outputs)).double()


def points(rows=8, seed=0, features=3):
    return torch.randn(rows, features, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def psd(size=6, seed=0):
    factor = points(size, seed, size)
    return factor @ factor.T / size + 0.1 * torch.eye(size, dtype=torch.float64)


def descend(model, x, y, x_new, steps, rate, loss):
    """Outputs after plain gradient descent on the linearised model."""
    linear = fw.ntk.linearize(model)
    optimizer = torch.optim.SGD(linear.trained.parameters(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        errors = (linear(x) - y).square()
        (errors.sum() / 2 if loss == "sum" else errors.mean() / 2).backward()
        optimizer.step()
    with torch.no_grad():
        return linear(x), linear(x_new)


@pytest.mark.parametrize(("outputs", "loss"), [(1, "sum"), (2, "sum"), (2, "mean")])
def test_gradient_flow_is_small_step_gradient_descent_on_the_linearised_model(outputs, loss):
    model, x, new = mlp(outputs), points(), points(3, seed=1)
    y = torch.stack([x[:, 0].sin(), x[:, 1]], dim=1)[:, :outputs]
    K, K_new = fw.ntk.empirical_ntk(model, x), fw.ntk.empirical_ntk(model, new, x)
    with torch.no_grad():
        f0, f0_new = model(x), model(new)
    time = 0.5 if loss == "sum" else 0.5 * y.numel()
    flow = fw.ntk.gradient_flow(K, y, K_new, time, f0_train=f0, f0_test=f0_new, loss=loss)
    # First-order in the step: the difference to the flow halves with the step.
    errors = []
    for steps in (100, 200):
        train, test = descend(model, x, y, new, steps, time / steps, loss)
        errors.append(max((train - flow.train).abs().max().item(), (test - flow.test).abs().max().item()))
    assert errors[1] < 0.02
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)


def test_one_kernel_for_all_columns():
    K, K_new, y = psd(), points(4, 1, 6), points(6, 2, 3)
    times = torch.tensor([0.0, 0.3, 2.0])
    flow = fw.ntk.gradient_flow(K, y, K_new, times)
    assert flow.train.shape == (3, 6, 3)
    assert flow.test.shape == (3, 4, 3)
    for index, time in enumerate(times.tolist()):
        learned = (torch.eye(6, dtype=torch.float64) - torch.linalg.matrix_exp(-K * time)) @ y
        torch.testing.assert_close(flow.train[index], learned)
        torch.testing.assert_close(flow.test[index], K_new @ torch.linalg.solve(K, learned))
        single = fw.ntk.gradient_flow(K, y[:, 0], K_new, time)
        torch.testing.assert_close(single.test, flow.test[index, :, 0])


def test_the_end_of_time_is_kernel_regression():
    K, K_new, y = psd(), points(4, 1, 6), points(6, 2, 2)
    flow = fw.ntk.gradient_flow(K, y, K_new, math.inf)
    torch.testing.assert_close(flow.train, y)
    torch.testing.assert_close(flow.test, K_new @ torch.linalg.solve(K, y))


def test_directions_without_kernel_never_move():
    K = torch.diag(torch.tensor([1.0, 0.0], dtype=torch.float64))
    flow = fw.ntk.gradient_flow(K, torch.ones(2), K, math.inf, f0_train=torch.tensor([0.0, 0.25]), f0_test=0.5)
    torch.testing.assert_close(flow.train, torch.tensor([1.0, 0.25]))
    torch.testing.assert_close(flow.test, torch.tensor([1.5, 0.5]))
    assert fw.ntk.gradient_flow(K, torch.ones(2), None, 1.0).test is None


@pytest.mark.parametrize("time", [1e9, math.inf])
def test_the_rounding_of_a_float32_kernel_is_not_fitted(time):
    torch.manual_seed(0)
    net, x, new = nn.Linear(3, 1), points(20).float(), points(5, 1).float()
    y = x[:, 0] + 0.1 * torch.randn(20)
    K, K_new = (fw.ntk.empirical_ntk(net, each, x, compute="trace") for each in (x, new))
    design, design_new = (torch.cat([each, torch.ones(len(each), 1)], 1) for each in (x, new))
    weights = torch.linalg.lstsq(design, y[:, None]).solution
    flow = fw.ntk.gradient_flow(K, y, K_new, time)
    torch.testing.assert_close(flow.test, (design_new @ weights)[:, 0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(flow.train, (design @ weights)[:, 0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"K_train": torch.ones(2, 3)}, ValueError, r"K_train must have shape \[N, N\]"),
        ({"y": torch.ones(3)}, ValueError, r"y must have shape \[2\] or \[2, C\]"),
        ({"K_test": torch.ones(4, 3)}, ValueError, r"K_test must have shape \[M, 2\], got \[4, 3\]"),
        ({"K_train": torch.ones(2, 2, 3, 3)}, ValueError, r"y must have shape \[2, 3\]"),
        ({"t": -1.0}, ValueError, "t must be at least 0, got -1"),
        ({"t": math.nan}, ValueError, "t must be at least 0, got nan"),
        ({"t": torch.ones(2, 2)}, ValueError, r"t must be a number or have shape \[T\], got \[2, 2\]"),
        ({"loss": "huber"}, ValueError, "loss must be one of"),
        ({"f0_train": torch.ones(3)}, ValueError, r"f0_train must be a number or have shape \[2\]"),
        ({"f0_test": torch.ones(3)}, ValueError, r"f0_test must be a number or have shape \[4\]"),
        ({"y": torch.ones(2, dtype=torch.int64)}, TypeError, "y must be float32 or float64"),
        ({"t": "a"}, TypeError, "t must be a number or a tensor, got str"),
        ({"t": None}, TypeError, "t must be a number or a tensor, got NoneType"),
        ({"t": torch.tensor(1j)}, TypeError, "t must be real"),
        ({"f0_train": "a"}, TypeError, "f0_train must be a number or a tensor, got str"),
        ({"f0_test": 1j}, TypeError, "f0_test must be real"),
        ({"f0_train": math.inf}, ValueError, "f0_train holds NaN or infinite entries"),
        ({"K_train": torch.full((2, 2), math.nan)}, ValueError, "K_train holds NaN or infinite entries"),
        ({"K_test": torch.full((4, 2), math.inf)}, ValueError, "K_test holds NaN or infinite entries"),
        (
            {"K_train": torch.eye(2) + torch.ones(2, 2).triu(1)},
            ValueError,
            "K_train must be symmetric, but differs from",
        ),
        ({"K_train": torch.eye(2).to_sparse()}, TypeError, "K_train must be a dense tensor"),
        ({"K_test": torch.ones(4, 2, device="meta")}, ValueError, "K_test is on the meta device"),
        ({"K_train": torch.ones(0, 0), "y": torch.ones(0)}, ValueError, r"N, O > 0, got \[0, 0\]"),
        ({"K_train": torch.ones(2, 2, 2, 4)}, ValueError, r"K_train must have shape .* got \[2, 2, 2, 4\]"),
    ],
)
def test_gradient_flow_refuses(change, error, message):
    arguments = {"K_train": torch.eye(2), "y": torch.ones(2), "K_test": torch.ones(4, 2), "t": 1.0} | change
    with pytest.raises(error, match=message):
        fw.ntk.gradient_flow(**arguments)


def test_the_linearised_module_is_the_first_order_model():
    model, x = mlp(outputs=2), points()
    linear = fw.ntk.linearize(model)
    assert torch.equal(linear(x), model(x))
    change = {name: 1e-4 * torch.randn_like(value) for name, value in model.named_parameters()}
    with torch.no_grad():
        for name, value in linear.trained.named_parameters():
            value += change[name]
        jacobian = torch.func.jacrev(lambda values: torch.func.functional_call(model, values, x))(
            {name: value.detach() for name, value in model.named_parameters()}
        )
        expected = model(x) + sum((jacobian[name] * value).flatten(2).sum(2) for name, value in change.items())
        torch.testing.assert_close(linear(x), expected, rtol=1e-12, atol=1e-12)


def test_the_linearised_module_keeps_the_kernel_wherever_it_goes():
    model, x = mlp(), points()
    linear = fw.ntk.linearize(model)
    K = fw.ntk.empirical_ntk(model, x)
    with torch.no_grad():
        for value in linear.trained.parameters():
            value += 0.3
    torch.testing.assert_close(fw.ntk.empirical_ntk(linear, x), K)


def test_linearize_keeps_frozen_parameters_and_structure():
    model = mlp()
    model[0].requires_grad_(False)
    linear = fw.ntk.linearize(model)
    trainable = [name for name, value in linear.named_parameters() if value.requires_grad]
    assert trainable == ["trained.2.weight", "trained.2.bias"]
    linear(points()).sum().backward()
    assert linear.trained[2].weight.grad is not None
    assert linear.trained[0].weight.grad is None
    assert model[2].weight.grad is None

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = mlp()

        def forward(self, value):
            return {"value": self.inner(value), "twice": 2 * self.inner(value)}

    result = fw.ntk.linearize(Named())(points())
    torch.testing.assert_close(result["twice"], 2 * result["value"])


def test_a_parameter_frozen_after_training_keeps_what_it_learned():
    linear, x = fw.ntk.linearize(mlp()), points()
    with torch.no_grad():
        for value in linear.trained.parameters():
            value += 0.1
    expected = linear(x).detach()
    linear.trained[0].requires_grad_(False)
    assert torch.equal(linear(x), expected)
    linear(x).sum().backward()
    assert linear.trained[0].weight.grad is None
    assert linear.trained[2].weight.grad is not None
    assert torch.equal(linear.requires_grad_(False)(x), expected)


def test_linearize_refuses():
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module"):
        fw.ntk.linearize(lambda x: x)
    with pytest.raises(ValueError, match="no trainable parameter"):
        fw.ntk.linearize(mlp().requires_grad_(False))


def test_spectrum_and_effective_dimension():
    K = psd()
    values = torch.linalg.eigvalsh(K)
    torch.testing.assert_close(fw.ntk.spectrum(K), values.flip(0))
    expected = torch.trace(K @ torch.linalg.inv(K + 0.5 * torch.eye(6, dtype=torch.float64)))
    assert fw.ntk.effective_dimension(K, 0.5) == pytest.approx(expected.item())
    with pytest.raises(ValueError, match="ridge must be positive"):
        fw.ntk.effective_dimension(K, 0.0)
    with pytest.raises(ValueError, match=r"K must be square"):
        fw.ntk.spectrum(torch.ones(2, 3))


@pytest.mark.parametrize("center", [False, True])
def test_target_alignment(center):
    K, y = psd(), points(6, 2, 3)
    expected_K, target = K, y @ y.T
    if center:
        H = torch.eye(6, dtype=torch.float64) - 1 / 6
        expected_K, target = H @ K @ H, H @ y @ y.T @ H
    expected = (expected_K * target).sum() / expected_K.norm() / target.norm()
    assert fw.ntk.target_alignment(K, y, center=center) == pytest.approx(expected.item())
    assert fw.ntk.target_alignment(5 * K, 7 * y, center=center) == pytest.approx(expected.item())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_diagnostics_at_any_scale(scale):
    K0, K1, y = psd(), psd(seed=1), points(6, 2, 3)
    for kind in ("relative", "cosine"):
        expected = fw.ntk.drift(K0, K1, kind=kind)
        assert fw.ntk.drift(scale * K0, scale * K1, kind=kind) == pytest.approx(expected)
        assert fw.ntk.drift(scale * K0, -scale * K0, kind=kind) == pytest.approx(2)
    for center in (False, True):
        expected = fw.ntk.target_alignment(K0, y, center=center)
        assert fw.ntk.target_alignment(scale * K0, scale * y, center=center) == pytest.approx(expected)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_diagnostics_refuse_what_is_not_finite(bad):
    K, wrong = psd(), psd()
    wrong[1, 0] = bad
    for name, call in {
        "K": lambda: fw.ntk.effective_dimension(wrong, 1.0),
        "K1": lambda: fw.ntk.drift(K, wrong, kind="cosine"),
        "K0": lambda: fw.ntk.drift(wrong, K),
        "y": lambda: fw.ntk.target_alignment(K, wrong),
    }.items():
        with pytest.raises(ValueError, match=f"^{name} holds NaN or infinite entries"):
            call()


def test_diagnostics_refuse_what_is_not_symmetric_or_has_no_values():
    K = psd()
    for call in (fw.ntk.spectrum, lambda value: fw.ntk.effective_dimension(value, 1.0)):
        with pytest.raises(ValueError, match="K must be symmetric, but differs from its transpose"):
            call(K + torch.ones_like(K).triu(1))
    for bad, error, message in (
        (K.to_sparse(), TypeError, "must be a dense tensor"),
        (K.to("meta"), ValueError, "is on the meta device"),
    ):
        for name, call in {
            "K": lambda: fw.ntk.spectrum(bad),  # noqa: B023
            "y": lambda: fw.ntk.target_alignment(K, bad),  # noqa: B023
            "K1": lambda: fw.ntk.drift(K, bad),  # noqa: B023
        }.items():
            with pytest.raises(error, match=f"^{name} {message}"):
                call()


def test_target_alignment_is_at_most_one():
    for seed in range(30):
        y = points(6, seed, 1)
        assert fw.ntk.target_alignment(y @ y.T, y) <= 1


def test_target_alignment_refuses():
    with pytest.raises(TypeError, match="y must be real, got complex128"):
        fw.ntk.target_alignment(psd(), torch.ones(6, dtype=torch.complex128))
    with pytest.raises(ValueError, match="must not be zero"):
        fw.ntk.target_alignment(torch.ones(0, 0), torch.ones(0))
    with pytest.raises(ValueError, match="is y constant"):
        fw.ntk.target_alignment(psd(), torch.ones(6), center=True)
    with pytest.raises(ValueError, match=r"y must have shape \[6\]"):
        fw.ntk.target_alignment(psd(), torch.ones(5))


def test_drift():
    K0, K1 = psd(), psd(seed=1)
    assert fw.ntk.drift(K0, K1) == pytest.approx(((K1 - K0).norm() / K0.norm()).item())
    cosine = 1 - ((K0 * K1).sum() / K0.norm() / K1.norm()).item()
    assert fw.ntk.drift(K0, K1, kind="cosine") == pytest.approx(cosine)
    assert fw.ntk.drift(K0, K0) == 0
    assert fw.ntk.drift(K0, 3 * K0, kind="cosine") == pytest.approx(0, abs=1e-12)
    with pytest.raises(ValueError, match="same shape"):
        fw.ntk.drift(K0, K1[:2])
    with pytest.raises(ValueError, match="K0 must not be zero"):
        fw.ntk.drift(0 * K0, K1)
