"""TTLinear: against the dense layer, its start, its modes, its plans, and the ways torch handles modules."""

from __future__ import annotations

import copy
import io
import pickle
from math import prod

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from finite_width.tt import functional, planner, precision, reference
from finite_width.tt.functional import four_axis_shapes
from finite_width.tt.precision import PRECISIONS

# Cheapest as a chain of three merged cores, for a batch of one.
CHAIN = {
    "in_features": 2048,
    "out_features": 16384,
    "rank": [1, 8, 8, 4, 1],
    "in_modes": (2, 2, 2, 1, 16, 16),
    "out_modes": (16, 16, 1, 16, 4, 1),
}
SHAPES = [
    {"in_features": 24, "out_features": 18, "rank": 3, "in_modes": (2, 3, 4), "out_modes": (3, 2, 3)},
    {"in_features": 784, "out_features": 625, "rank": 8, "in_modes": (4, 7, 4, 7), "out_modes": (5, 5, 5, 5)},
    {"in_features": 97, "out_features": 101, "rank": 4},  # primes: padded
    {"in_features": 30, "out_features": 7, "rank": [5], "in_modes": (30,), "out_modes": (7,), "layout": "in_out"},
    {"in_features": 64, "out_features": 60, "rank": 4, "in_modes": (4, 4, 4), "out_modes": (6, 10), "layout": "in_out"},
    {
        "in_features": 12,
        "out_features": 10,
        "rank": 1,
        "in_modes": (12,),
        "out_modes": (10,),
    },  # one core: a dense layer
    CHAIN,
]


def forward_and_gradients(module, x, grad):
    x = x.clone().requires_grad_()
    y = module(x)
    return [y, *torch.autograd.grad(y, [x, *module.parameters()], grad)]


@pytest.mark.parametrize("options", SHAPES, ids=lambda o: f"{o['in_features']}x{o['out_features']}")
@pytest.mark.parametrize("batch", [1, 13, 200])
def test_against_the_dense_layer_in_float64(options, batch):
    """Result and all gradients, relative difference at most 1e-12."""
    layer = fw.tt.TTLinear(**options, dtype=torch.float64)
    x = torch.randn(batch, layer.in_features, dtype=torch.float64)
    grad = torch.randn(batch, layer.out_features, dtype=torch.float64)
    results = forward_and_gradients(layer, x, grad)

    def dense(x):
        return F.linear(x, layer.to_dense(), layer.bias)

    dense.parameters = layer.parameters
    for result, exact in zip(results, forward_and_gradients(dense, x, grad), strict=True):
        assert float((result - exact).detach().norm()) <= 1e-12 * float(exact.detach().norm())


@pytest.mark.parametrize("modes", [((4, 8, 8), (4, 8, 6)), ((5, 13, 7), (9, 11, 3))], ids=["even", "odd"])
@pytest.mark.parametrize("rank", [2, 16, 37, 64])
@pytest.mark.parametrize("batch", [1, 64, 700])
def test_every_plan_in_float32(rank, batch, modes):
    """All cuts, orders and dense passes give the same, within 1e-5 of float64."""
    layer = fw.tt.TTLinear(prod(modes[0]), prod(modes[1]), rank=rank, in_modes=modes[0], out_modes=modes[1])
    x, grad = torch.randn(batch, layer.in_features), torch.randn(batch, layer.out_features)
    cores = [core.detach() for core in layer.cores]
    op, backward = torch.ops.finite_width.tt_linear, torch.ops.finite_width.tt_linear_backward
    wide = [core.double() for core in cores]
    y = reference.tt_linear(x.double(), wide, None, (1, 0, 0, 0, 0, 0))
    exact = reference.tt_linear_backward(grad.double(), x.double(), wide, (1, 0, 0, 0, 0, 0), (1, 1, 1))
    for split in (1, 2):
        for left_first in (0, 1):
            for dense in range(8):
                plan = (split, left_first, dense & 1, dense >> 1 & 1, dense >> 2 & 1, 0)
                results = [op(x, cores, None, plan), *backward(grad, x, cores, plan, (1, 1, 1))]
                for result, right in zip(results, [y, *exact], strict=True):
                    assert float((result - right).norm() / right.norm()) < 1e-5, plan


