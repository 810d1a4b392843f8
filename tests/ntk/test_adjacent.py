"""Jacobians of adjacent blocks multiplied as one: one product where they fill a tile, with the bits of the blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import finite_width as fw
from finite_width.ntk import ops
from finite_width.ntk.adjacent import joined
from finite_width.ntk.factors import Factor, Jacobian

CUTS = [(0, 3), (3, 6), (6, 8)]


def blocks(rows: int = 8) -> list[Jacobian]:
    array = torch.randn(rows, 2, 1037)
    return [Jacobian(array[begin:end], array, begin) for begin, end in CUTS]


def product_sum(
    places: list[tuple[tuple[int, int], tuple[int, int]]], lefts: list[Factor], rights: list[Factor], compute: str
) -> tuple[int, Tensor, Tensor]:
    """The number of joined products, their kernel, and the kernel block by block; all at (10, 20) of a larger one."""
    moved = [((row[0] + 10, row[1] + 10), (column[0] + 20, column[1] + 20)) for row, column in places]
    products = list(joined(moved, lefts, rights))
    kernels = []
    for each in (products, [(*place, *pair) for place, *pair in zip(moved, lefts, rights, strict=True)]):
        kernel = torch.zeros(40, 40, *([2, 2] if compute == "full" else []))
        for (top, bottom), (begin, end), left, right in each:
            ops.jacobian_accumulate(kernel[top:bottom, begin:end], left.j, right.j, compute)
        kernels.append(kernel)
    return len(products), *kernels


@pytest.mark.parametrize("compute", ["full", "trace"])
def test_a_rectangle_is_one_product_with_the_bits_of_its_blocks(compute: str) -> None:
    torch.manual_seed(0)
    mine, theirs = blocks(), blocks()
    pairs = [(i, j) for j in range(3) for i in range(3)]
    count, together, apart = product_sum(
        [(CUTS[i], CUTS[j]) for i, j in pairs], [mine[i] for i, _ in pairs], [theirs[j] for _, j in pairs], compute
    )
    assert count == (1 if fw.has_kernels() else 9)
    assert torch.equal(together, apart)
    assert together[10:18, 20:28].abs().min() > 0


@pytest.mark.parametrize("compute", ["full", "trace"])
def test_the_upper_triangle_of_one_array_is_one_product(compute: str) -> None:
    torch.manual_seed(0)
    mine = blocks()
    pairs = [(i, j) for j in range(3) for i in range(j + 1)]
    count, together, apart = product_sum(
        [(CUTS[i], CUTS[j]) for i, j in pairs], [mine[i] for i, _ in pairs], [mine[j] for _, j in pairs], compute
    )
    assert count == (1 if fw.has_kernels() else 6)
    for (top, bottom), (begin, end) in [(CUTS[i], CUTS[j]) for i, j in pairs]:
        where = slice(top + 10, bottom + 10), slice(begin + 20, end + 20)
        assert torch.equal(together[where], apart[where])


def test_what_fills_no_tile_stays_apart() -> None:
    torch.manual_seed(0)
    mine, theirs = blocks(), blocks()
    for pairs in ([(0, 0), (1, 1)], [(0, 0), (0, 1), (1, 0)]):
        places = [(CUTS[i], CUTS[j]) for i, j in pairs]
        lefts, rights = [mine[i] for i, _ in pairs], [theirs[j] for _, j in pairs]
        count, together, apart = product_sum(places, list(lefts), list(rights), "trace")
        assert count == len(pairs)
        assert torch.equal(together, apart)


def test_blocks_of_their_own_stay_apart() -> None:
    torch.manual_seed(0)
    lefts, rights = [Jacobian(torch.randn(3, 2, 50))] * 2, [Jacobian(torch.randn(3, 2, 50)) for _ in range(2)]
    count, together, apart = product_sum([(CUTS[0], CUTS[0]), (CUTS[0], CUTS[1])], list(lefts), list(rights), "trace")
    assert count == 2
    assert torch.equal(together, apart)
