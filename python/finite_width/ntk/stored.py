"""A kernel that lies on disk, as a matrix: applied panel by panel, by one rank or many."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .problem import free_memory
from .ranks import job

# Bytes of a panel of rows that is read at once.
_PANEL_BYTES = 64 << 20
# Rows of a panel that are converted to float64 at a time: they stay in the cache until they are multiplied.
_ROWS = 32


def is_stored(value: Any) -> bool:
    """Whether it is an array outside torch: Zarr, a memory map, h5py, numpy."""
    return not isinstance(value, Tensor) and all(hasattr(value, name) for name in ("shape", "dtype", "__getitem__"))


class StoredKernel:
    """The matrix [N O, M O] of a stored kernel [N, M] or [N, M, O, O]; products are in float64.

    Under torch.distributed every rank reads its share of the rows, so all ranks must make the same products. Panels
    that were read stay in memory as far as the budget goes (default: a quarter of what is free).
    """

    def __init__(self, array: Any, memory_budget: int | None = None) -> None:
        self.array = array
        neighbours = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self._room = free_memory(torch.device("cpu")) // (4 * neighbours) if memory_budget is None else memory_budget
        self._kept: dict[int, Tensor] = {}
        rows, columns, *trailing = (int(size) for size in array.shape) if len(array.shape) > 1 else (0, 0, 0)
        if len(trailing) not in (0, 2) or trailing[:1] != trailing[1:]:
            raise ValueError(
                "K_or_operator must be a stored kernel [N, N] or [N, N, O, O] (compute='trace' or 'full'), "
                f"got shape {list(array.shape)}"
            )
        name = str(np.dtype(array.dtype))
        if name not in ("float32", "float64"):
            raise TypeError(f"K_or_operator must be float32 or float64, got {name}")
        self.dtype: torch.dtype = getattr(torch, name)
        self.device = torch.device("cpu")
        self.outputs = trailing[0] if trailing else 1
        self.shape = (rows * self.outputs, columns * self.outputs)
        # Whole pieces of the store, so that none is read twice.
        piece = (getattr(array, "chunks", None) or (1,))[0]
        step = max(1, _PANEL_BYTES // max(1, columns * self.outputs**2 * self.dtype.itemsize))
        self._step = max(piece, step // piece * piece)

    def _panel(self, begin: int, end: int) -> Tensor:
        """The matrix's rows of the kernel's rows [begin, end)."""
        values = np.asarray(self.array[begin:end])
        if not values.flags.writeable or any(step < 0 for step in values.strides):  # torch takes neither
            values = values.copy()
        panel = torch.from_numpy(values)
        if panel.dim() == 4:
            panel = panel.permute(0, 2, 1, 3).reshape(-1, self.shape[1])
        return panel

    def __matmul__(self, v: Tensor, /) -> Tensor:
        """K v for v [M O] or [M O, k], in float64."""
        columns = v.double().reshape(v.shape[0], -1)
        result = torch.zeros(self.shape[0], columns.shape[1], dtype=torch.float64)
        buffer = torch.empty(_ROWS, self.shape[1], dtype=torch.float64)
        ranks, rows = job(), self.shape[0] // self.outputs
        for index, begin in enumerate(range(0, rows, self._step)):
            if index % ranks.size == ranks.rank:
                place = begin * self.outputs
                for part in self._remembered(begin, min(begin + self._step, rows)).split(_ROWS):
                    slab = buffer[: len(part)].copy_(part)
                    torch.matmul(slab, columns, out=result[place : place + len(part)])
                    place += len(part)
        return ranks.sum(result).reshape(self.shape[0], *v.shape[1:])

    def _remembered(self, begin: int, end: int) -> Tensor:
        """A panel, from memory where it has been read before and there was room to keep it."""
        if begin in self._kept:
            return self._kept[begin]
        panel = self._panel(begin, end)
        size = panel.numel() * panel.element_size()
        if size <= self._room:
            self._room -= size
            self._kept[begin] = panel
        return panel

    def to_dense(self) -> Tensor:
        return self._panel(0, self.shape[0] // self.outputs)