@pytest.mark.parametrize("left_first", [0, 1])
@pytest.mark.parametrize("batch", [1, 9])
def test_a_row_larger_than_the_tiles(batch, left_first):
    """4096 → 4096 at rank 64: the intermediate of one row fills eight tiles; few rows go another way than many."""
    cores = [torch.randn(1, 64, 64, 64) / 8, torch.randn(64, 64, 64, 1) / 8]
    x, grad, plan = torch.randn(batch, 4096), torch.randn(batch, 4096), (1, left_first, 0, 0, 0, 0)
    op, backward = torch.ops.finite_width.tt_linear, torch.ops.finite_width.tt_linear_backward
    wide = [core.double() for core in cores]
    exact = [reference.tt_linear(x.double(), wide, None, plan)]
    exact += reference.tt_linear_backward(grad.double(), x.double(), wide, plan, (1, 1, 1))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append([op(x, cores, None, plan), *backward(grad, x, cores, plan, (1, 1, 1))])
    finally:
        torch.set_num_threads(threads)
    for one, two, right in zip(*results, exact, strict=True):
        assert float((two - right).norm() / right.norm()) < 1e-5
        assert torch.equal(one, two) or not fw.has_kernels()


def test_leading_dimensions_and_no_bias():
    layer = fw.tt.TTLinear(12, 10, bias=False)
    x = torch.randn(2, 3, 12)
    torch.testing.assert_close(layer(x), F.linear(x, layer.to_dense()))
    torch.testing.assert_close(layer(x[0, 0]), F.linear(x[0, 0], layer.to_dense()))
    assert layer(x[:0]).shape == (0, 3, 10)


@pytest.mark.parametrize(
    "options",
    [
        {"in_features": 1024, "out_features": 1024, "rank": 8},
        {"in_features": 4**6, "out_features": 4**6, "in_modes": (4,) * 6, "out_modes": (4,) * 6, "rank": 16},
        {"in_features": 2**10, "out_features": 2**10, "in_modes": (2,) * 10, "out_modes": (2,) * 10, "rank": 2},
        {"in_features": 784, "out_features": 10, "rank": 5, "layout": "in_out"},
        {"in_features": 997, "out_features": 1009, "rank": 4},
    ],
)
def test_start_has_the_variance_asked_for(options):
    """The mean square of W is nn.Linear's 1 / (3 N), or the one given, also through many cores."""
    layer = fw.tt.TTLinear(**options)
    for variance in (None, 0.25):
        layer.reset_parameters(variance)
        in_cores = len(layer.in_modes) if layer.layout == "in_out" else 0
        whole = reference.merge(reference.as_matrix([c.detach().double() for c in layer.cores], in_cores))
        wanted = variance or 1 / (3 * layer.in_features)
        assert float(whole.square().mean()) == pytest.approx(wanted, rel=1e-4)
        assert float(layer.bias.abs().max()) <= layer.in_features**-0.5


def test_padding_is_said():
    layer = fw.tt.TTLinear(97, 101, rank=4)
    assert layer.padded_in > 97
    assert f"x padded with zeros to {layer.padded_in}" in repr(layer)
    assert f"rows beyond 101 of {layer.padded_out} dropped" in repr(layer)
    assert "padded" not in repr(fw.tt.TTLinear(64, 64))


