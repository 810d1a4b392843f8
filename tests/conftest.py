"""Options and fixtures of all tests."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

import finite_width as fw
import op_battery

# With several processes each takes its share of the cores, and so do those that it starts: threads that wait for each
# other on one core take many times as long. What several threads have to show sets their number itself.
if _processes := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    _threads = max(1, (os.cpu_count() or 1) // int(_processes))
    torch.set_num_threads(_threads)
    os.environ["OMP_NUM_THREADS"] = str(_threads)

# The CUDA kernels as g++ compiles them, in place of the compiled module's (tests/test_cuda_on_host.py).
if _on_host := os.environ.get("FINITE_WIDTH_CUDA_ON_HOST"):
    torch.ops.load_library(_on_host)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # So that no core waits for a long one at the end.
    items.sort(key=lambda item: "first" not in item.keywords)
    if config.getoption("--slow"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="takes minutes; run with --slow"))


def pytest_collection() -> None:
    gc.disable()  # what is collected is kept: no pass over it would find anything, now or during the tests


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()


def pytest_report_header(config: pytest.Config) -> str:
    info = fw.build_info()
    return f"finite_width: kernels {info['kernels']}, instruction set {info.get('isa', '-')}, torch {info['torch']}"


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=op_battery.DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Each device in turn; a test on one that is not here skips."""
    op_battery.need(request.param)
    return str(request.param)


@pytest.fixture
def data_folder() -> Path:
    """The folder with real data; a test that needs it skips where there is none."""
    folder = os.environ.get("FINITE_WIDTH_DATA")
    if not folder:
        pytest.skip("FINITE_WIDTH_DATA names no folder with real data")
    return Path(folder)
