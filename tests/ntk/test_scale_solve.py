"""Ridge systems with stored kernels, on one rank and several, and the operator in GPyTorch's hands."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import finite_width as fw
from ntk import operator_child, stream_child
from ntk.test_stream import environment


@pytest.mark.parametrize("compute", ["trace", "full"])
@pytest.mark.parametrize("method", ["cholesky", "cg"])
def test_stored_kernel(tmp_path: Path, compute: str, method: str) -> None:
    pytest.importorskip("zarr", reason="out= as a path needs zarr: pip install finite-width[scale]")
    model, x = stream_child.problem()
    stored = fw.ntk.empirical_ntk(model, x, compute=compute, out=tmp_path / "kernel.zarr")
    dense = fw.ntk.empirical_ntk(model, x, compute=compute)
    if compute == "full":
        dense = dense.permute(0, 2, 1, 3).reshape(3 * 83, 3 * 83)
    y = torch.randn(len(dense), 2, dtype=torch.float64)
    expected = torch.linalg.solve(dense.double() + torch.eye(len(dense)), y)
    found = fw.ntk.solve(stored, y, ridge=1.0, method=method, tol=1e-10)
    assert found.method == method
    assert float((found.coefficients - expected).norm() / expected.norm()) < 1e-8
    assert found.residual < 1e-9
    reread = fw.ntk.solve(stored, y, ridge=1.0, method=method, tol=1e-10, memory_budget=1)
    assert torch.equal(reread.coefficients, found.coefficients)


def test_memory_maps_and_bad_arrays(tmp_path: Path) -> None:
    values = np.eye(5, dtype=np.float32) * 2
    mapped = np.lib.format.open_memmap(tmp_path / "kernel.npy", "w+", np.float32, (5, 5))
    mapped[:] = values
    readable = np.load(tmp_path / "kernel.npy", mmap_mode="r")
    found = fw.ntk.solve(readable, torch.ones(5), ridge=1.0, method="cg")
    torch.testing.assert_close(found.coefficients, torch.full((5,), 1 / 3))
    turned = fw.ntk.solve(np.diag(np.arange(1.0, 6)).astype(np.float32)[::-1, ::-1], torch.ones(5), ridge=0.0)
    torch.testing.assert_close(turned.coefficients, 1 / torch.arange(5.0, 0, -1))
    with pytest.raises(ValueError, match=r"must be a stored kernel \[N, N\] or \[N, N, O, O\]"):
        fw.ntk.solve(np.zeros((5, 5, 2), np.float32), torch.ones(5), ridge=1.0)
    with pytest.raises(TypeError, match="K_or_operator must be float32 or float64, got int64"):
        fw.ntk.solve(np.zeros((5, 5), np.int64), torch.ones(5), ridge=1.0)
    with pytest.raises(ValueError, match="must be square"):
        fw.ntk.solve(np.zeros((5, 4), np.float32), torch.ones(5), ridge=1.0)


CHILD = """
import sys, torch, zarr, finite_width as fw
import finite_width.ntk.stored as stored
stored._PANEL_BYTES = 8 * 83 * 4  # several panels
y = torch.randn(83, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
found = fw.ntk.solve(zarr.open_array(sys.argv[1], mode="r"), y, ridge=0.1, method="cg", tol=1e-10)
rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 9
torch.save(found.coefficients, sys.argv[2] + str(rank))
"""


def test_ranks_share_the_products(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("zarr", reason="out= as a path needs zarr: pip install finite-width[scale]")
    monkeypatch.setattr(importlib.import_module("finite_width.ntk.plan"), "BLOCK_ROWS", 4)
    monkeypatch.setattr(importlib.import_module("finite_width.ntk.stream"), "TILE_ROWS", 8)
    model, x = stream_child.problem()
    store = tmp_path / "kernel.zarr"
    fw.ntk.empirical_ntk(model, x, compute="trace", out=store)
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for launcher in ([], torchrun):
        command = [sys.executable, *launcher, str(script), str(store), str(tmp_path / "x")]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    alone, *shared = (torch.load(tmp_path / f"x{rank}") for rank in (9, 0, 1))
    assert all(torch.equal(each, alone) for each in shared)


def test_ranks_share_the_operator(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks; the solver's small dense algebra is LAPACK's
    try:
        alone, iterations, rows = operator_child.solve("same")
    finally:
        torch.set_num_threads(threads)
    assert rows % operator_child.ROWS == 0
    ranks = 3  # which do not divide the parts
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    command = [sys.executable, *torchrun, operator_child.__file__, str(tmp_path / "x"), "same", "differ"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    found = [torch.load(tmp_path / f"x-same-{rank}") for rank in range(ranks)]
    assert all(torch.equal(each, alone) and count == iterations for each, count, _ in found)
    assert sum(pushed for *_, pushed in found) == rows  # nothing twice
    assert max(pushed for *_, pushed in found) < 1.2 * rows / ranks
    assert done.returncode != 0
    assert "the ranks have operators of different models or data" in done.stderr


def test_ranks_choose_alike_and_notice_different_calls(tmp_path: Path) -> None:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [sys.executable, *torchrun, operator_child.__file__, str(tmp_path / "x"), "memory", "targets"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=120)
    found = [torch.load(tmp_path / f"x-memory-{rank}") for rank in range(2)]
    assert all(iterations == 0 for _, iterations, _ in found)  # rank 0's choice: Cholesky
    assert torch.equal(found[0][0], found[1][0])
    assert done.returncode != 0
    assert "the ranks call solve with different y; give all of them the same" in done.stderr


def test_operator_of_parameters_that_were_frozen() -> None:
    model, x, *_ = regression()
    operator, v = fw.ntk.NTKOperator(model, x), torch.randn(60).double()
    with pytest.raises(TypeError, match="the vector must be a dense tensor"):
        operator @ v.to_sparse()
    model[0].weight.requires_grad_(False)
    for product in (lambda: operator @ v, operator.diagonal, operator.to_dense):
        with pytest.raises(ValueError, match=r"parameter '0\.weight' was frozen .* make a new operator"):
            product()


class SwitchedDropout(nn.Module):
    """Dropout that no module of torch's is there for."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 1).double()

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(self.layer(x), training=self.training)


def test_operator_of_a_model_that_was_changed() -> None:
    model, x, *_ = regression()
    model = nn.Sequential(*model, nn.BatchNorm1d(1).double()).eval()
    operator, v = fw.ntk.NTKOperator(model, x), torch.randn(60).double()
    calls = (lambda: operator @ v, lambda: operator.diagonal(), lambda: operator.to_dense())
    operator @ v
    model.train()
    for call in calls:
        with pytest.raises(ValueError, match=r"'3' \(BatchNorm1d\) is in train mode"):
            call()
    model.eval().float()
    for call in calls:
        with pytest.raises(TypeError, match=r"parameter '0.weight' was converted from torch.float64 to torch.float32"):
            call()
    switched = SwitchedDropout().eval()
    other = fw.ntk.NTKOperator(switched, x)
    other @ v
    switched.train()
    with pytest.raises(ValueError, match=r"\(SwitchedDropout\) was put from eval into train mode.*call model.eval\(\)"):
        other @ v


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
        self.out = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.attend(x).mean(1))


