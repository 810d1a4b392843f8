"""Where the rows of the batch lie in a tensor inside the model: on an axis of their own, or merged with others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Layout(NamedTuple):
    """The rows lie on one axis, [before, rows, after] flattened: alone there, or merged with other axes."""

    axis: int
    before: int = 1
    after: int = 1

    @property
    def merged(self) -> bool:
        return self.before * self.after > 1


def candidates(shape: Sequence[int], rows: int, axes: Sequence[int]) -> list[Layout]:
    """The layouts that the shape admits, the likeliest first; `axes` may hold the rows."""
    alone = [Layout(axis) for axis in axes if shape[axis] == rows]
    merged = []
    for axis in axes:
        times, rest = divmod(shape[axis], rows)
        if times > 1 and rest == 0:
            divisors = [number for number in range(2, times) if times % number == 0]
            merged += [Layout(axis, before, times // before) for before in (1, times, *divisors)]
    return alone + merged


def by_rows(value: Tensor, layout: Layout, rows: int, first: int = 0) -> Tensor:
    """The tensor, whose own shape begins at axis `first`, with the rows as axis `first`.

    An axis of the rows alone moves to the front; of a merged one the other entries, before and after, stay in place.
    """
    value, axis = _rows_first(value, layout, rows, first), layout.axis + first
    return value.flatten(axis + 1, axis + 2) if layout.merged else value


def _rows_first(value: Tensor, layout: Layout, rows: int, first: int = 0) -> Tensor:
    """`by_rows`, but a view in any case: of a merged axis, what stands before and after stays apart."""
    axis, before, after = layout
    axis += first
    if layout.merged:
        return value.unflatten(axis, (before, rows, after)).movedim(axis + 1, first)
    return value.movedim(axis, first) if axis != first else value


def row_shape(shape: Sequence[int], layout: Layout, rows: int) -> tuple[int, ...] | None:
    """The shape of what the layout gives one row; None where the tensor does not hold `rows` of them."""
    axis, before, after = layout
    if shape[axis] != before * rows * after:
        return None
    return (*shape[:axis], *([before * after] if layout.merged else []), *shape[axis + 1 :])


def multiplied_by_rows(first: Tensor, second: Tensor, layout: Layout, factors: Tensor, tolerance: float = 0.0) -> bool:
    """Whether `second` is `first` with each row's part multiplied by that row's factor.

    That is what cotangents give that differ by these factors, where every part depends on its own row alone. Other
    rows, rows in another order and parts of unequal length show as another factor.

    Args:
        factors: [rows], powers of two where the tolerance is 0: then a product has no rounding.
        tolerance: relative to each part's norm; what is rounding beside the largest part counts as nothing.
    """
    rows = len(factors)
    one, two = (_rows_first(value, layout, rows) for value in (first, second))
    expected = one * factors.reshape(-1, *[1] * (one.dim() - 1))
    if tolerance == 0:
        if torch.equal(expected, two):
            return True
        nowhere = expected.isnan()
        return bool(nowhere.any()) and bool(((expected == two) | (nowhere & two.isnan())).all())
    expected, two = (torch.nan_to_num(value, 0, 0, 0).reshape(rows, -1) for value in (expected, two))
    norms = expected.norm(dim=1)
    nothing = 64 * torch.finfo(norms.dtype).eps * norms.max()
    return bool(((expected - two).norm(dim=1) <= tolerance * norms + nothing).all())


def confined(delta: Tensor, layout: Layout, rows: int, row: int) -> bool:
    """Whether a cotangent on one row of the output reached that row's part alone (0 times infinity is no reach)."""
    arranged = _rows_first(delta, layout, rows).flatten(1)
    reached = ((arranged != 0) & ~arranged.isnan()).any(1).tolist()
    return not any(value for other, value in enumerate(reached) if other != row)


def rows_reached(delta: Tensor, layout: Layout, rows: int) -> int:
    """How many rows' parts have a nonzero entry."""
    return sum(bool(part.any()) for part in _rows_first(delta, layout, rows))
