"""Which matrix product serves which shape: decided from shapes alone and shown by `fw.build_info()`, never timed.

Measured on two Zen 5 cores (AVX-512; medians of interleaved runs on the shapes of benchmarks/gemm.py, both layouts of
B), and with FINITE_WIDTH_ISA=avx2 on one core at 512. A route must keep the house rule: the same bits for any number
of threads.
"""

from __future__ import annotations

TILE, TORCH = "tile", "torch.mm"

# (shapes, who serves them, what was measured)
TABLE: list[tuple[str, str, str]] = [
    (
        "one row or one column",
        TORCH,
        "on two Zen 5 cores with AVX-512 up to 3 times the tile's speed, up to 1.3 times slower at 4096; the same bits "
        "for 1 and 2 threads on all 360 products tried, but not the bits that these rows have in a larger product",
    ),
    (
        "everything else",
        TILE,
        "on two Zen 5 cores with AVX-512, float32 against torch.mm: 1.9 to 2.2 times as fast on squares of 256 to "
        "4096, 1.2 to 7 on 1024 and 4096 by 2 to 32 (0.85 and 0.96 on two of 32), 1.1 with AVX2; oneDNN is within 4 % "
        "on squares, and reads tall or wide operands of 64 MB up to 1.5 times as fast. Below 2¹⁷ multiply-adds "
        "torch.mm can be twice as fast, but its bits changed with the number of threads on 96 of 1978 such products. "
        "The bits of an element depend on its row, its column and the instruction set alone",
    ),
]


def route(rows: int, columns: int) -> str:
    """Who computes a product with so many rows and columns.

    Example:
        >>> from finite_width._gemm import table
        >>> table.route(1, 1000), table.route(128, 1000)
        ('torch.mm', 'tile')
    """
    return TORCH if rows == 1 or columns == 1 else TILE


def as_text() -> dict[str, str]:
    """The table as `build_info()` shows it: shapes -> who serves them, and what was measured."""
    return {shapes: f"{server} ({measured})" for shapes, server, measured in TABLE}
