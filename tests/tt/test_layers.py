"""TTConv2d and TTEmbedding against the dense layers."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw

CONVOLUTIONS = [
    {"in_channels": 4, "out_channels": 6, "kernel_size": 3, "rank": 3},
    {
        "in_channels": 8,
        "out_channels": 4,
        "kernel_size": (3, 5),
        "stride": 2,
        "padding": (1, 2),
        "dilation": (2, 1),
        "rank": 2,
    },
    {"in_channels": 3, "out_channels": 11, "kernel_size": 1, "bias": False, "rank": 4},
    {"in_channels": 4, "out_channels": 4, "kernel_size": (2, 4), "padding": "same", "rank": 3},
    {"in_channels": 4, "out_channels": 4, "kernel_size": 3, "padding": 1, "padding_mode": "reflect", "rank": 3},
    {"in_channels": 12, "out_channels": 8, "kernel_size": 3, "groups": 2, "stride": 2, "rank": 3},
    {"in_channels": 6, "out_channels": 6, "kernel_size": 3, "groups": 6, "padding": 1, "rank": 2},  # depthwise
    {"in_channels": 22, "out_channels": 26, "kernel_size": (1, 2), "groups": 2, "rank": 3},  # padded in each group
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolution_against_dense(options):
    layer = fw.tt.TTConv2d(**options, dtype=torch.float64)
    dense = nn.Conv2d(**{k: v for k, v in options.items() if k != "rank"}, dtype=torch.float64)
    x = torch.randn(2, layer.in_channels, 11, 12, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.to_dense())
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    y, exact = layer(x), dense(x)
    torch.testing.assert_close(y, exact, rtol=1e-12, atol=1e-12)
    inputs = [x.clone().requires_grad_(), *layer.parameters()]
    grad = torch.randn_like(y)
    got = torch.autograd.grad(layer(inputs[0]), inputs, grad)
    x2 = x.clone().requires_grad_()
    (x_grad,) = torch.autograd.grad(dense(x2), [x2], grad, retain_graph=True)
    torch.testing.assert_close(got[0], x_grad, rtol=1e-12, atol=1e-12)
    weight_grad = torch.autograd.grad(dense(x2), dense.weight, grad)[0]
    expected = torch.autograd.grad(layer.to_dense(), layer.cores, weight_grad)
    for a, b in zip(got[1 : 1 + len(expected)], expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_from_conv(options):
    conv = nn.Conv2d(**{k: v for k, v in options.items() if k != "rank"}).double()
    layer = fw.tt.TTConv2d.from_conv(conv, eps=1e-10)
    x = torch.randn(2, conv.in_channels, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(x), conv(x), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(layer.to_dense(), conv.weight, rtol=1e-8, atol=1e-8)
    coarse = fw.tt.TTConv2d.from_conv(conv, eps=0.4)
    assert float((coarse.to_dense() - conv.weight).detach().norm() / conv.weight.detach().norm()) <= 0.4
    small = fw.tt.TTConv2d.from_conv(conv, target_params=100)
    assert sum(p.numel() for p in small.parameters()) <= 100


def test_convolution_start_and_words():
    layer = fw.tt.TTConv2d(16, 32, 3, rank=6)
    assert float(layer.to_dense().square().mean()) == pytest.approx(1 / (3 * 16 * 9), rel=1e-4)
    assert "padded" not in repr(layer)
    padded = fw.tt.TTConv2d(97, 101, 3, rank=2)
    assert "channels of x padded with zeros" in repr(padded)
    dense = sum(p.numel() for p in nn.Conv2d(16, 32, 3).parameters())
    assert layer.compression_ratio == pytest.approx(dense / sum(p.numel() for p in layer.parameters()))
    torch.testing.assert_close(copy.deepcopy(layer)(torch.ones(1, 16, 4, 4)), layer(torch.ones(1, 16, 4, 4)))


def test_convolution_under_compile_and_func():
    torch.compiler.reset()
    layer = fw.tt.TTConv2d(4, 6, 3, rank=3).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))
    parameters = dict(layer.named_parameters())

    def loss(parameters, image):
        return torch.func.functional_call(layer, parameters, image[None]).square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
    for k in range(3):
        alone = torch.func.grad(loss)(parameters, x[k])
        for name, value in alone.items():
            torch.testing.assert_close(each[name][k], value)


EMBEDDINGS = [
    {"num_embeddings": 60, "embedding_dim": 12, "rank": 3},
    {"num_embeddings": 997, "embedding_dim": 17, "rank": 4},  # primes: padded
    {"num_embeddings": 10, "embedding_dim": 6, "rank": 1, "num_modes": (10,), "dim_modes": (6,)},
    {"num_embeddings": 4096, "embedding_dim": 64, "rank": 5, "num_modes": (8,) * 4, "dim_modes": (2, 4, 4, 2)},
]


@pytest.mark.parametrize("options", EMBEDDINGS)
def test_embedding_against_dense(options):
    layer = fw.tt.TTEmbedding(**options, dtype=torch.float64)
    indices = torch.randint(layer.num_embeddings, (7, 5))
    indices[0] = indices[1]  # equal ones
    indices[2, 0] = layer.num_embeddings - 1
    table = layer.to_dense()
    rows, exact = layer(indices), F.embedding(indices, table)
    torch.testing.assert_close(rows, exact, rtol=1e-12, atol=1e-12)
    grad = torch.randn_like(rows)
    got = torch.autograd.grad(rows, layer.cores, grad)
    for a, b in zip(got, torch.autograd.grad(exact, layer.cores, grad), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(layer(indices.int()), rows)
    assert layer(indices[:0]).shape == (0, 5, layer.embedding_dim)


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_against_dense(mode):
    layer = fw.tt.TTEmbedding(60, 12, rank=3, mode=mode, dtype=torch.float64)
    table = layer.to_dense()
    indices = torch.randint(60, (7, 5))
    torch.testing.assert_close(layer(indices), F.embedding_bag(indices, table, mode=mode))
    flat, offsets = indices.flatten(), torch.tensor([0, 4, 4, 20, 35])  # the second and the last bag are empty
    exact = F.embedding_bag(flat, table, offsets, mode=mode)
    torch.testing.assert_close(layer(flat, offsets), exact)
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(flat, offsets), exact)
    torch.testing.assert_close(compiled(indices), layer(indices))
    many = torch.func.vmap(lambda rows: layer(rows[None]))(indices)
    torch.testing.assert_close(many[:, 0], layer(indices))


def test_from_embedding():
    table = nn.Embedding(100, 16)
    exact = fw.tt.TTEmbedding.from_embedding(table, eps=1e-7)
    torch.testing.assert_close(exact.to_dense(), table.weight, rtol=1e-5, atol=1e-5)
    bags = nn.EmbeddingBag(100, 16, mode="mean")
    layer = fw.tt.TTEmbedding.from_embedding(bags, max_rank=4)
    assert layer.mode == "mean"
    assert max(layer.ranks) <= 4
    with pytest.raises(ValueError, match=r"has max_norm = 1\.0"):
        fw.tt.TTEmbedding.from_embedding(nn.Embedding(100, 16, max_norm=1.0), max_rank=4)
    padded = nn.Embedding(100, 16, padding_idx=7)
    layer = fw.tt.TTEmbedding.from_embedding(padded, eps=1e-7)
    assert layer.padding_idx == 7
    torch.testing.assert_close(layer.to_dense(), padded.weight, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        padded.weight[7, 0] = 1.0
    with pytest.raises(ValueError, match="row of padding_idx = 7 that is not zero"):
        fw.tt.TTEmbedding.from_embedding(padded, max_rank=4)


@pytest.mark.parametrize("mode", [None, "sum", "mean"])
@pytest.mark.parametrize("padding_idx", [0, -1])
def test_padding(mode, padding_idx):
    """The padding row is zero, has no gradient, and bags leave it out: as in torch's layers."""
    layer = fw.tt.TTEmbedding(60, 12, rank=3, mode=mode, padding_idx=padding_idx, dtype=torch.float64)
    place = padding_idx % 60
    assert layer.padding_idx == place
    assert f"padding_idx={place}" in repr(layer)
    table = layer.to_dense()
    assert not table[place].any()
    indices = torch.randint(60, (6, 5))
    indices[0], indices[1, 2] = place, place  # a bag of padding alone, and padding within a bag

    def exact(*args):
        if mode is None:
            return F.embedding(*args, table, padding_idx=place)
        return F.embedding_bag(args[0], table, *args[1:], mode=mode, padding_idx=place)

    calls = [(indices,)] if mode is None else [(indices,), (indices.flatten(), torch.tensor([0, 5, 5, 12]))]
    torch.compiler.reset()
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for args in calls:
        found, right = layer(*args), exact(*args)
        torch.testing.assert_close(found, right)
        torch.testing.assert_close(compiled(*args), right)
        grad = torch.randn_like(found)
        got = torch.autograd.grad(found, layer.cores, grad)
        for a, b in zip(got, torch.autograd.grad(right, layer.cores, grad, retain_graph=True), strict=True):
            torch.testing.assert_close(a, b)


