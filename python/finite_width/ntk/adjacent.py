"""Jacobians of adjacent blocks of rows stand in one array, so that one product serves all of them.

A sweep's block can be a few rows where a row passes through a layer at many positions. Products of a few Jacobians with
a few others read more than they compute: 8 rows by 8 read 2 · 8 · P values for 2 · 64 · P operations. Every element
of the kernels' products has the same bits in a large product as in a small one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor

from .._library import has_kernels
from .contract import Batch, Target
from .factors import Factor, Jacobian
from .plan import Plan
from .sweep import collect

Cut = tuple[int, int]


def collect_blocks(
    target: Target,
    plan: Plan,
    batch: Batch,
    blocks: Sequence[Cut],
    check: bool = False,
    advance: Callable[[int], Any] = lambda count: None,
) -> list[list[Factor]]:
    """The factors of every block, Jacobians in one array for each entry of the plan.

    Kept among what a sweep allocates and frees, they would also break up the heap.

    Args:
        check: compare the outputs with those of the rows that the plan was made from, where a block begins with them.
        advance: is told of every finished block.
    """
    arrays: dict[int, Tensor] = {}
    first, last = blocks[0][0], blocks[-1][1]
    found = []
    for begin, end in blocks:
        factors = collect(target, plan, batch, begin, end, check and begin == 0)
        for entry, factor in enumerate(factors):
            if not isinstance(factor, Jacobian):
                continue
            if len(blocks) == 1:  # an array of its own
                factors[entry] = Jacobian(factor.j, factor.j)
                continue
            if entry not in arrays:
                arrays[entry] = factor.j.new_empty(last - first, *factor.j.shape[1:])
            place = arrays[entry][begin - first : end - first]
            place.copy_(factor.j)
            factors[entry] = Jacobian(place, arrays[entry], begin - first)
        found.append(factors)
        advance(1)
    return found


def joined(
    places: Sequence[tuple[Cut, Cut]], lefts: Sequence[Factor], rights: Sequence[Factor]
) -> Iterator[tuple[Cut, Cut, Any, Any]]:
    """The products of an entry: rows and columns of the kernel, and the factors whose product is added there.

    Pairs of blocks that fill a rectangle of two arrays, or of one array the upper triangle, are one product.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for index, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        arrays = [factor.array for factor in (left, right) if isinstance(factor, Jacobian) and factor.array is not None]
        together = has_kernels() and len(arrays) == 2 and arrays[0].device.type == "cpu"
        groups.setdefault(tuple(map(id, arrays)) if together else (index,), []).append(index)
    for group in groups.values():
        one = _one_product([(places[index], lefts[index], rights[index]) for index in group]) if group[1:] else None
        if one is not None:
            yield one
            continue
        for index in group:
            yield *places[index], lefts[index], rights[index]


def _one_product(pairs: Sequence[tuple[tuple[Cut, Cut], Any, Any]]) -> tuple[Cut, Cut, Jacobian, Jacobian] | None:
    """The product that all pairs of blocks of two arrays make together; None where they fill no whole tile."""
    (rows, columns), left, right = pairs[0]
    top, side = rows[0] - left.begin, columns[0] - right.begin  # where the arrays' first rows stand in the kernel
    spans = [[(place[axis][0], place[axis][1]) for place, _, _ in pairs] for axis in (0, 1)]
    cuts = [(min(begin for begin, _ in span), max(end for _, end in span)) for span in spans]
    area = sum((row[1] - row[0]) * (column[1] - column[0]) for (row, column), _, _ in pairs)
    whole = (cuts[0][1] - cuts[0][0]) * (cuts[1][1] - cuts[1][0])
    if left.array is right.array:  # the triangle: what lies above the blocks on the diagonal stands for what lies below
        area += sum(
            (row[1] - row[0]) * (column[1] - column[0])
            for (row, column), mine, theirs in pairs
            if mine.begin < theirs.begin
        )
    if area != whole:
        return None
    (r0, r1), (c0, c1) = cuts
    one = Jacobian(left.array[r0 - top : r1 - top])
    return cuts[0], cuts[1], one, Jacobian(right.array[c0 - side : c1 - side])
