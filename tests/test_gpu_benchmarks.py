"""The benchmarks of a GPU run: small, on the CPU, so that a slip does not cost time on a GPU."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
SCALE = {"pathsgd": 256, "bayes": 64}  # what sizes are divided by
LARGE = ("one step", "accuracy 1024", "noise", "predict")  # the CPU's cases too


@pytest.fixture(scope="module", params=sorted(SCALE))
def cases(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """A wing's cases of a GPU, made small."""
    before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield __import__(request.param).gpu_cases(SCALE[request.param])
    finally:
        sys.path[:] = before[0]
        for name in set(sys.modules) - before[1]:
            if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
                del sys.modules[name]


def test_every_implementation_runs(cases: dict[str, Any]) -> None:
    import harness

    for name, build in cases.items():
        if name in LARGE:
            continue
        case = replace(build(), min_runs=1, seconds=0.0)
        rows = harness.measure(case, peers=False, refcheck=False)
        assert {row["implementation"] for row in rows} == set(case.implementations)
        assert case.baseline in case.implementations
        for implementation, against in case.targets:
            assert {implementation, against} <= set(case.implementations), name


def test_what_has_to_be_shown_is_among_the_cases(cases: dict[str, Any]) -> None:
    """The lists of cases at their own sizes."""
    module = sys.modules["pathsgd"] if "one step" in cases else sys.modules["bayes"]
    names = set(module.gpu_cases())
    assert names >= ({"four of 8192", "784-4000-4000-10, replayed"} if "one step" in cases else {
        "sampling 4096", "without products 4096", "layer 4096", "layer 4096, TF32", "layer 4096, bfloat16",
        "ten layers of 256",
    })  # fmt: skip
    assert not torch.cuda.is_available() or harness_device() == "cpu"


def harness_device() -> str:
    import harness

    return str(harness.DEVICE)