def test_embedding_never_builds_the_table():
    """A billion rows: the lookup holds factors of about √V rows each, and nothing of the table's size."""
    layer = fw.tt.TTEmbedding(10**9, 64, rank=4)
    rows = layer(torch.tensor([0, 999_999_999, 123_456_789]))
    assert rows.shape == (3, 64)
    assert layer.compression_ratio > 1e6


def test_an_image_without_batch():
    layer = fw.tt.TTConv2d(4, 6, 3)
    x = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(layer(x[1]), layer(x)[1])


@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_second_derivatives_of_bags(mode, padding_idx):
    layer = fw.tt.TTEmbedding(12, 4, rank=2, mode=mode, padding_idx=padding_idx, dtype=torch.float64)
    names, cores = zip(*layer.named_parameters(), strict=True)
    indices, offsets = torch.tensor([3, 1, 3, 11, 0]), torch.tensor([0, 2, 2])

    def bags(*cores):
        return torch.func.functional_call(layer, dict(zip(names, cores, strict=True)), (indices, offsets))

    assert torch.autograd.gradcheck(bags, cores)
    assert torch.autograd.gradgradcheck(bags, cores)


@pytest.mark.parametrize(
    "make",
    [
        lambda **o: fw.tt.TTLinear(24, 18, rank=3, **o),
        lambda **o: fw.tt.TTConv2d(4, 6, 3, **o),
        lambda **o: fw.tt.TTEmbedding(60, 12, rank=3, **o),
    ],
)
def test_meta_device(make):
    with torch.device("meta"):
        context = make()
    for layer in (make(device="meta"), context):
        assert all(parameter.is_meta for parameter in layer.parameters())
        layer.to_empty(device="cpu")
        torch.manual_seed(3)
        layer.reset_parameters()
        torch.manual_seed(3)
        right = make()
        for a, b in zip(layer.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)


