"""A process of the streaming tests: python stream_child.py STORE [LOG]; small tiles, so that there are many.

Writes to LOG which tiles it computes and stores. With FAIL_RANK=r the rank r ends after two tiles, like a crash.
"""

from __future__ import annotations

import importlib
import os
import sys
import time
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw

ROWS, TILE = 83, 8


def small_tiles() -> None:
    """Blocks and tiles of a few rows."""
    importlib.import_module("finite_width.ntk.plan").BLOCK_ROWS = TILE // 2
    importlib.import_module("finite_width.ntk.stream").TILE_ROWS = TILE


def problem() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3))
    return model, torch.randn(ROWS, 6)


def main() -> None:
    small_tiles()
    stream = importlib.import_module("finite_width.ntk.stream").Stream
    compute, write = stream._compute, stream._write
    rank = os.environ.get("RANK", "0")
    log = open(f"{sys.argv[2]}.{rank}" if len(sys.argv) > 2 else os.devnull, "a", buffering=1)  # noqa: SIM115

    def slow_compute(self: Any, job: Any, rows: Any) -> Any:
        log.writelines(f"computing {row},{job.column}\n" for row in job.rows)
        time.sleep(float(os.environ.get("SLEEP", "0")))
        if os.environ.get("FAIL_RANK") == rank and self.finished > 2:
            os._exit(9)
        return compute(self, job, rows)

    def logged_write(self: Any, tiles: Any, advance: Any) -> None:
        for each in tiles:
            write(self, [each], advance)
            log.write(f"stored {each[0][0]},{each[0][1]}\n")

    stream._compute, stream._write = slow_compute, logged_write
    model, x = problem()
    for compute_name in ("trace", "full") if len(sys.argv) <= 2 else ("trace",):
        # The budget holds a few tile rows, so that there are several groups of them.
        store = f"{sys.argv[1]}-{compute_name}.zarr"
        fw.ntk.empirical_ntk(model, x, compute=compute_name, out=store, memory_budget=100_000)


if __name__ == "__main__":
    main()
