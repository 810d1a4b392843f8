"""The benchmarks of a GPU run: small, on the CPU, so that a slip does not cost time on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from benchmark_modules import benchmark

SCALE = {"pathsgd": 256, "bayes": 64}  # what sizes are divided by
LARGE = ("one step", "accuracy 1024", "noise", "predict")  # the CPU's cases too


@pytest.fixture(params=sorted(SCALE))
def wing(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A wing's file of benchmarks."""
    with benchmark(request.param) as module:
        yield module


def test_every_implementation_runs(wing: Any) -> None:
    import harness

    for name, build in wing.gpu_cases(SCALE[wing.__name__]).items():
        if name in LARGE:
            continue
        case = replace(build(), min_runs=1, seconds=0.0)
        rows = harness.measure(case, peers=False, refcheck=False)
        assert {row["implementation"] for row in rows} == set(case.implementations)
        assert case.baseline in case.implementations
        for implementation, against in case.targets:
            assert {implementation, against} <= set(case.implementations), name


SHOWN = {
    "pathsgd": {"four of 8192", "784-4000-4000-10, replayed"},
    "bayes": {
        *("sampling 4096", "without products 4096", "ten layers of 256"),
        *("layer 4096", "layer 4096, TF32", "layer 4096, bfloat16"),
    },
}


def test_what_has_to_be_shown_is_among_the_cases(wing: Any) -> None:
    """The lists of cases at their own sizes."""
    assert set(wing.gpu_cases()) >= SHOWN[wing.__name__]
