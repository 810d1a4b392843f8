"""The layers under everything that torch does with modules: estimators, convolutions, autocast, checkpoints, compile,
torch.func, copies, optimizers, other wings."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.nn.utils.parametrize
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finite_width as fw
from finite_width.bayes import BayesConv1d, BayesConv2d, BayesConv3d, BayesLinear, GaussianPrior, MopedPrior, ops
from finite_width.bayes.layers import draw_seed, perturb

X = torch.linspace(-2, 2, 24).reshape(4, 6)
CONVOLUTIONS: list[tuple[Any, Any, tuple[int, ...]]] = [
    (BayesConv1d, nn.Conv1d, (2, 4, 9)),
    (BayesConv2d, nn.Conv2d, (2, 4, 7, 6)),
    (BayesConv3d, nn.Conv3d, (2, 4, 5, 4, 6)),
]


def loss(model: nn.Module, x: Tensor = X) -> Tensor:
    return model(x).square().sum() + 0.1 * fw.bayes.kl(model)


def gradients(model: nn.Module, x: Tensor = X, seed: int = 3) -> list[Tensor]:
    torch.manual_seed(seed)
    return list(torch.autograd.grad(loss(model, x), list(model.parameters())))


def assert_all_close(first: list[Tensor], second: list[Tensor], tolerance: float = 1e-5) -> None:
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture
def model() -> nn.Sequential:
    return nn.Sequential(BayesLinear(6, 8, init_std=0.3), nn.Tanh(), BayesLinear(8, 3, bias=False, init_std=0.3))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("estimator", ["flipout", "local"])
def test_estimators_have_the_moments_of_weight_sampling(estimator: str, bias: bool) -> None:
    """Mean and variance of the output at each unit: mean μx, variance σ²x² (+ σb²)."""
    layer = BayesLinear(6, 5, bias=bias, estimator=estimator, init_std=0.4)
    n = 4000
    with torch.no_grad():
        y = torch.stack([layer(X) for _ in range(n)]).double()
        mean = F.linear(X, layer.weight_mu, layer.bias_mu).double()
        variance = F.linear(X**2, layer.weight_std() ** 2, None if not bias else torch.full((5,), 0.16)).double()
    assert float(((y.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < 5
    assert float((y.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)
    weight = BayesLinear(6, 5, bias=bias, init_std=0.4)
    weight.load_state_dict(layer.state_dict())
    with torch.no_grad():
        sampled = torch.stack([weight(X) for _ in range(n)]).double()
    assert float((sampled.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)


def test_flipout_decorrelates_the_examples() -> None:
    """With one weight sample, equal examples get equal outputs; flipout and local give each its own."""
    x = torch.ones(200, 6)
    for estimator, correlated in (("weight", True), ("flipout", False), ("local", False)):
        layer = BayesLinear(6, 5, estimator=estimator, init_std=0.4)
        assert (float(layer(x).detach().std(0).max()) < 1e-6) is correlated


@pytest.mark.parametrize("bias", [True, False])
def test_local_is_its_formula(bias: bool) -> None:
    """The fused op against mean, variance and noise in plain torch, at the seed that the layer draws."""
    layer = BayesLinear(6, 5, bias=bias, estimator="local", init_std=0.4)
    torch.manual_seed(3)
    y = layer(X)
    torch.manual_seed(3)
    seed = draw_seed(X.device)
    squares = layer.weight_std() ** 2, None if layer.bias_rho is None else F.softplus(layer.bias_rho) ** 2
    expected = perturb(F.linear(X, layer.weight_mu, layer.bias_mu), F.linear(X * X, *squares), seed)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    parameters, cotangent = list(layer.parameters()), torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    gradients = [torch.autograd.grad((each * cotangent).sum(), parameters) for each in (y, expected)]
    assert_all_close(list(gradients[0]), list(gradients[1]))


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
def test_gradients_of_every_estimator_in_float64(estimator: str) -> None:
    """Against finite differences, at the seed that each evaluation draws again."""
    layer = BayesLinear(3, 2, estimator=estimator, init_std=0.5, dtype=torch.float64)
    conv = BayesConv1d(2, 2, 2, estimator=estimator, init_std=0.5, dtype=torch.float64)
    for module, x in ((layer, torch.randn(4, 3)), (conv, torch.randn(2, 2, 4))):
        names = [name for name, _ in module.named_parameters()]

        def function(x: Tensor, *values: Tensor, module: Any = module, names: Any = names) -> tuple[Tensor, Tensor]:
            torch.manual_seed(1)
            with torch.nn.utils.parametrize.cached():
                y = torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))
            kl = sum(
                ops.kl(values[names.index(f"{n}_mu")], values[names.index(f"{n}_rho")]) for n in ("weight", "bias")
            )
            return y, kl  # type: ignore[return-value]

        values = [p.detach().clone().requires_grad_() for p in module.parameters()]
        assert torch.autograd.gradcheck(function, (x.double().requires_grad_(), *values))


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
@pytest.mark.parametrize("kind, plain, shape", CONVOLUTIONS)
def test_convolutions_have_the_right_moments(kind: Any, plain: Any, shape: tuple[int, ...], estimator: str) -> None:
    options: dict[str, Any] = {"stride": 2, "padding": 1, "dilation": 1, "groups": 2}
    layer = kind(4, 6, 3, **options, estimator=estimator, init_std=0.3)
    x = torch.randn(shape)
    conv = getattr(F, f"conv{len(shape) - 2}d")
    n = 1500
    with torch.no_grad():
        y = torch.stack([layer(x) for _ in range(n)]).double()
        mean = conv(x, layer.weight_mu, layer.bias_mu, *options.values()).double()
        squares = layer.weight_std() ** 2, torch.full((6,), 0.09)
        variance = conv(x**2, *squares, *options.values()).double()
    assert y.shape[1:] == mean.shape
    assert float(((y.mean(0) - mean) / (variance / n).sqrt()).abs().max()) < 5.5
    assert float((y.var(0) / variance - 1).abs().max()) < 6 * math.sqrt(2 / n)


@pytest.mark.parametrize("kind, plain, shape", CONVOLUTIONS)
@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "replicate"])
def test_mean_of_a_convolution_is_torchs(kind: Any, plain: Any, shape: tuple[int, ...], padding_mode: str) -> None:
    layer = kind(4, 6, 3, padding="same", padding_mode=padding_mode, groups=2)
    frozen = layer.mean_layer()
    assert type(frozen) is plain
    x = torch.randn(shape)
    with fw.bayes.mean_mode(layer):
        torch.testing.assert_close(layer(x), frozen(x))
        torch.testing.assert_close(layer(x[0]), frozen(x[0]))
    assert layer(x[0]).shape == frozen(x[0]).shape


def test_fresh_noise_in_both_modes_and_none_in_mean_mode(model: nn.Sequential) -> None:
    for training in (True, False):
        model.train(training)
        assert not torch.equal(model(X), model(X))
        with fw.bayes.mean_mode(model):
            assert torch.equal(model(X), model(X))
            with fw.bayes.mean_mode(model[0]):
                pass
            assert torch.equal(model(X), model(X))  # the inner block's end does not end the outer one
        assert not torch.equal(model(X), model(X))


def test_mean_mode_ends_on_an_error(model: nn.Sequential) -> None:
    with pytest.raises(KeyboardInterrupt), fw.bayes.mean_mode(model):
        raise KeyboardInterrupt
    assert not torch.equal(model(X), model(X))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(model: nn.Sequential, reentrant: bool) -> None:
    """The second forward, inside backward, draws the same noise again and leaves no KL behind."""
    plain = gradients(model)
    x = X.clone().requires_grad_()
    torch.manual_seed(3)
    y = checkpoint(model, x, use_reentrant=reentrant)
    (y.square().sum() + 0.1 * fw.bayes.kl(model)).backward()
    assert_all_close(plain, [p.grad for p in model.parameters() if p.grad is not None])
    again = torch.autograd.grad(fw.bayes.kl(model), list(model.parameters()))
    for layer in model:
        if isinstance(layer, BayesLinear):
            layer._last.clear()
    assert_all_close(list(again), list(torch.autograd.grad(fw.bayes.kl(model), list(model.parameters()))))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile(model: nn.Sequential, backend: str) -> None:
    """Gradients of the compiled step at the noise it drew, found by the seed in the output; no recompilation."""
    torch.compiler.reset()
    torch.compiler.config.recompile_limit = 8
    model = model.double()
    x = X.double()
    parameters = list(model.parameters())

    def step(x: Tensor, seeds: Tensor) -> Tensor:
        first, _ = ops.linear(x, *parameters[:4], seeds[0])
        y, kl = ops.linear(torch.tanh(first), parameters[4], parameters[5], None, None, seeds[1], None, None, 1.0)
        return y.square().sum() + kl

    seeds = torch.tensor([5, -6])
    compiled = torch.compile(step, backend=backend, fullgraph=True)
    right = torch.autograd.grad(step(x, seeds), parameters)
    ours = torch.autograd.grad(compiled(x, seeds), parameters)
    assert_all_close(list(ours), list(right), 1e-9)

    torch.compiler.reset()
    whole = torch.compile(lambda x: loss(model, x), backend=backend, fullgraph=True)
    values = [whole(x).item() for _ in range(3)]
    assert len(set(values)) == 3  # fresh noise in each call
    torch.manual_seed(3)
    for parameter, gradient in zip(parameters, torch.autograd.grad(whole(x), parameters), strict=True):
        assert gradient.shape == parameter.shape
        assert bool(torch.isfinite(gradient).all())
    if backend == "aot_eager":  # this backend draws the seeds as eager mode does
        assert_all_close(list(torch.autograd.grad(_seeded(whole, x), parameters)), gradients(model, x), 1e-9)


def _seeded(function: Any, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    result: Tensor = function(x)
    return result


def test_vmap_follows_randomness() -> None:
    layer = BayesLinear(6, 3, init_std=0.5)
    x = X[0].expand(5, 6)
    call = lambda row: layer(row)  # noqa: E731
    same = torch.vmap(call, randomness="same")(x)
    different = torch.vmap(call, randomness="different")(x)
    assert float(same.detach().std(0).max()) < 1e-6
    assert float(different.detach().std(0).min()) > 0.01
    with pytest.raises(RuntimeError, match="random"):
        torch.vmap(call)(x)


def test_functional_call_grad_and_hessian_product(model: nn.Sequential) -> None:
    model = model.double()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def function(parameters: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return torch.func.functional_call(model, parameters, (X.double(),)).square().sum()

    torch.manual_seed(3)
    right = torch.autograd.grad(model(X.double()).square().sum(), list(model.parameters()))
    ours = torch.func.grad(function)(parameters)
    assert_all_close(list(ours.values()), list(right), 1e-9)
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    _, product = torch.func.jvp(torch.func.grad(function), (parameters,), (direction,))
    step = 1e-5
    ahead, behind = (
        torch.func.grad(function)({n: p + s * step * direction[n] for n, p in parameters.items()}) for s in (1, -1)
    )
    for name in parameters:
        torch.testing.assert_close(product[name], (ahead[name] - behind[name]) / (2 * step), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
def test_second_derivatives_in_every_order_of_modes(estimator: str) -> None:
    """Along a line through the parameters; forward over forward, for which torch would return less, is refused."""
    layer = BayesLinear(6, 3, estimator=estimator, init_std=0.5, dtype=torch.float64)
    start = {name: p.detach() for name, p in layer.named_parameters()}
    direction = {name: torch.randn_like(p) for name, p in start.items()}

    def along(t: Tensor) -> Tensor:
        torch.manual_seed(3)
        moved = {name: p + t * direction[name] for name, p in start.items()}
        return torch.func.functional_call(layer, moved, (X.double(),)).square().sum()

    def forward(t: Tensor) -> Tensor:
        result: Tensor = torch.func.jvp(along, (t,), (torch.ones_like(t),))[1]
        return result

    zero, step = torch.zeros((), dtype=torch.float64), 1e-4
    right = (torch.func.grad(along)(zero + step) - torch.func.grad(along)(zero - step)) / (2 * step)
    torch.testing.assert_close(torch.func.grad(forward)(zero), right, rtol=1e-6, atol=0)
    over_reverse = torch.func.jvp(torch.func.grad(along), (zero,), (zero + 1,))[1]
    torch.testing.assert_close(over_reverse, right, rtol=1e-6, atol=0)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative of a forward-mode derivative"):
        torch.func.jvp(forward, (zero,), (zero + 1,))


def test_autocast(model: nn.Sequential) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(3)
        y = model(X)
        kl = fw.bayes.kl(model)
    assert y.dtype == torch.bfloat16
    assert kl.dtype == torch.float32
    (y.float().square().sum() + 0.1 * kl).backward()
    for parameter, right in zip(model.parameters(), gradients(model), strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert float((parameter.grad - right).norm() / right.norm()) < 0.05
    for estimator in ("flipout", "local"):
        layer = BayesLinear(6, 3, estimator=estimator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(X).sum().backward()


def test_copies_pickles_and_state(model: nn.Sequential) -> None:
    right = gradients(model)
    model(X)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_all_close(gradients(other), right, 0)
    fresh = nn.Sequential(BayesLinear(6, 8), nn.Tanh(), BayesLinear(8, 3, bias=False))
    fresh.load_state_dict(model.state_dict())
    assert_all_close(gradients(fresh), right, 0)


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
def test_replicas_of_data_parallel(estimator: str) -> None:
    """What nn.DataParallel does to a module: parameters become plain attributes."""
    layer = BayesLinear(6, 3, estimator=estimator)
    layer(X)
    kept = fw.bayes.kl(layer)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone().requires_grad_() * 1)
    torch.manual_seed(3)
    right = layer(X)
    torch.manual_seed(3)
    torch.testing.assert_close(replica(X), right)
    torch.testing.assert_close(fw.bayes.kl(replica), kept)
    with torch.no_grad():
        replica.weight_mu += 1
    assert float(fw.bayes.kl(replica).detach()) > float(kept.detach())


class Twice(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


def test_a_parametrised_mean() -> None:
    layer = BayesLinear(6, 3, bias=False)
    right = copy.deepcopy(layer)
    nn.utils.parametrize.register_parametrization(layer, "weight_mu", Twice())
    with torch.no_grad():
        layer.parametrizations.weight_mu.original.copy_(right.weight_mu / 2)
    torch.manual_seed(3)
    y = layer(X)
    torch.manual_seed(3)
    torch.testing.assert_close(y, right(X))
    torch.testing.assert_close(fw.bayes.kl(layer), fw.bayes.kl(right))
    with torch.no_grad():
        layer.parametrizations.weight_mu.original.add_(1)
        right.weight_mu.add_(2)
    torch.testing.assert_close(fw.bayes.kl(layer), fw.bayes.kl(right))  # not that of the forward
    torch.testing.assert_close(fw.bayes.kl(nn.Sequential(layer, right)), 2 * fw.bayes.kl(right))


def test_shared_layer_gradient() -> None:
    """One layer used twice draws twice; the gradient is the sum, and the KL's counts once."""
    layer = BayesLinear(6, 6, init_std=0.3, dtype=torch.float64)
    twin = copy.deepcopy(layer)
    x = X.double()
    torch.manual_seed(3)
    shared = torch.autograd.grad(layer(torch.tanh(layer(x))).sum() + fw.bayes.kl(layer), list(layer.parameters()))
    torch.manual_seed(3)
    loss = layer(torch.tanh(twin(x))).sum()
    first = torch.autograd.grad(loss, list(twin.parameters()), retain_graph=True)
    second = torch.autograd.grad(loss + fw.bayes.kl(layer), list(layer.parameters()))
    assert_all_close(list(shared), [a + b for a, b in zip(first, second, strict=True)], 1e-10)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.RMSprop])
