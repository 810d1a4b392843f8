"""Where the rows of the batch lie in a tensor inside the model: on an axis of their own, or merged with others."""

from __future__ import annotations

from collections.abc import Sequence

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


def confined(delta: Tensor, layout: Layout, rows: int, chosen: int, must_reach: bool) -> bool:
    """Whether a cotangent on the first `chosen` rows of the output reached these rows alone.

    Args:
        must_reach: demand that each of the chosen rows has a nonzero entry, which tells apart layouts that the
            shape alone admits.
    """
    arranged = by_rows(delta, layout, rows).reshape(rows, -1)
    nonzero = (arranged != 0).any(1).tolist()
    return not any(nonzero[chosen:]) and (not must_reach or all(nonzero[:chosen]))
