"""A thousand repeated calls of every op, and of what users build on them, leave no memory behind."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import finite_width as fw
from finite_width._library import SCHEMAS
from finite_width._selfcheck import EXAMPLES

ALLOWED = 16 * 1024  # bytes in 1,000 calls: less than one leaked object a call

# Of glibc's struct mallinfo2, in order.
FIELDS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")


class MallocInfo(ctypes.Structure):
    """glibc's struct mallinfo2."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in [
            "arena",
            "ordblks",
            "smblks",
            "hblks",
            "hblkhd",
            "usmblks",
            "fsmblks",
            "uordblks",
            "fordblks",
            "keepcost",
        ]
    )


def in_use() -> int:
    """Bytes that this thread's malloc has handed out and not got back, and 16 for each block of Python's own."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = MallocInfo
    gc.collect()
    found = mallinfo()
    return int(found.uordblks) + int(found.hblkhd) + 16 * sys.getallocatedblocks()


def growth(call: Callable[[], Any], calls: int) -> int:
    """The least growth of three rounds: a leak shows in each, a cache that fills in one. On one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for _ in range(calls // 5):
            call()
        least = None
        for _ in range(3):
            before = in_use()
            for _ in range(calls):
                call()
            now = in_use() - before
            least = now if least is None else min(least, now)
            if least <= ALLOWED:
                break
    finally:
        torch.set_num_threads(threads)
    assert least is not None
    return least


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_op_leaks_nothing(name: str) -> None:
    op, args = getattr(torch.ops.finite_width, name).default, EXAMPLES[name]()
    assert growth(lambda: op(*args), 1000) <= ALLOWED


def test_no_op_takes_text() -> None:
    """torch 2.13 leaks one std::string for every text argument of an op on the stable ABI, at each call: its
    stableivalue_conversions.h copies it with `new` and returns a copy of that."""
    arguments = [
        (name, arg) for name in SCHEMAS for arg in getattr(torch.ops.finite_width, name).default._schema.arguments
    ]
    assert not [(name, arg.name) for name, arg in arguments if "str" in str(arg.type)]


def train(layer: nn.Module) -> Callable[[], Any]:
    x = torch.randn(8, 32)
    return lambda: layer(x).square().sum().backward()


def path_sgd() -> Callable[[], Any]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = fw.pathsgd.PathSGD(model, lr=1e-6, momentum=0.9)
    model(torch.randn(4, 16)).sum().backward()
    return optimizer.step


def tangent_kernel() -> Callable[[], Any]:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 2))
    x = torch.randn(4, 16)
    return lambda: fw.ntk.empirical_ntk(model, x)


def prediction() -> Callable[[], Any]:
    model, x = fw.bayes.BayesLinear(16, 2), torch.randn(4, 16)
    return lambda: fw.bayes.predict(model, x, samples=4)


USES: dict[str, tuple[Callable[[], Callable[[], Any]], int]] = {
    "TTLinear": (lambda: train(fw.tt.TTLinear(32, 32, rank=4)), 1000),
    "BayesLinear": (lambda: train(fw.bayes.BayesLinear(32, 32)), 1000),
    "PathSGD.step": (path_sgd, 1000),
    "empirical_ntk": (tangent_kernel, 150),
    "bayes.predict": (prediction, 500),
}


@pytest.mark.parametrize("name", USES)
def test_a_use_leaks_nothing(name: str) -> None:
    make, calls = USES[name]
    assert growth(make(), calls) <= ALLOWED


def test_a_leak_would_be_seen() -> None:
    kept: list[Any] = []
    assert growth(lambda: kept.append(bytearray(256)), 1000) > ALLOWED
    assert growth(lambda: kept.append(torch.empty(1)), 1000) > ALLOWED
    assert growth(lambda: kept.append((1.5 * len(kept),)), 1000) > ALLOWED