EMBEDDING = fw.tt.TTEmbedding(60, 12, rank=3)
BAGS = fw.tt.TTEmbedding(60, 12, rank=3, mode="sum")
CONVOLUTION = fw.tt.TTConv2d(4, 6, 3)
BAD = [
    (lambda: EMBEDDING(torch.tensor([3, 60])), IndexError, "indices must lie between 0 and 59, got 60"),
    (lambda: EMBEDDING(torch.tensor([-1, 3])), IndexError, "indices must lie between 0 and 59, got -1"),
    (lambda: EMBEDDING(torch.tensor([1.0])), TypeError, "indices must be int64 or int32, got float32"),
    (lambda: EMBEDDING(torch.tensor([1]), torch.tensor([0])), ValueError, "offsets are for bags"),
    (lambda: BAGS(torch.tensor([1, 2])), ValueError, r"indices must have shape \[B, L\] without offsets"),
    (lambda: BAGS(torch.tensor([[1, 2]]), torch.tensor([0])), ValueError, r"must have shapes \[n\] and \[B\]"),
    (lambda: fw.tt.TTEmbedding(60, 12, mode="max"), ValueError, "mode must be one of"),
    (lambda: fw.tt.TTEmbedding(60, 12, num_modes=(7, 8)), ValueError, "num_modes must multiply to num_embeddings = 60"),
    (lambda: fw.tt.TTEmbedding(60, 12, rank=0), ValueError, "rank must be at least 1"),
    (lambda: CONVOLUTION(torch.randn(2, 5, 8, 8)), ValueError, r"x must have shape \[B, 4, H, W\]"),
    (lambda: fw.tt.TTConv2d(4, 6, 0), ValueError, "kernel_size must be at least 1, got 0"),
    (lambda: fw.tt.TTConv2d(4, 6, (3, 3, 3)), ValueError, "kernel_size must be an int or have 2 entries"),
    (lambda: fw.tt.TTConv2d(4, 6, 3, stride=0), ValueError, "stride must be at least 1, got 0"),
    (lambda: fw.tt.TTConv2d(4, 6, 3, padding=(1, -1)), ValueError, "padding must be at least 0, got -1"),
    (lambda: fw.tt.TTConv2d(4, 6, 3, dilation=1.5), TypeError, "dilation must be an int, got float"),
    (lambda: BAGS(torch.tensor([1, 2]), torch.tensor([0.0])), TypeError, "offsets must be int64 or int32, got float32"),
    (lambda: BAGS(torch.tensor([1, 2]), [0]), TypeError, "offsets must be a torch.Tensor, got list"),
    (lambda: BAGS(torch.tensor([1, 2]), torch.tensor([1])), ValueError, r"offsets must rise from 0 to at most 2"),
    (lambda: BAGS(torch.tensor([1, 2]), torch.tensor([0, 2, 1])), ValueError, r"offsets must rise from 0"),
    (lambda: BAGS(torch.tensor([1, 2]), torch.tensor([0, 3])), ValueError, r"offsets must rise from 0"),
    (lambda: fw.tt.TTConv2d(4, 6, 3, stride=2, padding="same"), ValueError, "needs a stride of 1"),
    (lambda: fw.tt.TTConv2d(6, 4, 3, groups=3), ValueError, "groups must divide out_channels = 4, got 3"),
    (lambda: fw.tt.TTEmbedding(60, 12, padding_idx=60), ValueError, "padding_idx must lie between -60 and 59, got 60"),
    (lambda: fw.tt.TTConv2d.from_conv(nn.Conv2d(4, 4, 3)), ValueError, "give eps, max_rank or target_params"),
    (lambda: fw.tt.TTConv2d.from_conv(nn.Linear(4, 4), max_rank=2), TypeError, "conv must be an nn.Conv2d"),
]


