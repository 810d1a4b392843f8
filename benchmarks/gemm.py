"""The shared matrix product against torch.mm and oneDNN, square and skinny, for the table in _gemm/table.py."""

from __future__ import annotations

from collections.abc import Callable

import torch

from finite_width._gemm import gemm
from harness import Case

SQUARE = [(size, size, size) for size in (256, 512, 1024, 2048, 4096)]
SKINNY = [
    shape
    for size in (256, 1024, 4096)
    for thin in (1, 2, 4, 10, 32)
    for shape in ((thin, size, size), (size, thin, size), (size, size, thin))
]
OTHERS = [(128, 128, 3072), (1280, 1280, 1024), (20000, 9, 32), (32, 32, 32)]


def _case(rows: int, columns: int, inner: int) -> Case:
    """x @ weight.T, the product of F.linear: torch.mm and oneDNN read the same two row-major matrices."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, inner, generator=generator)
    weight = torch.randn(columns, inner, generator=generator)
    calls = {"finite-width": lambda: gemm(x, weight.t()), "torch.mm": lambda: torch.mm(x, weight.t())}
    if torch.backends.mkldnn.is_available():
        calls["oneDNN"] = lambda: torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    return Case(
        name=f"{rows}x{columns}x{inner}",
        what=f"[{rows}, {inner}] @ [{columns}, {inner}].T, float32",
        implementations=calls,
        baseline="torch.mm",
        exact=lambda: x.double() @ weight.t().double(),
        flops=2.0 * rows * columns * inner,
        bytes=4.0 * (rows * inner + inner * columns + rows * columns),
        targets={("finite-width", "torch.mm"): 1.0},
        seconds=0.3,
        limit=5.0,
        memory=False,
    )


CASES: dict[str, Callable[[], Case]] = {
    f"{rows}x{columns}x{inner}": lambda shape=(rows, columns, inner): _case(*shape)
    for rows, columns, inner in [*SQUARE, *SKINNY, *OTHERS]
}
