"""Models that do unusual things: the exact kernel or a clear error, never a wrong number, and the model as it was."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import finite_width as fw


class Model(nn.Module):
    """forward(*inputs) is function(self, *inputs)."""

    def __init__(self, function: Callable[..., Tensor], **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def data(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, dtype=torch.float64)


def jacobian(model: nn.Module, *inputs: Tensor) -> Tensor:
    """[N, O, P] row by row, of a model with several inputs."""
    parameters = [value for value in model.parameters() if value.requires_grad]
    rows = []
    for row in range(len(inputs[0])):
        result = model(*(value[row : row + 1].clone() for value in inputs)).flatten()
        gradients = [torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True) for value in result]
        rows.append(
            torch.stack(
                [
                    torch.cat(
                        [
                            (torch.zeros_like(p) if g is None else g.to_dense()).flatten()
                            for p, g in zip(parameters, own, strict=True)
                        ]
                    )
                    for own in gradients
                ]
            )
        )
    return torch.stack(rows)


def assert_exact(model: nn.Module, *inputs: Tensor, **options: Any) -> None:
    """Of the whole batch, for every method, the operator and its diagonal."""
    columns = jacobian(model, *inputs)
    expected = torch.einsum("nap,mbp->nmab", columns, columns)
    x = inputs[0] if len(inputs) == 1 else inputs
    for method in ("auto", "jacobian", "products"):
        kernel = fw.ntk.empirical_ntk(model, x, method=method, **options)
        torch.testing.assert_close(kernel, expected, rtol=1e-11, atol=1e-11)
    operator = fw.ntk.NTKOperator(model, x)
    matrix = expected.permute(0, 2, 1, 3).reshape(operator.shape)
    vector = data(operator.shape[1])
    torch.testing.assert_close(operator @ vector, matrix @ vector, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(operator.diagonal(), matrix.diagonal(), rtol=1e-11, atol=1e-11)


# --- models that differentiate in their forward --------------------------------------------------------------------


def force(self: Any, x: Tensor) -> Tensor:
    """-dE/dx of an energy, as force fields and physics-informed networks give it."""
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]


def force_and_energy(self: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x if x.requires_grad else x.detach().requires_grad_()
        energy = self.energy(x)
        return energy + torch.autograd.grad(energy.sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("function", [force, force_and_energy])
def test_a_forward_that_differentiates(function: Callable[..., Tensor]) -> None:
    model = Model(function, energy=nn.Sequential(linear(4, 8), nn.Tanh(), linear(8, 1)))
    assert_exact(model, data(6, 4))
    with pytest.raises(ValueError, match="structured"):
        fw.ntk.empirical_ntk(model, data(6, 4), method="structured")


def test_a_forward_that_differentiates_without_asking_for_gradients() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        x = x if x.requires_grad else x.detach().requires_grad_()
        return torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)[0]

    assert_exact(Model(function, energy=nn.Sequential(linear(4, 8), nn.Tanh(), linear(8, 1))), data(6, 4))


def test_a_forward_that_calls_backward() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        torch.autograd.backward(self.energy(x).sum(), inputs=[x], create_graph=True)
        assert x.grad is not None
        return x.grad

    model = Model(function, energy=nn.Sequential(linear(4, 8), nn.Tanh(), linear(8, 1)))
    x = data(6, 4)
    with warnings.catch_warnings():  # torch warns of cycles through .grad
        warnings.simplefilter("ignore")
        kernel, columns = fw.ntk.empirical_ntk(model, x), jacobian(model, x)
    torch.testing.assert_close(kernel, torch.einsum("nap,mbp->nmab", columns, columns), rtol=1e-11, atol=1e-11)


# --- one module under two names ------------------------------------------------------------------------------------


def test_one_module_under_two_names() -> None:
    layer = linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    assert_exact(model, data(6, 4))
    assert isinstance(model[0].weight, nn.Parameter)
    values = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    x = data(6, 4)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, params=values), fw.ntk.empirical_ntk(model, x))
    assert model[0].weight is layer.weight
    assert isinstance(layer.weight, nn.Parameter)
    straight = fw.ntk.linearize(model)
    torch.testing.assert_close(straight(x), model(x))
    assert isinstance(straight.origin[0].weight, nn.Parameter)


def test_params_by_both_names_of_a_shared_weight() -> None:
    model = nn.Sequential(linear(4, 4), nn.Tanh(), linear(4, 4))
    model[2].weight = model[0].weight
    x = data(6, 4)
    both = dict(model.named_parameters(remove_duplicate=False))
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, params=both), fw.ntk.empirical_ntk(model, x))
    both["2.weight"] = both["2.weight"].detach().clone().requires_grad_()
    with pytest.raises(ValueError, match=r"params\['2.weight'\] and params\['0.weight'\] are one parameter"):
        fw.ntk.empirical_ntk(model, x, params=both)


# --- values that decide where rows go ------------------------------------------------------------------------------


def lengths(*each: int) -> Tensor:
    return torch.arange(4)[None] < torch.tensor(each)[:, None]


@pytest.mark.parametrize(
    "mask", [lengths(3, 1, 2, 2), lengths(4, 4, 4, 4, 2, 2, 3, 1), lengths(4, 4, 4, 4, 2, 2, 3, 2)]
)
def test_tokens_packed_without_padding(mask: Tensor) -> None:
    def function(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        hidden = x.new_zeros(*x.shape[:2], 5)
        hidden[mask] = torch.tanh(self.tokens(x[mask]))
        return self.out(hidden.sum(1))

    assert_exact(Model(function, tokens=linear(3, 5), out=linear(5, 2)), data(len(mask), 4, 3), mask)


def test_equal_counts_of_tokens_at_other_places() -> None:
    """The rows that are probed have four tokens each, the others four on average."""

    def function(self: Any, x: Tensor, mask: Tensor) -> Tensor:
        hidden = x.new_zeros(*x.shape[:2], 5)
        hidden[mask] = torch.tanh(self.tokens(x[mask]))
        return self.out(hidden.sum(1))

    mask = torch.arange(8)[None] < torch.tensor([4, 4, 4, 4, 1, 7, 3, 5])[:, None]
    assert_exact(Model(function, tokens=linear(3, 5), out=linear(5, 2)), data(8, 8, 3), mask)


def test_rows_sorted_inside() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        return self.out(torch.tanh(self.first(x[order]))[order.argsort()])

    x = data(8, 4)
    x[:, 0] = torch.tensor([2.0, 1, 4, 3, 0, 7, 6, 5])
    assert_exact(Model(function, first=linear(4, 5), out=linear(5, 2)), x)
    x[:, 0] = torch.tensor([0.0, 1, 2, 3, 7, 6, 5, 4])  # sorted where it is probed
    assert_exact(Model(function, first=linear(4, 5), out=linear(5, 2)), x)


def test_tokens_routed_to_experts() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, 3)
        chosen = tokens[:, 0] > 0
        out = tokens.new_zeros(len(tokens), 4)
        out[chosen] = self.one(tokens[chosen])
        out[~chosen] = self.other(tokens[~chosen])
        return self.out(torch.tanh(out.reshape(len(x), -1, 4)).sum(1))

    model = Model(function, one=linear(3, 4), other=linear(3, 4), out=linear(4, 2))
    for _ in range(10):
        assert_exact(model, data(8, 2, 3))


def test_structure_is_kept_where_an_index_is_the_same_for_all_rows() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.first(x))[:, torch.tensor([3, 1, 4, 0, 2])])

    model = Model(function, first=linear(4, 5), out=linear(5, 2))
    assert {row.method for row in fw.ntk.explain(model, data(8, 4)).rows} == {"gram", "last"}
    assert_exact(model, data(8, 4))


# --- rows that lie otherwise than the rows that are probed ---------------------------------------------------------


class Views(nn.Module):
    """Two views of each token, merged with the rows between them; the class token alone reaches the output."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.out = linear(3, 8), linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        rows, tokens, _ = x.shape
        both = torch.stack([x, x.flip(2)]).reshape(2 * rows * tokens, 3)
        hidden = torch.tanh(self.first(both)).reshape(2, rows, tokens, 8)
        return self.out(hidden[:, :, 0].mean(0))