def test_optimizers(model: nn.Sequential, optimizer: Any) -> None:
    steps = optimizer(model.parameters(), lr=1e-3)
    before = [p.detach().clone() for p in model.parameters()]
    for _ in range(3):
        steps.zero_grad()
        loss(model).backward()
        steps.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_frozen_parameters_get_no_gradient() -> None:
    layer = BayesLinear(6, 3)
    layer.weight_rho.requires_grad_(False)
    (layer(X).sum() + fw.bayes.kl(layer)).backward()
    assert layer.weight_rho.grad is None
    assert layer.weight_mu.grad is not None
    layer.weight_rho.requires_grad_(True)
    torch.autograd.grad(fw.bayes.kl(layer), layer.weight_rho)  # what the last forward fused no longer holds


def test_input_shapes_and_strides() -> None:
    layer = BayesLinear(6, 3)
    for shape in ((6,), (2, 6), (2, 3, 6), (0, 6)):
        assert layer(torch.randn(shape)).shape == (*shape[:-1], 3)
    torch.manual_seed(1)
    plain = layer(X)
    torch.manual_seed(1)
    torch.testing.assert_close(layer(X.T.contiguous().T), plain)


def test_repr_names_sizes_prior_and_estimator() -> None:
    text = repr(BayesLinear(3, 2, prior=GaussianPrior(0.5), estimator="flipout"))
    assert "in_features=3, out_features=2, bias=True" in text
    assert "GaussianPrior(std=0.5" in text
    assert "'flipout'" in text
    assert "kernel_size=(3, 3)" in repr(BayesConv2d(2, 4, 3, prior=MopedPrior()))