@pytest.mark.parametrize("training", [False, True])
def test_operator_of_attention_takes_forward_mode(training: bool) -> None:
    model, x = Attention().train(training), torch.randn(6, 5, 8)
    before = torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()
    operator, v = fw.ntk.NTKOperator(model, x), torch.randn(12)
    assert operator._products.push_route == "batched forward mode"
    torch.testing.assert_close(operator @ v, operator.to_dense() @ v, rtol=1e-4, atol=1e-4)
    assert (torch.backends.mha.get_fastpath_enabled(), torch.backends.cuda.flash_sdp_enabled()) == before


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 2 * x * grad


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Once.apply(x)


def test_operator_by_rows_warns() -> None:
    model = nn.Sequential(nn.Linear(3, 4), Square(), nn.Linear(4, 1))
    with pytest.warns(UserWarning, match="one backward for each row and output") as caught:
        operator = fw.ntk.NTKOperator(model, torch.randn(5, 3))
    assert caught[0].filename == __file__
    v = torch.randn(5)
    torch.testing.assert_close(operator @ v, operator.to_dense() @ v)


def regression() -> tuple[nn.Module, Tensor, Tensor, Tensor, Tensor]:
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    x = torch.rand(90, 3).double() * 2 - 1
    y = torch.sin(3 * x[:, 0]) + x[:, 1]
    return model, x[:60], y[:60], x[60:], y[60:]