@pytest.mark.parametrize("tokens", [5, 9, 17])
def test_rows_merged_between_other_axes(tokens: int) -> None:
    for rows in (4, 6, 9):
        assert_exact(Views(), data(rows, tokens, 3))


def test_an_order_that_depends_on_the_number_of_rows() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        rows = len(x)
        if rows % 4:
            return self.out(torch.tanh(self.first(x)))
        hidden = torch.tanh(self.first(x.view(4, -1, 5).transpose(0, 1).reshape(rows, 5)))
        return self.out(hidden.view(-1, 4, 8).transpose(0, 1).reshape(rows, 8))

    assert_exact(Model(function, first=linear(5, 8), out=linear(8, 2)), data(8, 5))


class Windows(nn.Module):
    """Attention within windows, which torch turns to time first: rows and windows share the second axis."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)
        self.out = linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        windows = x.unflatten(1, (3, 5)).flatten(0, 1)
        mixed = self.attention(windows, windows, windows, need_weights=False)[0]
        return self.out(mixed.reshape(len(x), 15, 4).mean(1))


def test_rows_merged_on_the_second_axis() -> None:
    methods = {row.method for row in fw.ntk.explain(Windows(), data(8, 15, 4)).rows}
    assert not methods & {"vmap", "loop"}
    assert_exact(Windows(), data(8, 15, 4))


@pytest.mark.parametrize("rows", [3, 4, 8])
def test_zeros_where_two_layouts_fit(rows: int) -> None:
    """Nothing is reached behind a zero-initialised head, and there are as many tokens as rows are probed."""
    head = linear(8 * 4, 2)
    nn.init.zeros_(head.weight)
    model = nn.Sequential(nn.Embedding(50, 8, dtype=torch.float64), nn.Flatten(), head)
    assert_exact(model, torch.randint(50, (rows, 4)))


def test_position_embeddings_are_shared_by_all_rows() -> None:
    def function(self: Any, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        return self.out(torch.tanh(hidden).mean(1))

    parts = {"tokens": nn.Embedding(50, 8), "positions": nn.Embedding(16, 8)}
    model = Model(function, **{name: part.double() for name, part in parts.items()}, out=linear(8, 2))
    for length in (5, 4):
        assert_exact(model, torch.randint(50, (6, length)))


# --- rows that mix -------------------------------------------------------------------------------------------------


class BatchSecond(nn.Module):
    def __init__(self, kind: type[nn.Module]) -> None:
        super().__init__()
        self.recurrent, self.out = kind(4, 3, dtype=torch.float64), linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.recurrent(x)[0][:, -1])


MIXING = {
    "LSTM without batch_first": (BatchSecond(nn.LSTM), (5, 4)),
    "GRU without batch_first": (BatchSecond(nn.GRU), (5, 4)),
    "cumsum": (Model(lambda self, x: self.layer(x).cumsum(0), layer=linear(4, 2)), (4,)),
    "cumsum before": (Model(lambda self, x: self.layer(x.cumsum(0)), layer=linear(4, 2)), (4,)),
    "a little of the mean": (Model(lambda self, x: self.layer(x - 1e-9 * x.mean(0)), layer=linear(4, 2)), (4,)),
    "scaled by the largest": (
        Model(lambda self, x: self.layer(x) / self.layer(x).detach().abs().max(), layer=linear(4, 2)),
        (4,),
    ),
}


@pytest.mark.parametrize("rows", [2, 4, 6, 20])
@pytest.mark.parametrize("name", MIXING)
def test_mixing_rows_is_found(name: str, rows: int) -> None:
    model, shape = MIXING[name]
    with pytest.raises(ValueError, match="rows"):
        fw.ntk.empirical_ntk(model, data(rows, *shape))


@pytest.mark.parametrize("rows", [2, 6])
def test_mixing_behind_a_frozen_embedding_is_found(rows: int) -> None:
    tokens = nn.Embedding(9, 4).requires_grad_(False)
    model = Model(lambda self, x: self.layer(self.tokens(x).cumsum(0)), tokens=tokens, layer=nn.Linear(4, 2))
    with pytest.raises(ValueError, match="rows"):
        fw.ntk.empirical_ntk(model, torch.randint(9, (rows,)))


@pytest.mark.parametrize("rows", [2, 6])
def test_mixing_before_a_head_of_zeros_is_found(rows: int) -> None:
    head = linear(5, 2)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    model = Model(lambda self, x: self.head(torch.tanh(self.first(x - x.mean(0)))), first=linear(4, 5), head=head)
    with pytest.raises(ValueError, match="rows"):
        fw.ntk.empirical_ntk(model, data(rows, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows", [3, 8])
def test_a_difference_of_equal_networks_does_not_mix(rows: int, dtype: torch.dtype) -> None:
    """f(x; θ) - f(x; θ₀) is rounding noise at θ = θ₀; its kernel is that of f."""
    net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 1)).to(dtype)
    frozen = copy.deepcopy(net).requires_grad_(False)
    model = Model(lambda self, x: self.net(x) - self.frozen(x), net=net, frozen=frozen)
    x = torch.randn(rows, 3, 8, 8, dtype=dtype)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x), fw.ntk.empirical_ntk(net, x))


# --- operations that autograd or vmap get wrong or refuse ----------------------------------------------------------


def test_a_wrong_batching_rule_of_torch() -> None:
    """The derivative of torch.cdist under vmap is not that of torch.cdist."""
    centres = data(3, 3)
    assert_exact(Model(lambda self, x: torch.cdist(self.layer(x), centres), layer=linear(4, 3)), data(6, 4))
    assert_exact(Model(lambda self, x: torch.cdist(x, self.centres), centres=nn.Parameter(data(3, 4))), data(6, 4))


def test_a_bias_used_elsewhere_too() -> None:
    assert_exact(Model(lambda self, x: self.layer(x) * self.layer.bias, layer=linear(4, 3)), data(6, 4))


def test_a_parameter_in_a_dispatched_function() -> None:
    model = Model(lambda self, x: x @ F.max_pool1d(self.values, 2).squeeze(0).t(), values=nn.Parameter(data(1, 3, 8)))
    assert_exact(model, data(6, 4))


@pytest.mark.parametrize(("layer", "values"), [(nn.Embedding, 15), (nn.EmbeddingBag, 3)])
def test_sparse_gradients(layer: type[nn.Module], values: int) -> None:
    tokens, out = layer(7, 3, sparse=True, dtype=torch.float64), linear(values, 2)
    model = Model(lambda self, x: self.out(self.tokens(x).reshape(len(x), -1)), tokens=tokens, out=out)
    assert_exact(model, torch.randint(7, (6, 5)))


def test_a_layer_without_width() -> None:
    kernel = fw.ntk.empirical_ntk(nn.Sequential(linear(3, 0), linear(0, 2)), data(4, 3))
    torch.testing.assert_close(kernel, torch.eye(2, dtype=torch.float64).expand(4, 4, 2, 2))


def test_a_model_that_squeezes() -> None:
    """The last block of 513 rows has one row."""
    model = nn.Sequential(linear(3, 1), nn.Flatten(0))
    squeezing = Model(lambda self, x: self.layer(x).squeeze(), layer=model[0])
    x = data(513, 3)
    torch.testing.assert_close(fw.ntk.empirical_ntk(squeezing, x), fw.ntk.empirical_ntk(model, x))
    assert_exact(squeezing, data(5, 3))


def test_a_branch_that_the_probe_does_not_see() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y + torch.where(x[:, :1] > 2, self.extra(x), 0.0) if (x[:, 0] > 2).any() else y

    x = data(8, 4).clamp(-1, 1)
    x[6, 0] = 5
    assert_exact(Model(function, layer=linear(4, 1), extra=linear(4, 1)), x)


# --- the model comes back as it was --------------------------------------------------------------------------------


def test_attributes_that_hooks_set() -> None:
    model = nn.Sequential(prune.l1_unstructured(linear(4, 5), "weight", 2), nn.Tanh(), linear(5, 2)).eval()
    weight = model[0].weight
    x = data(6, 4)
    fw.ntk.empirical_ntk(model, x)
    fw.ntk.NTKOperator(model, x) @ data(12)
    assert model[0].weight is weight
    torch.save(model, io.BytesIO())
    with torch.no_grad():
        model(x)
    copy.deepcopy(model)


class Remembers(nn.Module):
    """Writes buffers and attributes in every forward, in ways without a new version of the tensor too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = linear(4, 2), 0
        self.register_buffer("cache", None)
        self.register_buffer("mean", torch.zeros(4, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = x
        self.cache = x.detach().clone()
        self.mean.data.mul_(0.5).add_(1)
        return self.layer(x)


def test_buffers_and_attributes() -> None:
    model = Remembers()
    fw.ntk.empirical_ntk(model, data(6, 4))
    assert model.calls == 0
    assert not hasattr(model, "last")
    assert model.cache is None
    assert not model.mean.any()


def test_lists_that_a_forward_fills() -> None:
    def function(self: Any, x: Tensor) -> Tensor:
        self.seen.append(self.scale * x)
        return self.layer(self.seen[-1])

    model = Model(function, layer=linear(4, 2), scale=nn.Parameter(data(1)))
    model.seen = []
    fw.ntk.empirical_ntk(model, data(6, 4))
    assert model.seen == []


def test_a_sparse_buffer() -> None:
    model = Model(lambda self, x: self.layer((self.graph @ x.mT).mT), layer=linear(5, 2))
    model.register_buffer("graph", torch.eye(5, dtype=torch.float64).to_sparse())
    assert_exact(model, data(6, 5))


# --- clear errors --------------------------------------------------------------------------------------------------


def test_a_functional_embedding_with_max_norm() -> None:
    model = Model(lambda self, x: F.embedding(x, self.weight, max_norm=0.5), weight=nn.Parameter(data(7, 3)))
    before = model.weight.detach().clone()
    with pytest.raises(ValueError, match="max_norm"):
        fw.ntk.empirical_ntk(model, torch.randint(7, (6,)))
    assert torch.equal(model.weight, before)


def test_a_bag_scaled_by_frequency() -> None:
    model = nn.EmbeddingBag(7, 3, scale_grad_by_freq=True)
    with pytest.raises(ValueError, match="scale_grad_by_freq"):
        fw.ntk.empirical_ntk(model, torch.randint(7, (6, 5)))


def test_a_lazy_module() -> None:
    model = nn.Sequential(nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"'0.weight' of a lazy module"):
        fw.ntk.empirical_ntk(model, torch.randn(6, 4))
    assert isinstance(model[0], nn.LazyLinear)


def test_a_model_made_in_inference_mode() -> None:
    with torch.inference_mode():
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)).eval()
    with pytest.raises(ValueError, match=r"model: '0.weight' was made in inference mode"):
        fw.ntk.empirical_ntk(model, torch.randn(6, 4))