def test_from_linear():
    linear = nn.Linear(60, 48).eval()
    exact = fw.tt.TTLinear.from_linear(linear, eps=1e-7)
    torch.testing.assert_close(exact.to_dense(), linear.weight, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(exact.bias, linear.bias, atol=0, rtol=0)
    assert not exact.training
    half = fw.tt.TTLinear.from_linear(linear, eps=0.5)
    assert float((half.to_dense() - linear.weight).norm() / linear.weight.norm()) <= 0.5
    small = fw.tt.TTLinear.from_linear(linear, target_params=700, in_modes=(6, 10), out_modes=(6, 8))
    count = sum(p.numel() for p in small.parameters())
    step = 6 * 6 + 10 * 8  # parameters of one more rank
    assert 700 - step < count <= 700
    assert small.compression_ratio == pytest.approx((60 * 48 + 48) / count)
    prime = fw.tt.TTLinear.from_linear(nn.Linear(97, 101), max_rank=3)
    assert prime(torch.randn(2, 97)).shape == (2, 101)


def test_planner_finds_the_known_orders():
    """Halves beat the dense W up to r* = M34 N12 / (M34 + N12) in multiply-adds, for large batches."""
    shapes = [(1, 4, 4, 8), (8, 8, 8, 8), (8, 8, 8, 8), (8, 4, 4, 1)]
    plan = planner.plan(shapes, 1024)
    assert (plan.method, plan.groups) == ("halves", (2, 2))
    assert plan is planner.plan([list(s) for s in shapes], 1000)  # cached, by power of two
    wide = [(1, 4, 4, 16), (16, 8, 8, 48), (48, 8, 8, 16), (16, 4, 4, 1)]
    assert planner.plan(wide, 8192).method == "dense"
    assert planner.plan(wide, 1).method == "halves"
    chain = fw.tt.TTLinear(**CHAIN)
    assert planner.plan([core.shape for core in chain.cores], 1).method == "chain"
    assert "a chain in plain torch" in chain.explain(1)
    text = fw.tt.TTLinear(1024, 1024, rank=8).explain(1024)
    assert "forward" in text
    assert "backward" in text
    assert "MB" in text
    assert "estimated cost (relative)" in text
    assert " ms" not in text
    small = four_axis_shapes(fw.tt.TTLinear(784, 10, rank=5, layout="in_out").cores, 4)
    assert small[0][1] == 1


def test_planner_for_a_gpu():
    """One method for all passes; the precision of float32 rides on the plan, and decides what is cheapest."""
    shapes = ((1, 4, 4, 8), (8, 8, 8, 8), (8, 8, 8, 8), (8, 4, 4, 1))
    half = planner.plan(shapes, 65536, torch.bfloat16, "ieee")
    assert (half.method, half.groups) == ("halves", (2, 2))
    assert planner.plan_code(shapes, 65536, torch.bfloat16, 0, "ieee")[2:] == (0, 0, 0, 0, 0)
    assert planner.plan(shapes, 65536, torch.float32, "split").method == "halves"
    assert planner.plan_code(shapes, 65536, torch.float32, 0, "split")[6] == PRECISIONS.index("split")
    wide = ((1, 4, 4, 16), (16, 8, 8, 256), (256, 8, 8, 16), (16, 4, 4, 1))
    for dtype, how in ((torch.bfloat16, "ieee"), (torch.float32, "split"), (torch.float64, "ieee")):
        assert planner.plan(wide, 65536, dtype, how).method == "dense"
        assert planner.plan_code(wide, 65536, dtype, 0, how) == (0, 1, 4)
    assert len(planner.plan_code(shapes, 65536, torch.bfloat16, 0)) == 6  # the CPU's


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dense_plan_of_a_gpu(dtype):
    """W built in each call and multiplied by torch, in x's dtype."""
    layer = fw.tt.TTLinear(60, 48, in_modes=(12, 5), out_modes=(8, 6), dtype=dtype)
    x = torch.randn(3, 60, dtype=dtype)
    y = functional._dense(x, layer.cores, layer.bias, 0)
    assert y.dtype == dtype
    torch.testing.assert_close(y, layer(x), rtol=0.0, atol=0.02 if dtype == torch.bfloat16 else 1e-12)


def test_cuda_precision_is_checked_and_restored():
    assert precision.chosen() == "ieee"
    with fw.tt.cuda_precision("split"), fw.tt.cuda_precision("tf32"):
        assert precision.chosen() == "tf32"
    assert precision.chosen() == "ieee"
    with pytest.raises(ValueError, match="precision must be one of"):
        fw.tt.cuda_precision("fast")  # at once, not on entering the block


def test_bfloat16_sums_in_float32():
    layer = fw.tt.TTLinear(256, 256, rank=8)
    x = torch.randn(100, 256)
    half = copy.deepcopy(layer).bfloat16()
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    exact = F.linear(x.bfloat16().double(), half.double().to_dense(), half.bias)
    half.bfloat16()
    # The only rounding to 8 bits is that of the result: 2⁻⁹ at most for each value.
    assert float((y.double() - exact).norm() / exact.norm()) < 2**-8.5
    x16 = x.bfloat16().requires_grad_()
    half(x16).sum().backward()
    assert x16.grad.dtype == torch.bfloat16
    assert half.core_1.grad.dtype == torch.bfloat16
    assert layer.half()(x.half()).dtype == torch.float16


def test_autocast_gives_the_autocast_dtype():
    layer = fw.tt.TTLinear(64, 64)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.core_0.grad.dtype == torch.float32
    wide = layer.double()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert wide(x.double()).dtype == nn.Linear(64, 64).double()(x.double()).dtype == torch.float64


def test_copies_states_and_pickles():
    layer = fw.tt.TTLinear(24, 18, rank=3)
    x = torch.randn(5, 24)
    again = fw.tt.TTLinear(24, 18, rank=3)
    again.load_state_dict(layer.state_dict())
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    copies = [again, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)]
    for each in copies:
        torch.testing.assert_close(each(x), layer(x), rtol=0, atol=0)
    assert list(layer.state_dict()) == ["core_0", "core_1", "bias"]


