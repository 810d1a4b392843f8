"""Where the rows of the batch lie in a tensor inside the model: on an axis of their own, or merged with others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# ("axis", k): axis k has one entry per row. ("outer", 0) and ("inner", 0): axis 0 has T entries per row, the entries
# of one row adjacent (outer) or `rows` apart (inner).
Layout = tuple[str, int]


def candidates(shape: Sequence[int], rows: int, axes: Sequence[int]) -> list[Layout]:
    """The layouts that the shape admits, the likeliest first; `axes` may hold the rows."""
    found: list[Layout] = [("axis", axis) for axis in axes if shape[axis] == rows]
    if 0 in axes and shape[0] != rows and shape[0] and shape[0] % rows == 0:
        found += [("outer", 0), ("inner", 0)]
    return found


def by_rows(value: Tensor, layout: Layout, rows: int, first: int = 0) -> Tensor:
    """The tensor, whose own shape begins at axis `first`, with the rows as axis `first` and T entries merged behind.

    An axis of the rows alone moves to the front; a merged axis becomes [rows, T].
    """
    kind, axis = layout
    if kind == "axis":
        return value.movedim(first + axis, first) if axis else value
    if kind == "outer":
        return value.unflatten(first, (rows, -1))
    return value.unflatten(first, (-1, rows)).transpose(first, first + 1)


def row_shape(shape: Sequence[int], layout: Layout, rows: int) -> tuple[int, ...] | None:
    """The shape of what the layout gives one row; None where the tensor does not hold `rows` of them."""
    kind, axis = layout
    if kind == "axis":
        return (*shape[:axis], *shape[axis + 1 :]) if shape[axis] == rows else None
    return (shape[0] // rows, *shape[1:]) if shape[0] % rows == 0 else None


def multiplied_by_rows(first: Tensor, second: Tensor, layout: Layout, factors: Tensor, tolerance: float = 0.0) -> bool:
    """Whether `second` is `first` with each row's part multiplied by that row's factor.

    That is what cotangents give that differ by these factors, where every part depends on its own row alone. Other
    rows, rows in another order and parts of unequal length show as another factor.

    Args:
        factors: [rows], powers of two where the tolerance is 0: then a product has no rounding.
        tolerance: relative to each part's norm.
    """
    rows = len(factors)
    one, two = (by_rows(value, layout, rows).reshape(rows, -1) for value in (first, second))
    expected = one * factors[:, None]
    if tolerance == 0:
        return bool(((expected == two) | (expected.isnan() & two.isnan())).all())
    expected, two = (torch.nan_to_num(value, 0, 0, 0) for value in (expected, two))
    return bool(((expected - two).norm(dim=1) <= tolerance * expected.norm(dim=1)).all())


def confined(delta: Tensor, layout: Layout, rows: int, row: int) -> bool:
    """Whether a cotangent on one row of the output reached that row's part alone."""
    arranged = by_rows(delta, layout, rows).reshape(rows, -1)
    return not any(reached for other, reached in enumerate((arranged != 0).any(1).tolist()) if other != row)


def rows_reached(delta: Tensor, layout: Layout, rows: int) -> int:
    """How many rows' parts have a nonzero entry."""
    return int((by_rows(delta, layout, rows).reshape(rows, -1) != 0).any(1).sum())