def test_inputs() -> None:
    model = linear(4, 2)
    with pytest.raises(TypeError, match="x1 must have strings as keys"):
        fw.ntk.empirical_ntk(model, {0: data(6, 4)})
    with pytest.raises(TypeError, match="x1 must be a dense tensor"):
        fw.ntk.empirical_ntk(model, data(6, 4).to_sparse())
    with pytest.raises(ValueError, match="x1 with shape"):
        fw.ntk.empirical_ntk(nn.Embedding(7, 3), torch.tensor([1, 7]))


def test_dicts_in_another_order() -> None:
    model = Model(lambda self, a, b: self.layer(a) * b, layer=linear(4, 2))
    model.forward = lambda a, b: model.layer(a) * b  # type: ignore[method-assign]
    a, b = data(6, 4), data(6, 2)
    one = fw.ntk.empirical_ntk(model, {"a": a, "b": b}, {"a": a[:3], "b": b[:3]})
    other = fw.ntk.empirical_ntk(model, {"a": a, "b": b}, {"b": b[:3], "a": a[:3]})
    assert torch.equal(one, other)


def _doubled(gradient: Tensor) -> Tensor:
    return gradient * 2


# What is done with a ReLU's result and the layer's that follows, and what the forward returns.
BETWEEN: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "a hook before the layer": lambda h, layer: (h.register_hook(_doubled), layer(h))[1],
    "a hook behind the layer": lambda h, layer: (layer(h), h.register_hook(_doubled))[0],
    "a hook of the node": lambda h, layer: (layer(h), h.grad_fn.register_prehook(lambda g: (g[0] * 2,)))[0],
    "a derivative": lambda h, layer: (
        (y := layer(h).tanh()) * torch.autograd.grad(y.sum(), h, create_graph=True)[0].flatten(1)[:, :1, None]
    ),
}


