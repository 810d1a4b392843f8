"""The kernel tile by tile into an array outside memory: on one rank or many, and again from where a run stopped."""

from __future__ import annotations

import ctypes
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._interrupts import ends_its_contexts
from .adjacent import collect_blocks
from .capture import PlanMismatchError
from .contract import preserved
from .destination import Destination, Layout, PlainArray, Region, destination
from .factors import Factor
from .fingerprint import fingerprint
from .plan import Plan
from .problem import Problem, free_memory
from .ranks import Ranks, job
from .walk import Walk, mirror

# A tile has at least this many rows and columns, unless that takes more than TILE_BYTES.
TILE_ROWS = 512
TILE_BYTES = 64 << 20

Tile = tuple[int, int]


class Grid:
    """The tiles of a kernel. They depend on shapes alone, so that every run and every rank computes the same bits."""

    def __init__(self, problem: Problem, plan: Plan) -> None:
        sizes = problem.sizes
        products = {"full": plan.outputs**2, "diagonal": plan.outputs, "trace": 1}[problem.compute]
        self.value_bytes = products * sizes.itemsize
        # Of rows that are cheap to sweep a block may be more than a tile that is to be stored soon.
        self.block = plan.block if problem.target.device.type == "cuda" else min(plan.block, TILE_ROWS)
        edge = self.block
        while edge < TILE_ROWS and 4 * edge**2 * self.value_bytes <= TILE_BYTES:
            edge *= 2
        self.edge = edge
        while edge > 1 and edge**2 * self.value_bytes > TILE_BYTES:
            edge //= 2
        trailing = {"full": [plan.outputs] * 2, "diagonal": [plan.outputs], "trace": []}[problem.compute]
        shape = (problem.left.rows, problem.right.rows, *trailing)
        self.layout = Layout(shape, problem.target.dtype, edge)
        self.symmetric = problem.symmetric
        self.rows, self.columns = (-(-size // self.edge) for size in shape[:2])

    def tiles(self) -> list[Tile]:
        """All tiles that are computed; those below the diagonal of a symmetric kernel are mirrored."""
        first = (lambda row: row) if self.symmetric else (lambda row: 0)
        return [(row, column) for row in range(self.rows) for column in range(first(row), self.columns)]

    def cut(self, side: int, index: int) -> tuple[int, int]:
        return index * self.edge, min((index + 1) * self.edge, self.layout.shape[side])

    def region(self, tile: Tile) -> Region:
        return slice(*self.cut(0, tile[0])), slice(*self.cut(1, tile[1]))

    def blocks(self, side: int, index: int) -> list[tuple[int, int]]:
        """The row blocks of a tile row."""
        begin, end = self.cut(side, index)
        return [(start, min(start + self.block, end)) for start in range(begin, end, self.block)]

    def pairs(self, tile: Tile) -> float:
        """Pairs of rows that are computed for a tile: its cost, up to the sweeps."""
        rows, columns = (part.stop - part.start for part in self.region(tile))
        return rows * (rows + 1) / 2 if self.symmetric and tile[0] == tile[1] else rows * columns

    @property
    def tile_bytes(self) -> int:
        return math.prod(min(self.edge, size) for size in self.layout.shape[:2]) * self.value_bytes


@dataclass
class Job:
    """The tiles of one column, against rows whose factors are held."""

    group: int
    column: int
    rows: list[int]


def schedule(grid: Grid, missing: list[Tile], held: int, ranks: int, sweep: float) -> list[list[Job]]:
    """The jobs of each rank: stretches of equal cost of the walk over groups of `held` tile rows and their columns.

    Args:
        sweep: what computing the factors of one row costs, in pairs of rows.
    """
    by_job: dict[tuple[int, int], list[int]] = {}
    for row, column in missing:
        by_job.setdefault((row // held, column), []).append(row)
    jobs = [Job(group, column, rows) for (group, column), rows in sorted(by_job.items())]
    costs = [
        sum(grid.pairs((row, each.column)) for row in each.rows) + sweep * np.subtract(*grid.cut(1, each.column)[::-1])
        for each in jobs
    ]
    total, done = sum(costs), 0.0
    shares: list[list[Job]] = [[] for _ in range(ranks)]
    for each, cost in zip(jobs, costs, strict=True):
        shares[min(ranks - 1, int((done + cost / 2) / total * ranks))].append(each)
        done += cost
    return shares


class Stream:
    """One rank's part of the work."""

    def __init__(self, problem: Problem, plan: Plan, grid: Grid, to: Destination) -> None:
        self.problem, self.plan, self.grid, self.to = problem, plan, grid, to
        self.finished = 0

    def run(self, jobs: list[Job], advance: Callable[[int], Any]) -> None:
        """Compute and write the jobs; the tiles of one are written while the next is computed."""
        writing: Future[None] | None = None
        rows: dict[int, list[list[Factor]]] = {}
        with ThreadPoolExecutor(1) as writer:
            try:
                for index, each in enumerate(jobs):
                    if index == 0 or each.group != jobs[index - 1].group:
                        rows = {}
                    for row in each.rows:
                        if row not in rows:
                            rows[row] = self._factors(0, row)
                    tiles = self._compute(each, rows)
                    if writing is not None:
                        writing.result()
                    writing = writer.submit(self._write, tiles, advance)
                    del tiles
            finally:
                if writing is not None:
                    writing.result()

    def _factors(self, side: int, index: int) -> list[list[Factor]]:
        """The factors of every block of a tile row."""
        problem = self.problem
        batch = problem.left if side == 0 else problem.right
        check = problem.check and batch is problem.probed
        return collect_blocks(problem.target, self.plan, batch, self.grid.blocks(side, index), check)

    def _compute(self, each: Job, rows: dict[int, list[list[Factor]]]) -> list[tuple[Tile, Tensor]]:
        """The tiles of a job. Each is the sum of the same products in the same order, whatever else is in the job."""
        grid, problem = self.grid, self.problem
        own = problem.symmetric and each.column in rows
        theirs = rows[each.column] if own else self._factors(1, each.column)
        first_column = grid.cut(1, each.column)[0]
        columns = [(begin - first_column, end - first_column) for begin, end in grid.blocks(1, each.column)]
        heights = [end - begin for begin, end in (grid.cut(0, row) for row in each.rows)]
        shape = (sum(heights), columns[-1][1], *grid.layout.shape[2:])
        panel = torch.zeros(shape, dtype=problem.target.dtype, device=problem.target.device)
        places, lefts, rights = [], [], []
        tops = [sum(heights[:place]) for place in range(len(heights))]
        for row, top in zip(each.rows, tops, strict=True):
            begin_row = grid.cut(0, row)[0]
            diagonal = problem.symmetric and row == each.column
            for place, (begin, end) in enumerate(grid.blocks(0, row)):
                for other in range(place if diagonal else 0, len(columns)):
                    places.append(((top + begin - begin_row, top + end - begin_row), columns[other]))
                    lefts.append(rows[row][place])
                    rights.append(theirs[other])
        Walk(problem, self.plan, [panel] * len(self.plan.entries))._add(places, lefts, rights)
        tiles = []
        for row, top, height in zip(each.rows, tops, heights, strict=True):
            tile = panel[top : top + height]
            if problem.symmetric and row == each.column:
                mirror(tile, columns, problem.compute)
            tiles.append(((row, each.column), tile))
        return tiles

    def _write(self, tiles: list[tuple[Tile, Tensor]], advance: Callable[[int], Any]) -> None:
        for tile, values in tiles:
            region = self.grid.region(tile)
            self.to.write(region, values)
            if self.problem.symmetric and tile[0] != tile[1]:
                turned = values.transpose(0, 1)
                self.to.write(region[::-1], turned.mT if self.problem.compute == "full" else turned)
            self.finished += 1
            advance(1)
        _give_back()


@functools.cache
def _trim() -> Any:
    """glibc's malloc_trim, where there is one."""
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps the pieces that were encoded and freed, as much as was written."""
    trim = _trim()
    if trim is not None:
        trim(0)


def held_tiles(problem: Problem, plan: Plan, grid: Grid, ranks: Ranks) -> int:
    """How many tile rows' factors are held at once.

    Raises:
        ValueError: the budget does not hold one.
    """
    rows = min(grid.edge, max(problem.left.rows, problem.right.rows))
    tile_row = rows * (plan.row_bytes + max((entry.tile_bytes for entry in plan.entries), default=0))
    working = min(grid.block, rows) * plan.sweep_bytes
    each = tile_row + 2 * grid.tile_bytes  # one panel is computed while another is written
    fixed = working + tile_row + 4 * grid.tile_bytes  # the column's factors; what the writer turns and encodes
    if problem.budget is None:
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if ranks.size > 1 else 1
        budget = free_memory(problem.target.device) // (4 * neighbours)
    else:
        budget = problem.budget
        if budget < fixed + each:
            raise ValueError(
                f"memory_budget must be at least {fixed + each} bytes here: tiles of {grid.edge} rows are streamed; "
                f"got {budget}"
            )
    most = -(-grid.rows // math.ceil(ranks.size**0.5))  # so that the ranks' parts are about square
    return int(max(1, min((budget - fixed) // each, most)))


@contextmanager
def _progress(problem: Problem, ranks: Ranks, total: int, mine: int) -> Iterator[Callable[[int], Any]]:
    """A bar over the tiles: those of a run before count as done. Of several ranks the first one shows its own."""
    if not problem.progress or ranks.rank:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    what = "empirical NTK" if ranks.size == 1 else f"empirical NTK, rank 0 of {ranks.size}"
    whole = total if ranks.size == 1 else mine
    with tqdm(total=whole, initial=whole - mine, desc=what, unit="tile") as bar:
        yield bar.update


@ends_its_contexts
def run(problem: Problem, out: Any) -> Any:
    """The kernel into `out`; see `empirical_ntk`."""
    if problem.method == "products":
        raise ValueError("method must be 'auto', 'structured' or 'jacobian' with out=, which streams tiles")
    to = destination(out)
    ranks = job()
    with preserved(problem.target.model):
        if isinstance(to, PlainArray) and ranks.size > 1 and not to.shared:
            raise ValueError(
                f"{to.name} is not shared between the {ranks.size} ranks; pass a path for a Zarr array, or a memory map"
            )
        with ranks.together():
            plan = problem.plan(compared=False)  # a run that goes on may never compute the first block again
            facts = fingerprint(problem, plan)
        if any(other != facts for other in ranks.gather(facts)):
            raise ValueError("the ranks have different models or data; give all of them the same")
        grid = Grid(problem, plan)
        tiles = grid.tiles()

        def prepare() -> tuple[int, list[Tile]]:
            held = held_tiles(problem, plan, grid, ranks)
            to.open(grid.layout, facts)
            return held, _missing(grid, to, tiles)

        held, missing = ranks.agree(prepare)
        stream = Stream(problem, plan, grid, to)
        with ranks.together():
            if ranks.rank:
                to.open(grid.layout, facts)
            shares = schedule(grid, missing, held, ranks.size, _sweep_cost(problem, plan))
            mine = shares[ranks.rank]
            count = sum(len(each.rows) for each in mine)
            with _progress(problem, ranks, len(tiles), count) as advance:
                _run(stream, mine, advance, len(tiles) - len(missing) if ranks.size == 1 else 0, len(tiles))
        return to.result()


def _run(stream: Stream, jobs: list[Job], advance: Callable[[int], Any], before: int, total: int) -> None:
    try:
        stream.run(jobs, advance)
    except PlanMismatchError:
        raise ValueError(
            "model: it uses its parameters differently from row to row; pass method='jacobian' to stream its kernel"
        ) from None
    except OSError as error:
        kept = "a part of it was written" if isinstance(stream.to, PlainArray) else "finished tiles are kept"
        raise OSError(
            error.errno,
            f"{stream.to.name} cannot be written any more: {error.strerror or error}; {kept} "
            f"({before + stream.finished} of {total}). Make room and run the same call again",
        ) from error


def _missing(grid: Grid, to: Destination, tiles: list[Tile]) -> list[Tile]:
    """The tiles that are not safely stored, on either side of the diagonal."""
    regions = [grid.region(tile) for tile in tiles]
    open_tiles = to.missing(regions)
    if grid.symmetric:
        rest = [index for index in range(len(tiles)) if index not in open_tiles and tiles[index][0] != tiles[index][1]]
        turned = to.missing([regions[index][::-1] for index in rest])
        open_tiles |= {rest[index] for index in turned}
    return [tiles[index] for index in sorted(open_tiles)]


def _sweep_cost(problem: Problem, plan: Plan) -> float:
    """What the forward and backward of one row cost, in pairs of rows: from the sizes of the plan's entries."""
    pair = sum(entry.flops for entry in plan.entries) / max(1.0, problem.sizes.pairs)
    parameters = sum(problem.target.width(name) for name in problem.target.parameters)
    return 2.0 * parameters * (1 + plan.outputs) / max(1.0, pair)
