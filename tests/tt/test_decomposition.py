"""TT-SVD, rounding and reconstruction: the error bound, exact ranks, known parameter counts and errors."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import finite_width as fw
from finite_width.tt.modes import choose_modes, train_size


def ranks(cores):
    return [core.shape[0] for core in cores[1:]]


def error(cores, tensor):
    dense = fw.tt.tt_to_dense(cores)
    return float((dense - tensor.reshape(dense.shape)).norm() / tensor.norm())


def grid(*sizes):
    return torch.meshgrid(*[torch.arange(size, dtype=torch.float64) for size in sizes], indexing="ij")


def laplacian(size):
    return (
        2 * torch.eye(size, dtype=torch.float64)
        - torch.diag(torch.ones(size - 1).double(), 1)
        - torch.diag(torch.ones(size - 1).double(), -1)
    )


@pytest.mark.parametrize(
    "weight, rank",
    [
        (torch.eye(256, dtype=torch.float64), 1),
        (torch.kron(*[torch.kron(*torch.randn(2, 4, 4).double()) for _ in range(2)]), 1),
        (torch.diag(torch.ones(255, dtype=torch.float64), 1), 2),  # shift
        (laplacian(256), 3),
    ],
    ids=["identity", "kronecker", "shift", "laplacian"],
)
def test_exact_ranks_of_matrices(weight, rank):
    cores = fw.tt.tt_matrix_svd(weight, (4, 4, 4, 4), (4, 4, 4, 4), eps=1e-12)
    assert ranks(cores) == [rank] * 3
    assert error(cores, weight) < 1e-12


def test_exact_ranks_of_tensors():
    i, j, k, m = grid(5, 6, 7, 4)
    for tensor in (i + j + k + m, torch.sin(0.3 * i + 0.7 * j + 0.2 * k - m + 0.1)):
        cores = fw.tt.tt_svd(tensor, eps=1e-10)
        assert ranks(cores) == [2, 2, 2]
        assert error(cores, tensor) < 1e-10


def test_gaussian_matrix_errors_and_parameters():
    """Gaussian 1024², modes (4,8,8,4)²: relative errors and parameter counts of the maximal truncations."""
    weight = torch.randn(1024, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    modes = (4, 8, 8, 4)
    full = fw.tt.tt_matrix_svd(weight, modes, modes, eps=0.0)
    assert ranks(full) == [16, 1024, 16]
    assert error(full, weight) < 1e-12
    for rank, expected, parameters in ((8, 0.9937, 8448), (16, 0.9703, 33280), (64, 0.8888, 131584)):
        cores = fw.tt.tt_matrix_svd(weight, modes, modes, max_rank=rank)
        assert sum(core.numel() for core in cores) == parameters
        assert error(cores, weight) == pytest.approx(expected, abs=1e-3)


def test_known_parameter_counts():
    assert train_size((16,) * 5, (8,) * 4) == 3328  # 4⁵ × 4⁵
    assert train_size((20, 35, 20, 35), (8,) * 3) == 3960  # 784 × 625 as (4,7,4,7) × 5⁴
    vgg = train_size([4 * n for n in (2, 7, 8, 8, 7, 4)], (2,) * 5)  # VGG fc6, 25088 × 4096
    assert vgg == 528
    assert round(25088 * 4096 / vgg) == 194_622


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.sampled_from([0.0, 1e-8, 1e-3, 0.1, 0.5, 1.0]),
    st.integers(0, 2**31),
)
def test_error_bound_of_svd_and_rounding(shape, eps, seed):
    """Error ≤ eps ‖A‖, for TT-SVD and for rounding, on any shape."""
    tensor = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    cores = fw.tt.tt_svd(tensor, eps=eps)
    assert error(cores, tensor) <= eps + 1e-12
    exact = fw.tt.tt_svd(tensor, eps=0.0)
    assert error(fw.tt.tt_round(exact, eps=eps), tensor) <= eps + 1e-12


def test_rounding_finds_the_true_ranks():
    """A train plus itself has twice the ranks; rounding halves them again."""
    a = fw.tt.tt_svd(torch.randn(4, 5, 6).double(), max_rank=3)
    doubled = [torch.cat([a[0], a[0]], 2)]
    middle = torch.zeros(6, 5, 6).double()
    middle[:3, :, :3] = middle[3:, :, 3:] = a[1]
    doubled += [middle, torch.cat([a[2], a[2]], 0)]
    rounded = fw.tt.tt_round(doubled, eps=1e-10)
    assert ranks(rounded) == [3, 3]
    torch.testing.assert_close(fw.tt.tt_to_dense(rounded), 2 * fw.tt.tt_to_dense(a))


def test_both_limits_hold():
    tensor = torch.randn(4, 5, 6).double()
    assert ranks(fw.tt.tt_svd(tensor, eps=1e-3, max_rank=[2, 3])) == [2, 3]
    assert ranks(fw.tt.tt_svd(tensor, eps=2.0, max_rank=5)) == [1, 1]
    assert error(fw.tt.tt_svd(torch.zeros(3, 4), eps=0.1), torch.ones(3, 4)) == 1.0


def test_to_dense_is_differentiable():
    cores = [torch.randn(1, 2, 3, 2).double().requires_grad_(), torch.randn(2, 2, 2, 1).double().requires_grad_()]
    assert torch.autograd.gradcheck(lambda *c: fw.tt.tt_to_dense(c), cores)


@pytest.mark.parametrize("size", [1, 2, 7, 10, 12, 97, 625, 784, 997, 1000, 1024, 4096, 25088, 50257])
@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_modes_are_balanced(size, count):
    modes = choose_modes(size, count)
    product = torch.tensor(modes).prod().item()
    assert len(modes) == count
    assert size <= product <= max(1.1 * size, size + 2)
    assert max(modes) <= max(5, 2.5 * product ** (1 / count))


BAD = [
    (lambda: fw.tt.tt_svd(torch.randn(3, 4)), "give eps"),
    (lambda: fw.tt.tt_svd(torch.randn(3, 4), max_rank=0), "max_rank must be at least 1, got 0"),
    (lambda: fw.tt.tt_svd(torch.randn(3, 4), max_rank=[2, 2]), "max_rank must be an int or have 1 entries"),
    (lambda: fw.tt.tt_svd(torch.randn(3, 4), eps=-1.0), "eps must be a relative error"),
    (lambda: fw.tt.tt_svd(torch.randn(3, 4), eps=float("nan")), "eps must be a relative error"),
    (lambda: fw.tt.tt_svd(torch.tensor([[1.0, float("nan")]]), eps=0.1), "tensor holds NaN"),
    (lambda: fw.tt.tt_svd(torch.empty(0, 3), eps=0.1), "at least one axis and one element"),
    (lambda: fw.tt.tt_matrix_svd(torch.randn(6, 4), (2, 2), (2, 2), eps=0.1), "out_modes must multiply to"),
    (lambda: fw.tt.tt_matrix_svd(torch.randn(4, 4), (2, 2), (4,), eps=0.1), "must be of one length"),
    (
        lambda: fw.tt.tt_round([torch.randn(1, 3, 2), torch.randn(3, 3, 1)], eps=0.1),
        r"cores\[1\] must begin with rank 2",
    ),
    (lambda: fw.tt.tt_round([torch.full((1, 3, 1), torch.inf)], eps=0.1), r"cores\[0\] holds NaN"),
    (lambda: fw.tt.tt_to_dense([]), "at least one core"),
]


@pytest.mark.parametrize("call, message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_bad_dtype():
    with pytest.raises(TypeError, match="tensor must be float32 or float64, got int64"):
        fw.tt.tt_svd(torch.arange(6).reshape(2, 3), eps=0.1)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 1e160, 1e-170])
def test_the_bound_holds_for_very_large_and_small_tensors(scale):
    i = torch.arange(6.0, dtype=torch.float64)
    tensor = i[:, None, None] + i[:, None] + i + 0.01 * torch.randn(6, 6, 6, dtype=torch.float64)
    ranks = [core.shape for core in fw.tt.tt_svd(tensor, eps=0.1)]
    exact = fw.tt.tt_svd(tensor, eps=0)
    for cores in (
        fw.tt.tt_svd(tensor * scale, eps=0.1),
        fw.tt.tt_round([*exact[:-1], exact[-1] * scale], eps=0.1),
    ):
        assert [core.shape for core in cores] == ranks
        error = (fw.tt.tt_to_dense(cores) / scale - tensor).norm()
        assert float(error) <= 0.1 * float(tensor.norm())
    linear = nn.Linear(16, 16, dtype=torch.float64)
    right = fw.tt.compress(nn.Sequential(copy.deepcopy(linear)), max_rank=2).layers[0]
    with torch.no_grad():
        linear.weight.mul_(scale)
    found = fw.tt.compress(nn.Sequential(linear), max_rank=2).layers[0]
    assert found.relative_error == pytest.approx(right.relative_error)
