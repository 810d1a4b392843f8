"""The shared matrix product against torch.mm and oneDNN, square and skinny."""

from __future__ import annotations

from collections.abc import Callable

import torch

from finite_width._gemm import gemm
from harness import Case

SHAPES = [(256, 256, 256), (1024, 1024, 1024), (16, 4096, 1024)]


def _case(rows: int, columns: int, inner: int) -> Case:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, generator=generator)
    b = torch.randn(inner, columns, generator=generator)
    return Case(
        name=f"{rows}x{columns}x{inner}",
        what=f"[{rows}, {inner}] @ [{inner}, {columns}], float32",
        implementations={"finite-width": lambda: gemm(a, b), "torch.mm": lambda: a @ b},
        baseline="torch.mm",
        exact=lambda: a.double() @ b.double(),
        flops=2.0 * rows * columns * inner,
        bytes=4.0 * (rows * inner + inner * columns + rows * columns),
    )


CASES: dict[str, Callable[[], Case]] = {
    f"{rows}x{columns}x{inner}": lambda shape=(rows, columns, inner): _case(*shape) for rows, columns, inner in SHAPES
}
