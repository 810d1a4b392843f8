"""The exact empirical NTK of a module: the public functions, and the walk over tiles of the kernel."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .. import _check
from .._library import has_kernel, has_kernels
from . import products
from .adjacent import collect_blocks, joined
from .checks import make_plan
from .contract import Batch, Inputs, Target, preserved, refuse_training_modules
from .explanation import Explanation
from .factors import Factor, Tiled
from .ops import COMPUTE
from .plan import METHODS, Plan, Sizes
from .sweep import PlanMismatchError, collect

# Rows of a sub-tile on the diagonal of a symmetric kernel without compiled kernels: only the upper half is computed.
DIAGONAL_TILE = 64
# Rows that are mirrored at once on a GPU: each costs a handful of launches.
GPU_MIRRORED = 512
# Bytes that any machine has: below, the default budget does not look at what is free.
SMALL = 64 << 20


class Problem:
    """The checked arguments of one call."""

    def __init__(
        self,
        model: nn.Module,
        x1: Inputs,
        x2: Inputs | None,
        *,
        compute: str,
        method: str,
        params: Mapping[str, Tensor] | None,
        output: Callable[[Any], Tensor] | None,
        memory_budget: int | None,
        progress: bool,
        check: bool,
        separate: bool = False,
    ) -> None:
        _check.one_of("compute", compute, COMPUTE)
        _check.one_of("method", method, METHODS)
        self.target = Target(model, params, output)
        self.left = Batch("x1", x1)
        self.target.check_batch(self.left)
        self.symmetric = x2 is None
        self.right = self.left if x2 is None else Batch("x2", x2)
        if x2 is not None:
            self.right.check_like(self.left)
        # The batch whose first rows are probed: from a single row nothing could be learned about the other batch.
        self.probed = self.left if self.left.rows >= self.right.rows else self.right
        refuse_training_modules(model)
        if memory_budget is not None:
            _check.positive_int("memory_budget", memory_budget)
        self.budget = memory_budget
        self.compute, self.method, self.progress, self.check, self.separate = compute, method, progress, check, separate
        itemsize = torch.empty((), dtype=self.target.dtype).element_size()
        self.sizes = Sizes(self.left.rows, self.right.rows, 0, compute, itemsize, self.symmetric)

    def plan(self, loop: bool = False, compared: bool = True) -> Plan:
        return make_plan(
            self.target,
            self.probed,
            self.sizes,
            method=self.method,
            check=self.check,
            separate=self.separate,
            loop=loop,
            compared=compared,
        )

    def blocks(self, plan: Plan) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """The row blocks of both sides."""
        return tuple(  # type: ignore[return-value]
            [(begin, min(begin + plan.block, rows)) for begin in range(0, rows, plan.block)]
            for rows in (self.left.rows, self.right.rows)
        )

    def in_one_sweep(self, plan: Plan) -> bool:
        """Whether both batches fit one block: then one forward and one backward serve both.

        Not for two single rows: the plan's probe of one row does not tell how several rows lie in a layer's input.
        """
        return not self.symmetric and self.probed.rows > 1 and self.left.rows + self.right.rows <= plan.block

    def held_blocks(self, plan: Plan) -> int:
        """How many blocks of the left side are held at once; the budget decides.

        Raises:
            ValueError: the budget does not hold one block of each side.
        """
        rows = min(plan.block, max(self.left.rows, self.right.rows))
        block = rows * plan.row_bytes
        tiles = [rows * entry.tile_bytes for entry in plan.entries]
        swept = self.sizes.sides if self.in_one_sweep(plan) else rows
        working = swept * plan.sweep_bytes
        if self.budget is None and plan.row_bytes * self.sizes.sides + 2 * working <= SMALL:
            return sum(map(len, self.blocks(plan)))
        budget = free_memory(self.target.device) // 4 if self.budget is None else self.budget
        tile = max(tiles, default=0)
        least = working + 2 * (block + tile)
        if self.budget is not None and budget < least:
            raise ValueError(
                f"memory_budget must be at least {least} bytes here: a sweep over {swept} rows takes {working} bytes, "
                f"and holding one block {block}, twice; got {self.budget}"
            )
        return max(1, (budget - working - block - tile) // max(1, block + tile))

    def empty(self, outputs: int) -> Tensor:
        shape = [self.left.rows, self.right.rows]
        shape += {"full": [outputs, outputs], "diagonal": [outputs], "trace": []}[self.compute]
        return torch.zeros(shape, dtype=self.target.dtype, device=self.target.device)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as lines:
            available = next(line for line in lines if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


@contextmanager
def progress_bar(shown: bool, total: int, what: str) -> Iterator[Callable[[int], Any]]:
    if not shown:
        yield lambda count: None
        return
    from tqdm.auto import tqdm

    with tqdm(total=total, desc=what, unit="block") as bar:
        yield bar.update


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
        left = collect(problem.target, plan, problem.left, begin, end)
        right = left if problem.symmetric else collect(problem.target, plan, problem.right, begin, end)
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


def run(problem: Problem) -> dict[str, Tensor] | Tensor:
    """The kernel, or one kernel per parameter."""
    with preserved(problem.target.model):
        if problem.method == "products" and not problem.separate:
            return products.kernel(problem)
        for loop in (False, True):
            plan = problem.plan(loop)
            held = problem.held_blocks(plan)
            if problem.separate:
                by_name = {name: problem.empty(plan.outputs) for name in problem.target.parameters}
                kernels = [by_name[entry.names[0]] for entry in plan.entries]
            else:
                total = problem.empty(plan.outputs)
                kernels = [total] * len(plan.entries)
            try:
                Walk(problem, plan, kernels).run(held)
            except PlanMismatchError:
                if loop:
                    raise ValueError("model: it uses its parameters differently from call to call") from None
                continue
            return by_name if problem.separate else total
    raise AssertionError("unreachable")


def empirical_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    out: Any = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Any:
    r"""The exact empirical neural tangent kernel of a module, Θ[n, m, a, b] = Σ_p ∂f_a(x1_n)/∂θ_p ∂f_b(x2_m)/∂θ_p.

    Dense layers, convolutions, norms and embeddings are computed from their inputs and output cotangents, without
    forming Jacobians where that is cheaper; every other use of a parameter is found and computed by autograd.

    Args:
        model: any module whose outputs for one row do not depend on other rows, in eval mode.
        x1: [N, ...], or a tuple (passed as arguments) or dict (as keywords) of tensors that share their first axis.
        x2: [M, ...] likewise; None stands for x1, and computes half of the (exactly symmetric) kernel.
        compute: "full" [N, M, O, O]; "diagonal" [N, M, O], the entries a = b; "trace" [N, M], their sum.
        method: "auto" chooses per parameter from shapes, and autograd where no structure is recognised; "structured"
            is the same kernel, bit for bit, but an error names a parameter that would need autograd's Jacobian;
            "jacobian" contracts Jacobians from autograd; "products" multiplies the kernel's columns by
            vector-Jacobian and Jacobian-vector products.
        params: parameter names to tensors that replace the model's own; only those with requires_grad count.
        output: picks a tensor [N, ...] from the model's result; it is flattened to O values per row.
        out: where the kernel is written instead of memory, tile by tile. A path (or Zarr store) makes a Zarr array
            (`pip install finite-width[scale]`): a run that was stopped goes on with the missing tiles, where model,
            data and arguments are the same. Any array of the right shape and dtype that can be written (numpy, a
            memory map, h5py) also works, without a memory of what is finished. Under `torchrun` all ranks make the
            same call and share the tiles of a path or memory map.
        memory_budget: bytes of working memory beyond inputs and result; default: a quarter of what is free. The
            result has the same bits for any budget.
        progress: show a progress bar.
        check: test on a few rows that rows do not mix and that nothing is random.

    Returns:
        The kernel, in the parameters' dtype (float32 or float64). Complex parameters count real and imaginary parts.
        With `out`: the Zarr array, opened for reading, or `out` itself.

    Raises:
        ValueError: empty or mismatched batches, train mode with batch norm or dropout, random or row-mixing models,
            no trainable parameter, an output without a batch axis, mixed devices, too small a budget; method
            "structured" where a parameter's use is not recognised; an `out` of
            another shape, read-only, or with the kernel of another model, data or `compute`, which stays as it was.
        TypeError: no module, no tensors, integer parameters, mixed or low-precision dtypes; an `out` of another dtype.
        OSError: `out` cannot be written (any more); finished tiles are kept.

    Source: Jacot, Gabriel and Hongler, "Neural Tangent Kernel" (2018); structured derivatives: Novak, Sohl-Dickstein
    and Schoenholz, "Fast Finite Width Neural Tangent Kernel" (2022).

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> fw.ntk.empirical_ntk(model, torch.randn(5, 3), torch.randn(4, 3)).shape
        torch.Size([5, 4, 2, 2])
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method=method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
    )
    if out is not None:
        from . import stream

        return stream.run(problem, out)
    result = run(problem)
    assert isinstance(result, Tensor)
    return result


