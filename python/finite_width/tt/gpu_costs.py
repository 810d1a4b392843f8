"""What the ways to compute a Tensor-Train product cost on a GPU, for the planner.

The constants are an H200's from its datasheet, scaled by what such kernels usually reach: reckoned, none of them
measured. They decide between the fused halves, the dense W and chains in plain torch; they predict no times.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

# Multiply-adds per nanosecond of the fused kernels, by kind (csrc/tt/sandwich.cuh).
FUSED_RATES = {"half": 330_000.0, "ieee": 13_000.0, "split": 55_000.0, "tf32": 165_000.0, "float64": 7_000.0}
# Of torch's own products; float32 without TF32.
TORCH_RATES = {"half": 350_000.0, "ieee": 28_000.0, "split": 28_000.0, "tf32": 28_000.0, "float64": 28_000.0}
BANDWIDTH = 4_000.0  # bytes per nanosecond
LAUNCH = 5_000.0  # nanoseconds for a kernel, its start included
MULTIPROCESSORS = 132

KINDS = tuple(FUSED_RATES)
Shape = tuple[int, int, int, int]


def itemsize(kind: str) -> int:
    """Bytes of a value."""
    return {"half": 2, "float64": 8}.get(kind, 4)


def _sandwich(kind: str, fixed: int, streamed: int, rows: int, inner: int, middle: int, columns: int) -> float:
    """Nanoseconds of out_f = Σ_t L_t X_f Y_t, with the padding of tiles and the multiprocessors that stay idle."""
    if kind == "half":
        side = 32 if inner <= 32 and middle <= 32 else 64
        across = 32 if columns <= 32 else 64
        multiple = side
    else:
        side, across, multiple = (32, 32, 16) if kind == "float64" else (64, 64, 16)
    parts = -(-inner // side)  # each makes the second product again
    tall, wide = -(-rows // 32), -(-columns // across)
    padded = [-(-size // multiple) * multiple for size in (inner, middle)]
    columns_padded = -(-columns // (across if kind == "half" else 16)) * (across if kind == "half" else 16)
    adds = float(fixed * streamed) * tall * 32 * padded[1] * (wide * padded[0] + parts * columns_padded)
    blocks = tall * wide * -(-fixed // 8) * max(1, min(256, streamed // 64) if streamed > fixed else 1)
    return adds / FUSED_RATES[kind] * max(1.0, MULTIPROCESSORS / blocks)


def fused(shapes: Sequence[Shape], split: int, left_first: bool, batch: int, kind: str) -> float:
    """Nanoseconds of the fused halves, all three passes, with their launches."""
    left, right = shapes[:split], shapes[split:]
    m1, n1 = prod(s[1] for s in left), prod(s[2] for s in left)
    m2, n2 = prod(s[1] for s in right), prod(s[2] for s in right)
    rank, count = right[0][0], len(shapes)
    i, s, q, j = (n1, m1, m2, n2) if left_first else (m1, n1, n2, m2)  # csrc/tt/halves.h
    up = _sandwich(kind, batch, rank, j, q, s, i)
    down = _sandwich(kind, batch, rank, s, i, j, q)
    of_a = _sandwich(kind, rank, batch, s, q, j, i)
    of_b = _sandwich(kind, rank, batch, j, i, s, q)
    size = itemsize(kind)
    traffic = size * float(batch) * (m1 * m2 + n1 * n2) / BANDWIDTH  # of one pass
    forward = max(down if left_first else up, traffic) + LAUNCH * (1 + count // 2)
    input_grad = max(up if left_first else down, traffic)
    backward = input_grad + max(of_a, traffic) + max(of_b, traffic) + LAUNCH * (7 + 2 * count)
    return forward + backward


def dense(shapes: Sequence[Shape], batch: int, kind: str) -> float:
    """Nanoseconds of building W in float32 and multiplying with it, all three passes, in torch's products."""
    rows, columns, rank = prod(s[1] for s in shapes), prod(s[2] for s in shapes), max(s[0] for s in shapes)
    size = itemsize(kind)
    products = 3.0 * max(
        float(batch) * rows * columns / TORCH_RATES[kind], size * float(batch) * (rows + columns) / BANDWIDTH
    )
    build = 3.0 * rank * rows * columns / TORCH_RATES["ieee"] + 16.0 * rows * columns / BANDWIDTH
    return products + build + LAUNCH * (3 + 10 * len(shapes))
