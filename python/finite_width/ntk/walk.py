"""The walk over the tiles of a kernel: whose factors are computed when, held, multiplied and mirrored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .._library import has_kernel, has_kernels
from .adjacent import collect_blocks, joined
from .contract import Batch
from .factors import Factor, Tiled
from .plan import Plan
from .problem import Problem, progress_bar
from .sweep import collect

# Rows of a sub-tile on the diagonal of a symmetric kernel without compiled kernels: only the upper half is computed.
DIAGONAL_TILE = 64
# Rows that are mirrored at once on a GPU: each costs a handful of launches.
GPU_MIRRORED = 512


class Walk:
    """Walks over the tiles of the kernel, holding as many blocks' factors as the budget allows."""

    def __init__(self, problem: Problem, plan: Plan, kernels: list[Tensor]) -> None:
        self.problem, self.plan = problem, plan
        self.kernels = kernels  # one per entry of the plan; the same tensor for all when they are summed
        self.left, self.right = problem.blocks(plan)

    def sweeps(self, held: int) -> int:
        """How many blocks are computed in all."""
        if self.problem.symmetric:
            chunks = range(0, len(self.left), held)
            return sum(len(self.left) - first for first in chunks)
        if self.problem.in_one_sweep(self.plan):
            return 1
        chunks_count = -(-len(self.left) // held)
        resident = len(self.left) + len(self.right) <= held + 1
        return len(self.left) + len(self.right) * (1 if resident else chunks_count)

    def run(self, held: int) -> None:
        with progress_bar(self.problem.progress, self.sweeps(held), "empirical NTK") as advance:
            if self.problem.in_one_sweep(self.plan):
                one, other = self._collect_both(advance)
                self._add([(self.left[0], self.right[0])], [one], [other])
                return
            resident = len(self.left) + len(self.right) <= held + 1
            for first in range(0, len(self.left), held):
                rows = self.left[first : first + held]
                mine = self._collect(self.problem.left, rows, advance)
                if self.problem.symmetric:
                    pairs = [(row, column) for column in range(len(rows)) for row in range(column + 1)]
                    places = [(rows[row], rows[column]) for row, column in pairs]
                    self._add(places, [mine[row] for row, _ in pairs], [mine[column] for _, column in pairs])
                    others = [[block] for block in self.right[first + held :]]
                else:
                    others = [self.right] if resident else [[block] for block in self.right]
                for columns in others:
                    theirs = self._collect(self.problem.right, columns, advance)
                    places = [(row, column) for row in rows for column in columns]
                    self._add(places, [own for own in mine for _ in columns], theirs * len(rows))
                    del theirs  # before the next sweep
                del mine
        if self.problem.symmetric:
            # The kernels leave the blocks on the diagonal exactly symmetric, except where they sum over positions.
            in_force = has_kernel("ntk_jacobian_accumulate", self.problem.target.device)
            done = in_force and all(entry.method not in ("ghost", "tokens") for entry in self.plan.entries)
            for kernel in {id(kernel): kernel for kernel in self.kernels}.values():
                mirror(kernel, self.left, self.problem.compute, done)

    def _collect(
        self, batch: Batch, blocks: list[tuple[int, int]], advance: Callable[[int], Any]
    ) -> list[list[Factor]]:
        check = self.problem.check and batch is self.problem.probed
        return collect_blocks(self.problem.target, self.plan, batch, blocks, check, advance)

    def _collect_both(self, advance: Callable[[int], Any]) -> tuple[list[Factor], list[Factor]]:
        """The factors of the left and the right batch, by one sweep over the rows of both; the probed ones first."""
        problem, first = self.problem, self.problem.probed
        left_first = first is problem.left
        batch = Batch.together(first, problem.right if left_first else problem.left)
        factors = collect(problem.target, self.plan, batch, 0, batch.rows, problem.check)
        advance(1)
        top = [factor.rows(0, first.rows) for factor in factors]
        rest = [factor.rows(first.rows, batch.rows) for factor in factors]
        return (top, rest) if left_first else (rest, top)

    def _add(
        self,
        places: list[tuple[tuple[int, int], tuple[int, int]]],
        lefts: list[list[Factor]],
        rights: list[list[Factor]],
    ) -> None:
        """Add every entry's product to the tiles, a tiled Jacobian tile by tile."""
        for entry, kernel in enumerate(self.kernels):
            first = lefts[0][entry]
            products = list(joined(places, [left[entry] for left in lefts], [right[entry] for right in rights]))
            for index in range(len(first.cuts) - 1 if isinstance(first, Tiled) else 1):
                made: dict[int, Factor] = {}

                def factor(source: Factor, index: int = index, made: dict[int, Factor] = made) -> Factor:
                    if not isinstance(source, Tiled):
                        return source
                    if id(source) not in made:
                        made[id(source)] = source.tile(index)
                    return made[id(source)]

                for row, column, left, right in products:
                    self._accumulate(kernel, row, column, factor(left), factor(right))

    def _accumulate(self, kernel: Tensor, row: tuple[int, int], column: tuple[int, int], left: Any, right: Any) -> None:
        compute = self.problem.compute
        if left is not right or has_kernels():  # a kernel sees that both sides are one, and computes half
            left.accumulate(kernel[row[0] : row[1], column[0] : column[1]], right, compute)
            return
        count = row[1] - row[0]
        cuts = [(begin, min(begin + DIAGONAL_TILE, count)) for begin in range(0, count, DIAGONAL_TILE)]
        slices = [left.rows(*cut) for cut in cuts] if len(cuts) > 1 else [left]
        for i, (top, bottom) in enumerate(cuts):
            for j in range(i, len(cuts)):
                begin, end = cuts[j]
                out = kernel[row[0] + top : row[0] + bottom, column[0] + begin : column[0] + end]
                slices[i].accumulate(out, slices[j], compute)

    @staticmethod
    def pair(problem: Problem, plan: Plan, begin: int, end: int) -> Tensor:
        """The entries [rows, O] where row and column are the same, of rows [begin, end) of both sides."""

        def factors(batch: Batch) -> list[Factor]:
            check = problem.check and begin == 0 and batch is problem.probed
            return collect(problem.target, plan, batch, begin, end, check)

        left = factors(problem.left)
        right = left if problem.symmetric else factors(problem.right)
        out = torch.zeros(end - begin, plan.outputs, dtype=problem.target.dtype, device=problem.target.device)
        for row in range(end - begin):
            tile = out[row : row + 1].unsqueeze(1)
            for mine, theirs in zip(left, right, strict=True):
                for one, two in zip(tiles(mine.rows(row, row + 1)), tiles(theirs.rows(row, row + 1)), strict=True):
                    one.accumulate(tile, two, "diagonal")
        return out


def tiles(factor: Factor) -> Iterator[Any]:
    """The factor, or its Jacobian tile by tile."""
    if isinstance(factor, Tiled):
        for index in range(len(factor.cuts) - 1):
            yield factor.tile(index)
    else:
        yield factor


def mirror(kernel: Tensor, blocks: list[tuple[int, int]], compute: str, blocks_done: bool = False) -> None:
    """Copy the upper half of a kernel to the lower, in place.

    Args:
        blocks_done: the blocks on the diagonal are symmetric already.
    """
    for block, end in blocks:
        if blocks_done:
            right = kernel[block:end, end:].transpose(0, 1)
            kernel[end:, block:end] = right.mT if compute == "full" else right
            continue
        rows = GPU_MIRRORED if kernel.is_cuda else DIAGONAL_TILE
        for begin in range(block, end, rows):
            _mirror_rows(kernel, begin, min(begin + rows, end), compute == "full")


def _mirror_rows(kernel: Tensor, begin: int, stop: int, full: bool) -> None:
    if stop < kernel.shape[1]:
        right = kernel[begin:stop, stop:].transpose(0, 1)
        kernel[stop:, begin:stop] = right.mT if full else right
    tile = kernel[begin:stop, begin:stop]
    count = stop - begin
    if full:
        outputs = kernel.shape[2]
        upper = tile.permute(0, 2, 1, 3).reshape(count * outputs, count * outputs)
        upper = upper.triu() + upper.triu(1).t()
        tile.copy_(upper.reshape(count, outputs, count, outputs).permute(0, 2, 1, 3))
    else:
        above = torch.ones(count, count, dtype=torch.bool, device=kernel.device).triu()
        above = above.reshape(count, count, *[1] * (kernel.dim() - 2))
        tile.copy_(torch.where(above, tile, tile.transpose(0, 1)))