def test_linear_operator() -> None:
    pytest.importorskip("linear_operator", reason="optional: pip install linear_operator")
    model, x, _, other, _ = regression()
    operator = fw.ntk.NTKOperator(model, x, other)
    lazy, dense = operator.to_linear_operator(), operator.to_dense()
    assert lazy.shape == dense.shape == (60, 30)
    v, w = torch.randn(2, 30, 4).double(), torch.randn(60).double()
    torch.testing.assert_close(lazy @ v, dense @ v)
    torch.testing.assert_close(lazy.mT @ w, dense.T @ w)
    square = fw.ntk.NTKOperator(model, x).to_linear_operator()
    torch.testing.assert_close(square.diagonal(), square.to_dense().diagonal())
    solved = square.add_diagonal(torch.tensor(0.5, dtype=torch.float64)).solve(w[:, None])
    expected = torch.linalg.solve(square.to_dense() + 0.5 * torch.eye(60), w[:, None])
    torch.testing.assert_close(solved, expected)


def test_gpytorch_model_learns_with_it() -> None:
    gpytorch: Any = pytest.importorskip("gpytorch", reason="optional: pip install gpytorch")
    model, x, y, x_test, y_test = regression()

    class Kernel(gpytorch.kernels.Kernel):  # type: ignore[misc]
        def forward(self, x1: Tensor, x2: Tensor, diag: bool = False, **_: Any) -> Any:
            same = x1.shape == x2.shape and torch.equal(x1, x2)
            operator = fw.ntk.NTKOperator(model, x1, None if same else x2)
            return operator.diagonal() if diag else operator.to_linear_operator()

    class Process(gpytorch.models.ExactGP):  # type: ignore[misc]
        def __init__(self, likelihood: Any) -> None:
            super().__init__(x, y, likelihood)
            self.mean, self.kernel = gpytorch.means.ConstantMean(), gpytorch.kernels.ScaleKernel(Kernel())

        def forward(self, inputs: Tensor) -> Any:
            return gpytorch.distributions.MultivariateNormal(self.mean(inputs), self.kernel(inputs))

    likelihood = gpytorch.likelihoods.GaussianLikelihood().double()
    process = Process(likelihood).double()
    evidence = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, process)
    optimizer = torch.optim.Adam(process.parameters(), lr=0.1)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = -evidence(process(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < losses[0] - 0.2
    process.eval()
    likelihood.eval()
    with torch.no_grad():
        predicted = process(x_test).mean
        scale, noise = process.kernel.outputscale, float(likelihood.noise)
        K, cross = (fw.ntk.empirical_ntk(model, each, x, compute="trace") for each in (x, x_test))
        solved = fw.ntk.solve(scale * K, y - process.mean.constant, ridge=noise)
    torch.testing.assert_close(predicted, process.mean.constant + scale * cross @ solved.coefficients)
    assert (predicted - y_test).square().mean() < 0.5 * y_test.var()