def per_parameter_ntk(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> dict[str, Tensor]:
    """The empirical NTK's part of each parameter; their sum is `empirical_ntk`.

    Args:
        model: see `empirical_ntk`, as for all other arguments; method "products" is "jacobian" here.

    Returns:
        {parameter name: its kernel}, in the order of `model.named_parameters()`.

    Raises:
        ValueError: see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Linear(3, 2)
        >>> kernels = fw.ntk.per_parameter_ntk(model, torch.randn(5, 3), compute="trace")
        >>> list(kernels)
        ['weight', 'bias']
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method="jacobian" if method == "products" else method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
        separate=True,
    )
    result = run(problem)
    assert isinstance(result, dict)
    return result


def explain(
    model: nn.Module,
    x1: Inputs,
    x2: Inputs | None = None,
    *,
    compute: str = "full",
    method: str = "auto",
    params: Mapping[str, Tensor] | None = None,
    output: Callable[[Any], Tensor] | None = None,
    memory_budget: int | None = None,
    progress: bool = False,
    check: bool = True,
) -> Explanation:
    """How `empirical_ntk` would compute the kernel: per parameter the method, operations and bytes; prints as a table.

    Args:
        model: see `empirical_ntk`, as for all other arguments.

    Returns:
        An `Explanation`; only a few rows are run.

    Raises:
        ValueError: see `empirical_ntk`.
        TypeError: see `empirical_ntk`.

    Example:
        >>> import torch, finite_width as fw
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> [row.method for row in fw.ntk.explain(model, torch.randn(5, 3)).rows]
        ['gram', 'last']
    """
    problem = Problem(
        model,
        x1,
        x2,
        compute=compute,
        method=method,
        params=params,
        output=output,
        memory_budget=memory_budget,
        progress=progress,
        check=check,
    )
    with preserved(model):
        plan = problem.plan(compared=False)
        held = problem.held_blocks(plan)
        walk = Walk(problem, plan, [])
        blocks = (1, 0) if problem.in_one_sweep(plan) else (len(walk.left), len(walk.right))
        return Explanation.make(plan, problem.sizes, problem.method, walk.sweeps(held), *blocks)
