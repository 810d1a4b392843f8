"""The checked arguments of one call, and what follows from them: its blocks of rows, and how many are held at once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _check
from .capture import PlanMismatchError
from .checks import make_plan
from .contract import Batch, Inputs, Target, refuse_training_modules
from .ops import COMPUTE
from .plan import METHODS, Plan, Sizes

Result = TypeVar("Result")

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

    def plan(self, structured: bool = True, compared: bool = True) -> Plan:
        return make_plan(
            self.target,
            self.probed,
            self.sizes,
            method=self.method,
            check=self.check,
            separate=self.separate,
            structured=structured,
            compared=compared,
        )

    def with_plan(self, compute: Callable[[Plan], Result], plan: Plan | None = None) -> Result:
        """compute(plan); and once more with autograd's Jacobians, where a block does not follow the plan of the probe.

        Raises:
            ValueError: the model uses its parameters differently from call to call.
        """
        try:
            return compute(self.plan() if plan is None else plan)
        except PlanMismatchError:
            pass
        try:
            return compute(self.plan(structured=False))
        except PlanMismatchError:
            raise ValueError("model: it uses its parameters differently from call to call") from None

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