@pytest.mark.parametrize("between", list(BETWEEN))
@pytest.mark.parametrize("kind", ["dense", "conv", "flat"])
def test_what_a_model_does_between_a_relu_and_a_layer(between: str, kind: str) -> None:
    """A layer takes the ReLU's backward along, past the ReLU's result: not where something there looks at gradients."""
    one, two = (linear(6, 5), linear(5, 3)) if kind == "dense" else (nn.Conv1d(4, 5, 2), nn.Conv1d(5, 3, 2))
    if kind == "flat":
        two = nn.Sequential(nn.Flatten(), linear(25, 3), nn.Unflatten(1, (3, 1)))

    def forward(self: Any, x: Tensor) -> Tensor:
        return BETWEEN[between](torch.relu(self.one(x)), self.two).flatten(1)

    assert_exact(Model(forward, one=one, two=two).double(), data(5, 4, 6))


# How a ReLU's result [n, 6, 4] reaches a layer of 24 inputs, and what else happens to it.
RESHAPED: dict[str, Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor]] = {
    "flatten": lambda x, layer: layer(torch.relu(x).flatten(1)),
    "view": lambda x, layer: layer(torch.relu(x).view(len(x), -1)),
    "reshape": lambda x, layer: layer(torch.reshape(torch.relu(x), (-1, 24))),
    "twice": lambda x, layer: layer(torch.relu(x).view(-1, 3, 8).flatten(1)),
    "a type's name": lambda x, layer: layer(torch.relu(x).view(torch.float64).flatten(1)),
    "a view where its input has none": lambda x, layer: layer(torch.relu(torch.cat([x, x], 2)[..., ::2]).view(-1, 24)),
    "other strides": lambda x, layer: layer(torch.relu(x.transpose(1, 2)).reshape(-1, 24)),
    "used again": lambda x, layer: (h := torch.relu(x).flatten(1), layer(h) + h[:, :3] ** 2)[1],
    "a hook": lambda x, layer: (h := torch.relu(x).flatten(1), h.register_hook(_doubled), layer(h))[2],
    "a hook behind": lambda x, layer: (h := torch.relu(x).flatten(1), y := layer(h), h.register_hook(_doubled), y)[3],
    "a derivative": lambda x, layer: (
        h := torch.relu(x).flatten(1),
        y := layer(h).tanh(),
        y * torch.autograd.grad(y.sum(), h, create_graph=True)[0][:, :1],
    )[2],
    "the input written in place": lambda x, layer: (
        z := x * 2,
        h := torch.relu(z).flatten(1),
        z.add_(1),
        layer(h),
    )[3],
}


@pytest.mark.parametrize("way", list(RESHAPED))
def test_a_relu_in_another_shape(way: str) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        return RESHAPED[way](self.one(x), self.two)

    assert_exact(Model(forward, one=nn.Conv1d(4, 6, 3), two=linear(24, 3)).double(), data(5, 4, 6))
