"""Loads a file of benchmarks/ in a test. They have the names of the tests' own folders, so nothing may stay loaded."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@contextmanager
def benchmark(name: str) -> Iterator[ModuleType]:
    """The module benchmarks/<name>.py; inside the block its neighbours can be imported, too."""
    path, hidden = list(sys.path), {}
    for file in BENCHMARKS.glob("*.py"):
        for loaded in [each for each in sys.modules if each == file.stem or each.startswith(f"{file.stem}.")]:
            hidden[loaded] = sys.modules.pop(loaded)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield import_module(name)
    finally:
        sys.path[:] = path
        for file in BENCHMARKS.glob("*.py"):
            sys.modules.pop(file.stem, None)
        sys.modules.update(hidden)