def test_ntk_and_paths_are_those_of_the_mean_network() -> None:
    model = nn.Sequential(BayesLinear(6, 8), nn.ReLU(), BayesLinear(8, 1))
    plain = fw.bayes.freeze_(copy.deepcopy(model))
    with pytest.raises(ValueError, match="random"):
        fw.ntk.empirical_ntk(model, X)
    with pytest.raises(ValueError, match="mean_mode"):
        fw.pathsgd.path_norm(model, input_shape=(6,))
    with fw.bayes.mean_mode(model):
        ours = fw.ntk.empirical_ntk(model, X), fw.pathsgd.path_norm(model, input_shape=(6,))
    torch.testing.assert_close(ours[0], fw.ntk.empirical_ntk(plain, X))
    torch.testing.assert_close(ours[1], fw.pathsgd.path_norm(plain, input_shape=(6,)))


def test_bad_input() -> None:
    cases: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"in_features": 0}, ValueError, "in_features must be at least 1"),
        ({"in_features": 2.0}, TypeError, "in_features must be an int"),
        ({"estimator": "laplace"}, ValueError, "estimator must be one of 'weight', 'flipout', 'local', got 'laplace'"),
        ({"prior": 1.0}, TypeError, "prior must be a GaussianPrior"),
        ({"prior": GaussianPrior}, TypeError, "prior must be a GaussianPrior"),
        ({"init_std": 0.0}, ValueError, "init_std must be positive"),
        ({"init_std": float("nan")}, ValueError, "init_std must be positive"),
        ({"init_std": "a"}, TypeError, "init_std must be a number, got str"),
        ({"dtype": torch.float16}, TypeError, "dtype must be float32 or float64"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            BayesLinear(**{"in_features": 2, "out_features": 2, **options})
    for make in (lambda: GaussianPrior(0.0), lambda: GaussianPrior(-1.0), lambda: MopedPrior(std=float("inf"))):
        with pytest.raises(ValueError, match="std must be positive"):
            make()
    with pytest.raises(ValueError, match="delta must be positive"):
        MopedPrior(delta=0.0)
    with pytest.raises(ValueError, match="pi must lie in"):
        fw.bayes.ScaleMixturePrior(pi=1.0)
    for name, prior in (("mean", GaussianPrior), ("pi", fw.bayes.ScaleMixturePrior), ("std", MopedPrior)):
        with pytest.raises(TypeError, match=f"{name} must be a number, got str"):
            prior(**{name: "a"})
    geometry: list[tuple[dict[str, Any], type[Exception], str]] = [
        ({"kernel_size": 0}, ValueError, "kernel_size must be at least 1, got 0"),
        ({"kernel_size": (3, 3, 3)}, ValueError, "kernel_size must be an int or have 2 entries"),
        ({"stride": 0}, ValueError, "stride must be at least 1, got 0"),
        ({"padding": -1}, ValueError, "padding must be at least 0, got -1"),
        ({"dilation": 1.5}, TypeError, "dilation must be an int, got float"),
    ]
    for options, error, message in geometry:
        with pytest.raises(error, match=message):
            BayesConv2d(**{"in_channels": 2, "out_channels": 3, "kernel_size": 3, **options})
    layer = BayesLinear(3, 2)
    with pytest.raises(ValueError, match=r"x must have shape \[..., 3\]"):
        layer(torch.ones(2, 4))
    with pytest.raises(TypeError, match=r"x must be a torch\.Tensor"):
        layer([1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="x has dtype"):
        layer(torch.ones(2, 3).double())
    with pytest.raises(ValueError, match=r"x must have shape \[batch, 2, H, W\]"):
        BayesConv2d(2, 3, 3)(torch.ones(1, 3, 5, 5))


@pytest.mark.parametrize("make", [lambda **k: BayesLinear(6, 4, **k), lambda **k: fw.bayes.BayesConv1d(6, 4, 1, **k)])
@pytest.mark.parametrize("size", [1e-4, 300.0])
def test_local_under_float16_autocast(make: Any, size: float) -> None:
    """Variances under 6e-8 or over 65504 are beyond float16."""
    layer = make(estimator="local", init_std=1e-2, bias=False)
    with torch.no_grad():
        layer.weight_mu.zero_()
    x = size * torch.ones(4000, 6) if isinstance(layer, BayesLinear) else size * torch.ones(4000, 6, 1)
    with torch.autocast("cpu", dtype=torch.float16):
        y = layer(x)
    y.square().sum().backward()
    assert float(y.std()) == pytest.approx(size * 1e-2 * 6**0.5, rel=0.05)
    assert bool(torch.isfinite(layer.weight_rho.grad).all())


def test_local_shows_a_nan_variance() -> None:
    seed = torch.tensor(1)
    y = perturb(torch.zeros(2), torch.tensor([float("nan"), 0.0]), seed)
    assert bool(y[0].isnan())
    assert float(y[1]) == 0.0


@pytest.mark.parametrize("estimator", ["weight", "flipout", "local"])
def test_compile_with_dynamic_shapes(estimator: str) -> None:
    torch.compiler.reset()
    conv = fw.bayes.BayesConv1d(2, 3, 3, estimator=estimator)
    model = nn.Sequential(conv, nn.Flatten(), BayesLinear(18, 2, estimator=estimator))
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (4, 7):
        assert compiled(torch.randn(batch, 2, 8)).shape == (batch, 2)


def test_layers_made_on_the_meta_device() -> None:
    with torch.device("meta"):
        layers = [BayesLinear(3, 2), fw.bayes.BayesConv2d(3, 2, 3)]
    assert all(p.is_meta for layer in layers for p in layer.parameters())


def test_dtypes_and_estimators_that_do_not_fit_are_named() -> None:
    layer = BayesLinear(3, 2, estimator="flipout")
    with pytest.raises(ValueError, match="estimator must be one of 'weight', 'flipout', 'local', got 'foo'"):
        layer.estimator = "foo"
    x = torch.ones(2, 3, dtype=torch.float64)
    for call in (lambda: layer(x), lambda: fw.bayes.BayesConv1d(3, 2, 2)(torch.ones(2, 3, 4, dtype=torch.float64))):
        with pytest.raises(TypeError, match=r"x has dtype torch\.float64, but weight_mu has torch\.float32"):
            call()
    with pytest.raises(TypeError, match="weight_mu must be float32 or float64"):
        BayesLinear(3, 2).to(torch.bfloat16)(torch.ones(2, 3, dtype=torch.bfloat16))