def test_replicas_of_data_parallel():
    """What nn.DataParallel does to a module: parameters become plain attributes."""
    layer = fw.tt.TTLinear(24, 18, rank=3)
    replica = layer._replicate_for_data_parallel()
    for name, parameter in layer.named_parameters():
        setattr(replica, name, parameter.detach().clone().requires_grad_() * 1)
    x = torch.randn(5, 24)
    torch.testing.assert_close(replica(x), layer(x))
    assert replica.ranks == layer.ranks


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_layer(backend):
    torch.compiler.reset()
    layer = nn.Sequential(fw.tt.TTLinear(24, 18, rank=3), nn.ReLU(), fw.tt.TTLinear(18, 6, rank=2, layout="in_out"))
    x = torch.randn(5, 24)
    compiled = torch.compile(layer, backend=backend, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    gradients = [torch.autograd.grad(f(x).square().sum(), layer.parameters()) for f in (compiled, layer)]
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


def test_jacobian_and_ntk_in_float64():
    """The NTK from jacrev over the parameters, and that of fw.ntk, against the dense network's."""
    network = nn.Sequential(fw.tt.TTLinear(12, 10, rank=2), nn.Tanh(), fw.tt.TTLinear(10, 3, rank=2)).double()
    x = torch.randn(4, 12, dtype=torch.float64)
    parameters = dict(network.named_parameters())

    def one(parameters, row):
        return torch.func.functional_call(network, parameters, row[None])[0]

    def dense_one(parameters, row):
        first = reference.merge([parameters[f"0.core_{k}"] for k in range(2)])[0, :, :, 0]
        last = reference.merge([parameters[f"2.core_{k}"] for k in range(2)])[0, :, :, 0]
        hidden = torch.tanh(first[:10, :12] @ row + parameters["0.bias"])
        return last[:3, :10] @ hidden + parameters["2.bias"]

    kernels = []
    for function in (one, dense_one):
        jacobians = torch.func.vmap(torch.func.jacrev(function), (None, 0))(parameters, x)
        flat = torch.cat([j.flatten(2) for j in jacobians.values()], 2)
        kernels.append(torch.einsum("axp,byp->abxy", flat, flat))
    torch.testing.assert_close(kernels[0], kernels[1], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(fw.ntk.empirical_ntk(network, x), kernels[1], rtol=1e-12, atol=1e-12)


def test_forward_over_forward_is_refused():
    """torch would return a second derivative without this layer's part."""
    layer = fw.tt.TTLinear(24, 18, rank=3)
    x = torch.randn(2, 24)

    def forward(x):
        return torch.func.jvp(lambda x: layer(x).square().sum(), (x,), (torch.ones_like(x),))[1]

    torch.func.grad(forward)(x)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative of a forward-mode derivative"):
        torch.func.jvp(forward, (x,), (x,))
    with pytest.raises(NotImplementedError, match="no forward-mode derivative of a forward-mode derivative"):
        torch.func.jacfwd(torch.func.jacfwd(lambda x: layer(x).square().sum()))(x)


def test_same_bits_for_any_number_of_threads():
    if not fw.has_kernels():
        pytest.skip("a promise of the kernels")
    layer = fw.tt.TTLinear(784, 625, rank=8, in_modes=(4, 7, 4, 7), out_modes=(5, 5, 5, 5))
    x, grad = torch.randn(999, 784), torch.randn(999, 625)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(forward_and_gradients(layer, x, grad))
    finally:
        torch.set_num_threads(threads)
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("direction", [0, 1])
def test_an_empty_batch_of_a_chain(direction):
    cores = fw.tt.TTLinear(10752, 21504, rank=3, in_modes=[8, 3, 4, 8, 2, 7], out_modes=[3, 2, 8, 7, 8, 8]).cores
    x = torch.randn(0, 10752, requires_grad=True)
    y = reference.tt_chain(x, cores, None, (1, 2, 3), direction)
    assert y.shape == (0, 21504)
    assert all(not gradient.any() for gradient in torch.autograd.grad(y.sum(), [x, *cores]))


def test_a_rank_of_numpy():
    rank = pytest.importorskip("numpy").int64(2)
    assert fw.tt.TTLinear(64, 64, rank=rank).ranks == (2,)
    assert fw.tt.TTLinear(64, 64, rank=[rank]).ranks == (2,)


@pytest.mark.parametrize("rank", [None, 2.0, "2", [2.0]])
def test_a_rank_that_is_no_integer(rank):
    with pytest.raises(TypeError, match=r"^rank must be an int"):
        fw.tt.TTLinear(24, 18, rank=rank)


BAD = [
    (lambda: fw.tt.TTLinear(24, 18, rank=0), "rank must be at least 1, got 0"),
    (lambda: fw.tt.TTLinear(24, 18, rank=[2, 2, 2]), "rank must be an int or have 1 entries"),
    (lambda: fw.tt.TTLinear(24, 18, in_modes=(5, 5)), "in_modes must multiply to in_features = 24"),
    (lambda: fw.tt.TTLinear(24, 18, out_modes=(2, -9)), "out_modes must be positive integers"),
    (lambda: fw.tt.TTLinear(24, 18, in_modes=(4, 6), out_modes=(2, 3, 3)), "as many in_modes as out_modes"),
    (lambda: fw.tt.TTLinear(24, 18, layout="out_in"), "layout must be one of 'matrix', 'in_out'"),
    (lambda: fw.tt.TTLinear(0, 18), "in_features must be at least 1"),
    (lambda: fw.tt.TTLinear(24, 18)(torch.randn(3, 23)), "x must have a last dimension of in_features = 24"),
    (lambda: fw.tt.TTLinear(24, 18).reset_parameters(0.0), "variance must be positive"),
    (lambda: fw.tt.TTLinear.from_linear(nn.Linear(24, 18)), "give eps, max_rank or target_params"),
    (lambda: fw.tt.TTLinear.from_linear(nn.Linear(24, 18), max_rank=0), "max_rank must be at least 1"),
    (lambda: fw.tt.TTLinear.from_linear(nn.Linear(24, 18), target_params=20), "target_params = 20 leaves 2 parameters"),
    (lambda: fw.tt.TTLinear(24, 18).explain(0), "batch must be at least 1"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("cores", [torch.randn(1, 18, 24, 1), 3, None])
def test_cores_that_are_no_list(cores):
    with pytest.raises(TypeError, match=f"cores must be a list or tuple of tensors, got {type(cores).__name__}"):
        fw.tt.tt_linear(torch.randn(3, 24), cores)
    with pytest.raises(TypeError, match="cores must be a list"):
        fw.tt.tt_to_dense(cores)


def test_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"x has dtype torch.float64, but the layer's cores has torch.float32"):
        fw.tt.TTLinear(24, 18)(torch.randn(3, 24).double())


def test_nan_weights_are_refused():
    linear = nn.Linear(24, 18)
    with torch.no_grad():
        linear.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="weight holds NaN"):
        fw.tt.TTLinear.from_linear(linear, max_rank=2)


def test_set_cores_never_broadcasts():
    layer = fw.tt.TTLinear(64, 64, rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4))
    before = [core.detach().clone() for core in layer.cores]
    for cores, message in (
        (
            fw.tt.tt_round(before, max_rank=1),
            r"cores\[0\] must have the shape of core_0 \[1, 4, 4, 4\], got \[1, 4, 4, 1\]",
        ),
        (before[:2], "cores must hold 3 tensors, one for each core, got 2"),
    ):
        with pytest.raises(ValueError, match=message):
            layer.set_cores(cores)
    assert all(torch.equal(a, b) for a, b in zip(layer.cores, before, strict=True))


def test_assigned_cores_keep_their_modes():
    layer = fw.tt.TTLinear(64, 64, rank=4, in_modes=(4, 4, 4), out_modes=(4, 4, 4))
    with pytest.raises(ValueError, match=r"core_1 must have shape \[r, 4, 4, r'\], got \[4, 4, 2, 4\]"):
        layer.core_1 = nn.Parameter(torch.ones(4, 4, 2, 4))
    for k, core in enumerate(fw.tt.tt_round([core.detach() for core in layer.cores], max_rank=2)):
        setattr(layer, f"core_{k}", nn.Parameter(core))
    x = torch.randn(5, 64)
    torch.testing.assert_close(layer(x), nn.functional.linear(x, layer.to_dense(), layer.bias), rtol=1e-5, atol=1e-5)


def test_integers_of_numpy():
    layer = fw.tt.TTLinear(64, 64, in_modes=np.array([8, 8]), out_modes=[np.int64(8), 8])
    assert layer.explain(np.int64(3)) == layer.explain(3)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fw.tt.TTLinear(64, 64, in_modes=8), TypeError, "in_modes must be a list of ints"),
        (lambda: fw.tt.TTEmbedding(8, 8, padding_idx=1.5), TypeError, "padding_idx must be an int, got float"),
        (
            lambda: fw.tt.TTLinear.from_linear(nn.Linear(8, 8, device="meta"), max_rank=2),
            ValueError,
            "linear must have a weight with values, but it is on the meta device",
        ),
        (
            lambda: fw.tt.TTLinear.from_linear(nn.Linear(8, 8, dtype=torch.complex64), max_rank=2),
            TypeError,
            "linear must have a real weight, got complex64",
        ),
    ],
)
def test_errors_name_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()
