"""Kernel ridge systems: both solvers against a dense solution, convergence, and what they say when it fails."""

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning

import finite_width as fw


def kernel(size=200, decay=0.9, seed=0, dtype=torch.float64):
    """A kernel with eigenvalues 100, 100·decay, ..."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator)).Q
    values = 100 * decay ** torch.arange(size, dtype=torch.float64)
    K = (basis * values) @ basis.T
    return ((K + K.T) / 2).to(dtype)


def targets(size=200, columns=3, dtype=torch.float64):
    return torch.randn(size, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).to(dtype)


class MatrixFree:
    """An operator that counts its products and refuses to be formed."""

    def __init__(self, K):
        self.K, self.shape, self.dtype, self.device = K, K.shape, K.dtype, K.device
        self.columns = self.widest = 0

    def __matmul__(self, v):
        assert v.dtype == self.dtype
        self.columns += v.shape[1]
        self.widest = max(self.widest, v.shape[1])
        return self.K @ v

    def to_dense(self):
        raise AssertionError("the kernel was formed")


def exact(K, y, ridge):
    return torch.linalg.solve(K.double() + ridge * torch.eye(len(K), dtype=torch.float64), y.double())


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize("shape", ["column", "matrix"])
def test_both_methods_solve(method, shape):
    K, y = kernel(), targets()
    y = y[:, 0] if shape == "column" else y
    found = fw.ntk.solve(K, y, ridge=1e-2, method=method, tol=1e-10)
    assert found.method == method
    assert found.coefficients.shape == y.shape
    assert found.residual <= 1e-10
    assert (found.iterations == 0) == (method == "cholesky")
    torch.testing.assert_close(found.coefficients, exact(K, y, 1e-2), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [0, 20, None])
@pytest.mark.parametrize("decay", [0.5, 0.9, 0.99])
def test_conjugate_gradients_with_and_without_preconditioner(rank, decay):
    K, y = kernel(decay=decay), targets()
    operator = MatrixFree(K)
    found = fw.ntk.solve(operator, y, ridge=1e-3, method="cg", rank=rank, tol=1e-9)
    assert found.residual <= 1e-9
    # Every product is counted: one with the columns of y, or the preconditioner's with `rank` random ones.
    rank = 50 if rank is None else rank
    assert operator.columns == 3 * (found.iterations - (rank > 0)) + rank
    assert operator.widest <= 16
    torch.testing.assert_close(found.coefficients, exact(K, y, 1e-3), rtol=1e-5, atol=1e-5)


def test_the_preconditioner_pays():
    K, y = kernel(size=400, decay=0.9), targets(400, 1)
    plain = fw.ntk.solve(K, y, ridge=1e-3, method="cg", rank=0)
    helped = fw.ntk.solve(K, y, ridge=1e-3, method="cg", rank=100)
    assert helped.iterations < plain.iterations / 3


def test_columns_that_depend_on_each_other_and_zero_columns():
    K, y = kernel(), targets()
    y = torch.cat([y, y[:, :1] * 2, torch.zeros(200, 1), y[:, :1] - y[:, 1:2]], dim=1)
    found = fw.ntk.solve(K, y, ridge=1e-2, method="cg", tol=1e-9)
    assert found.residual <= 1e-9
    torch.testing.assert_close(found.coefficients, exact(K, y, 1e-2), rtol=1e-6, atol=1e-6)
    zero = fw.ntk.solve(K, torch.zeros(200), ridge=1e-2, method="cg")
    assert not zero.coefficients.any()
    assert zero.residual == 0


def test_more_columns_than_one_block_and_than_rows():
    K, y = kernel(size=40), targets(40, 150)
    found = fw.ntk.solve(K, y, ridge=1e-2, method="cg", tol=1e-9)
    torch.testing.assert_close(found.coefficients, exact(K, y, 1e-2), rtol=1e-6, atol=1e-6)


def test_iterations_are_counted_for_each_block_of_columns():
    K, y = kernel(size=40), targets(40, 100)  # five blocks of 20 columns
    one = fw.ntk.solve(K, y[:, :20], ridge=1e-2, method="cg", tol=1e-9).iterations
    found = fw.ntk.solve(K, y, ridge=1e-2, method="cg", tol=1e-9, max_iterations=one + 2)
    assert found.iterations > 2 * one
    assert found.residual <= 1e-9
    torch.testing.assert_close(found.coefficients, exact(K, y, 1e-2), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_systems(method, size):
    K, y = kernel(size=size), targets(size, 2)
    found = fw.ntk.solve(K, y, ridge=1.0, method=method)
    torch.testing.assert_close(found.coefficients, exact(K, y, 1.0), rtol=1e-6, atol=1e-6)


def test_a_float32_kernel_is_solved_in_float64():
    K, y = kernel(dtype=torch.float32), targets(dtype=torch.float32)
    for method in ("cholesky", "cg"):
        found = fw.ntk.solve(K, y, ridge=0.1, method=method, tol=1e-9)
        assert found.coefficients.dtype == torch.float32
        # Equal to the exact solution for this float32 kernel up to the rounding of the result itself.
        torch.testing.assert_close(found.coefficients.double(), exact(K, y, 0.1), rtol=2e-7, atol=2e-7)


def test_auto_follows_the_memory():
    K, y = kernel(), targets()
    assert fw.ntk.solve(K, y, ridge=1.0).method == "cholesky"
    assert fw.ntk.solve(K, y, ridge=1.0, memory_budget=100_000).method == "cg"


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_any_finite_scale_of_the_targets(method):
    K, y = kernel(size=40), targets(40)
    expected = exact(K, y, 1.0)
    for scale in (1e-200, 1e-160, 1e200):
        found = fw.ntk.solve(K, torch.cat([y, scale * y], dim=1), ridge=1.0, method=method, tol=1e-10)
        torch.testing.assert_close(found.coefficients[:, 3:] / scale, expected, rtol=1e-8, atol=1e-8)
        assert 0 < found.residual <= 1e-10


@pytest.mark.parametrize("method", ["cholesky", "cg"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_solution_from_what_is_not_finite(method, bad):
    K, y = kernel(size=10), targets(10)
    for name in ("K", "y"):
        given = {"K": K.clone(), "y": y.clone()}
        given[name][2, 1] = bad
        given["K"].copy_(given["K"].tril().T if name == "K" else K)  # above the diagonal
        with pytest.raises(ValueError, match=rf"^{name} holds NaN or infinite entries"):
            fw.ntk.solve(given["K"], given["y"], ridge=1.0, method=method)
    operator = MatrixFree(torch.full_like(K, bad))
    with pytest.raises(ValueError, match="K holds NaN"):
        fw.ntk.solve(operator, y, ridge=1.0, method="cg")


def test_degenerate_systems_of_conjugate_gradients():
    found = fw.ntk.solve(kernel(size=10), torch.zeros(10, 0), ridge=1.0, method="cg")
    assert found.coefficients.shape == (10, 0)
    with pytest.warns(ConvergenceWarning, match="relative residual of 1 .*Raise ridge"):
        fw.ntk.solve(torch.zeros(10, 10), torch.ones(10), ridge=0.0, method="cg")


@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_rounding_is_no_asymmetry(method):
    K = kernel(size=10, dtype=torch.float32)
    K[0, 1] *= 1 + 1e-5
    assert fw.ntk.solve(K, targets(10), ridge=1.0, method=method).residual < 1e-4
    K[0, 1] += 1
    with pytest.raises(ValueError, match="K_or_operator must be symmetric"):
        fw.ntk.solve(K, targets(10), ridge=1.0, method=method)


def test_what_does_not_converge_says_so():
    K, y = kernel(decay=0.99), targets()
    with pytest.warns(ConvergenceWarning, match="above tol"):
        found = fw.ntk.solve(K, y, ridge=1e-4, method="cg", rank=0, max_iterations=5)
    assert found.residual > 1e-6
    assert torch.isfinite(found.coefficients).all()


def test_jitter_only_when_asked():
    vector = torch.randn(50, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    K = vector @ vector.T - 1e-9 * torch.eye(50, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"not positive definite.*Raise ridge"):
        fw.ntk.solve(K, vector, ridge=0.0, method="cholesky")
    found = fw.ntk.solve(K, vector, ridge=0.0, method="cholesky", jitter=1e-6)
    assert 0 < found.jitter < 1e-3
    assert fw.ntk.solve(K, vector, ridge=0.1, method="cholesky", jitter=1e-6).jitter == 0


def test_the_error_of_a_negative_kernel_names_no_negative_jitter():
    with pytest.raises(ValueError, match=r"diagonal -1, jitter 0\)"):
        fw.ntk.solve(-torch.eye(3), torch.ones(3), ridge=0.0, method="cholesky", jitter=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"K_or_operator": torch.ones(3, 4)}, ValueError, r"square \[N, N\] with N > 0, got \[3, 4\]"),
        ({"K_or_operator": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "K_or_operator must be float32 or float64"),
        ({"K_or_operator": np.ones((3, 3)).tolist()}, TypeError, "operator with shape and @, got list"),
        ({"y": torch.ones(4)}, ValueError, r"y must have shape \[3\] or \[3, C\].*got \[4\]"),
        ({"y": [1.0, 2.0, 3.0]}, TypeError, "y must be a torch.Tensor, got list"),
        ({"ridge": -1.0}, ValueError, "ridge must be finite and at least 0"),
        ({"ridge": float("nan")}, ValueError, "ridge must be finite"),
        ({"method": "lu"}, ValueError, "method must be one of"),
        ({"tol": 0.0}, ValueError, "tol must be positive"),
        ({"tol": "small"}, TypeError, "tol must be a number, got str"),
        ({"jitter": -1.0}, ValueError, "jitter must be finite and at least 0, got -1"),
        ({"K_or_operator": torch.full((3, 3), torch.nan)}, ValueError, "K holds NaN"),
        ({"K_or_operator": torch.eye(3).to_sparse()}, TypeError, "K_or_operator must be a dense tensor"),
        ({"K_or_operator": torch.ones(0, 0), "y": torch.ones(0)}, ValueError, r"with N > 0, got \[0, 0\]"),
        ({"K_or_operator": torch.ones(3, 3).triu()}, ValueError, "K_or_operator must be symmetric, but differs from"),
        ({"K_or_operator": torch.ones(3, 3, device="meta")}, ValueError, "K_or_operator is on the meta device"),
        ({"y": torch.ones(3).to_sparse()}, TypeError, "y must be a dense tensor"),
        ({"y": torch.ones(3, device="meta")}, ValueError, "y is on the meta device"),
        ({"rank": -1}, ValueError, "rank must be at least 0, got -1"),
        ({"rank": 1.5}, TypeError, "rank must be an int, got float"),
        ({"max_iterations": 2.5}, TypeError, "max_iterations must be an int, got float"),
        ({"max_iterations": "a"}, TypeError, "max_iterations must be an int, got str"),
        ({"memory_budget": "a"}, TypeError, "memory_budget must be an int, got str"),
        ({"memory_budget": -1}, ValueError, "memory_budget must be at least 1, got -1"),
    ],
)
def test_bad_input(change, error, message):
    arguments = {"K_or_operator": torch.eye(3), "y": torch.ones(3), "ridge": 1.0, "method": "cholesky"} | change
    with pytest.raises(error, match=message):
        fw.ntk.solve(**arguments)
