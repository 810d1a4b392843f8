"""The planner's choices on the CPU: rows of a block, and weights whose gradients are computed in tiles."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import finite_width as fw
from finite_width.ntk import plan

from .jacobians import jacobian


class Layers(nn.Module):
    """Dense layers at several positions, whose gradients are larger than what they are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.flipped = nn.Parameter(torch.randn(24, 20) / 5)
        self.shared = nn.Linear(20, 20)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x)) @ self.flipped
        return self.shared(torch.tanh(self.shared(torch.tanh(h))).mean(1))[:, :3]


def convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 24, 1), nn.Tanh(), nn.Conv1d(24, 24, 1, groups=2), nn.Flatten(), nn.Linear(72, 3))


@pytest.mark.parametrize(
    "make, shape, weights",
    [(Layers, (7, 16), {"first.weight", "flipped", "shared.weight"}), (convolutions, (2, 3), {"2.weight"})],
)
@pytest.mark.parametrize("row_bytes", [1, 2000, 1 << 30])
def test_gradients_in_tiles(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    weights: set[str],
    row_bytes: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of whole weights, of a few of their rows, and of one row or group at a time."""
    monkeypatch.setattr(plan, "TILE_BYTES", plan.TILE_ROWS * row_bytes)
    monkeypatch.setattr(plan, "BLOCK_ROWS", 4)
    torch.manual_seed(0)
    model = make().double()
    x1, x2 = torch.randn(9, *shape, dtype=torch.float64), torch.randn(8, *shape, dtype=torch.float64)
    methods = {row.parameters[0]: row.method for row in fw.ntk.explain(model, x1, x2, compute="trace").rows}
    assert {name for name, method in methods.items() if method == "tiles"} == weights
    left, right = jacobian(model, x1), jacobian(model, x2)
    expected = torch.einsum("nap,mbp->nmab", left, right)
    for compute, part in [
        ("full", expected),
        ("diagonal", expected.diagonal(dim1=2, dim2=3)),
        ("trace", expected.diagonal(dim1=2, dim2=3).sum(2)),
    ]:
        found = fw.ntk.empirical_ntk(model, x1, x2, compute=compute)
        torch.testing.assert_close(found, part, rtol=1e-12, atol=1e-12)
    symmetric = fw.ntk.empirical_ntk(model, x1)
    torch.testing.assert_close(symmetric, torch.einsum("nap,mbp->nmab", left, left), rtol=1e-12, atol=1e-12)
    assert torch.equal(symmetric, symmetric.permute(1, 0, 3, 2))
    least = _least_budget(model, x1)
    assert torch.equal(fw.ntk.empirical_ntk(model, x1, memory_budget=least), symmetric)


def _least_budget(model: nn.Module, x: Tensor) -> int:
    with pytest.raises(ValueError, match=r"memory_budget must be at least (\d+) bytes") as caught:
        fw.ntk.empirical_ntk(model, x, memory_budget=1)
    return int(str(caught.value).split()[5])


def test_a_block_holds_more_rows_without_convolutions() -> None:
    """A row of these touches some megabytes: far fewer rows than 64 MiB hold by a model's calls, and 32 without."""
    dense = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 784))
    assert fw.ntk.explain(dense, torch.randn(40, 4), compute="trace").block_rows == 32
    convolution = nn.Sequential(nn.Conv2d(1, 8, 3), nn.Flatten(), nn.Linear(8 * 26 * 26, 64))
    assert fw.ntk.explain(convolution, torch.randn(40, 1, 28, 28), compute="trace").block_rows == 16


def test_few_rows_of_both_batches_take_one_sweep() -> None:
    """Up to 32 rows that touch no more than 256 MiB; one row more, or wider rows, go in blocks of their own."""
    cpu = torch.device("cpu")
    megabytes = 4 << 20
    uses: Any = [SimpleNamespace(kind="conv")]
    assert plan.block_rows(megabytes, uses, cpu, 25) == 32
    assert plan.block_rows(megabytes, uses, cpu, 33) == 16
    assert plan.block_rows(3 * megabytes, uses, cpu, 25) == 16
    assert plan.block_rows(1000 * megabytes, uses, cpu, 2) == 1