@pytest.mark.parametrize("call, error, message", BAD)
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


SIX = {"rank": 3, "in_modes": (2,) * 6, "out_modes": (2,) * 6}


def test_a_table_under_autocast_is_that_without():
    """Equal indices meet in the gradient: 2000 of 40 rows, summed in float32."""
    table = fw.tt.TTEmbedding(7**5, 2**5, rank=4, num_modes=(7,) * 5, dim_modes=(2,) * 5)
    indices = torch.randint(40, (2000,))
    right = table(indices)
    with torch.autocast("cpu"):
        rows = table(indices)
    torch.testing.assert_close(rows, right, rtol=0, atol=0)
    got = torch.autograd.grad(rows.sum(), table.cores)
    for a, b in zip(got, torch.autograd.grad(right.sum(), table.cores), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("padding_idx", [None, 0])
def test_bags_of_half_precision_sum_in_float32(dtype, padding_idx):
    table = fw.tt.TTEmbedding(50, 12, rank=3, mode="mean", padding_idx=padding_idx, dtype=dtype)
    exact = copy.deepcopy(table).double()
    indices, offsets = torch.randint(1, 50, (5000,)), torch.tensor([0, 4000])
    right = exact(indices, offsets)
    grads = torch.autograd.grad(right.sum(), exact.cores)
    torch.compiler.reset()
    eps = torch.finfo(dtype).eps
    for call in (table, torch.compile(table, backend="aot_eager", fullgraph=True)):
        found = call(indices, offsets)
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), right, rtol=eps, atol=eps * float(right.abs().max()))
        for a, b in zip(torch.autograd.grad(found.sum(), table.cores), grads, strict=True):
            torch.testing.assert_close(a.double(), b, rtol=2 * eps, atol=2 * eps * float(b.abs().max()))
    many = torch.func.vmap(lambda rows: table(rows[None]))(indices[:4000].reshape(2, 2000))
    right = exact(indices[:4000].reshape(2, 2000))
    torch.testing.assert_close(many[:, 0].double(), right, rtol=eps, atol=eps * float(right.abs().max()))


@pytest.mark.parametrize(
    "make",
    [
        lambda: fw.tt.TTLinear(64, 64, **SIX),
        lambda: fw.tt.TTConv2d(64, 64, 3, **SIX),
        lambda: fw.tt.TTEmbedding(64, 64, rank=3, num_modes=(2,) * 6, dim_modes=(2,) * 6),
    ],
)
def test_dense_weights_and_algebra_under_autocast(make):
    layer = make()
    dense, cores = layer.to_dense(), [core.detach() for core in layer.cores[-5:]]
    cores[0] = cores[0][:1]
    full, rounded = fw.tt.tt_to_dense(cores), fw.tt.tt_round(cores, max_rank=2)
    with torch.autocast("cpu"):
        torch.testing.assert_close(layer.to_dense(), dense, rtol=0, atol=0)
        torch.testing.assert_close(fw.tt.tt_to_dense(cores), full, rtol=0, atol=0)
        for a, b in zip(fw.tt.tt_round(cores, max_rank=2), rounded, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_transforms_of_many_cores_under_autocast():
    layer = fw.tt.TTLinear(64, 64, **SIX)
    parameters, x = {name: value.detach() for name, value in layer.named_parameters()}, torch.randn(5, 64)

    def loss(parameters, x):
        return torch.func.functional_call(layer, parameters, (x,)).float().square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))
    right = each(parameters, x)
    stacked = {name: torch.stack([value, 2 * value]) for name, value in parameters.items()}
    call = torch.func.vmap(lambda parameters: torch.func.functional_call(layer, parameters, (x,)))
    with torch.autocast("cpu"):
        found, many = each(parameters, x), call(stacked)
        assert many.dtype == torch.bfloat16
    for name, value in right.items():
        assert float((found[name] - value).norm() / value.norm()) < 0.02
    exact = call(stacked)
    assert float((many - exact).norm() / exact.norm()) < 0.02
