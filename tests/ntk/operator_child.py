"""A rank that solves with an operator shared by all ranks: torchrun operator_child.py FILE MODE...

Its results go to FILE-MODE-RANK. In the mode "differ" rank 1 has other data than the rest, in
"targets" other targets, and in "memory" less free memory than the solver's dense route takes.
"""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any
from unittest import mock

import torch
from torch import nn

import finite_width as fw

ROWS, BLOCK = 83, 4


def solve(mode: str) -> tuple[torch.Tensor, int, int]:
    """The coefficients, the iterations, and how many rows this rank has pushed through the network."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    x, y = torch.randn(ROWS, 6), torch.randn(3 * ROWS, 2, dtype=torch.float64)
    if mode == "differ" and os.environ.get("RANK") == "1":
        x[3] += 1
    if mode == "targets" and os.environ.get("RANK") == "1":
        y = 2 * y
    solver = importlib.import_module("finite_width.ntk.solve")
    free = (lambda _: 0) if mode == "memory" and os.environ.get("RANK") == "1" else solver.free_memory
    products = importlib.import_module("finite_width.ntk.products").Products
    push, pushed = products.push, []

    def counted(self: Any, batch: Any, begin: int, end: int, vectors: Any) -> Any:
        pushed.append(end - begin)
        return push(self, batch, begin, end, vectors)

    with (
        mock.patch.object(importlib.import_module("finite_width.ntk.plan"), "BLOCK_ROWS", BLOCK),
        mock.patch.object(products, "push", counted),
        mock.patch.object(solver, "free_memory", free),
        mock.patch.object(solver, "SMALL", 0),
    ):
        operator = fw.ntk.NTKOperator(model, x)
        pushed.clear()
        method = "auto" if mode == "memory" else "cg"
        found = fw.ntk.solve(operator, y, ridge=0.5, method=method, tol=1e-4, rank=8)
    return found.coefficients, found.iterations, sum(pushed)


if __name__ == "__main__":
    for each in sys.argv[2:]:
        torch.save(solve(each), f"{sys.argv[1]}-{each}-{os.environ['RANK']}")
