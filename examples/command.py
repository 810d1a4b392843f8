"""What every example shares: its command line, and the folder that takes its picture and its figures."""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch

STARTED = time.perf_counter()  # every example imports this first


def arguments(description: str | None, *, seed: int = 0) -> argparse.ArgumentParser:
    """A parser with the options common to all examples; an example may add its own before `parse_args()`."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small data, few steps: under a minute, no files needed")
    parser.add_argument("--device", default="cpu", help="where torch computes, such as cpu or cuda")
    parser.add_argument("--seed", type=int, default=seed, help=f"of everything random (default {seed})")
    parser.add_argument("--data", type=Path, default=None, help="data folder (default: $FINITE_WIDTH_DATA)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder of pictures and figures (default: out)")
    return parser


def save_figures(path: Path, figures: dict[str, Any]) -> None:
    """Write an example's figures as JSON, together with its time and what they were computed on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    seconds = {"seconds": time.perf_counter() - STARTED, "processor seconds": time.process_time()}
    figures = {name: round(value, 1) for name, value in seconds.items()} | figures
    machine = {"processor": processor(), "torch": torch.__version__, "threads": torch.get_num_threads()}
    path.write_text(json.dumps({**figures, "machine": machine}, indent=2) + "\n")


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
