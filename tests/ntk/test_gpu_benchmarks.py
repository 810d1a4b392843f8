"""The GPU's benchmark cases in tiny sizes on the processor: every implementation runs and is right."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmark_modules import benchmark

with benchmark("ntk_gpu") as _module:
    NAMES = list(_module.cases(tiny=True))


@pytest.fixture
def ntk_gpu() -> Iterator[Any]:
    with benchmark("ntk_gpu") as module:
        yield module


@pytest.mark.parametrize("name", NAMES)
def test_every_implementation_of_a_tiny_case_is_right(ntk_gpu: Any, name: str) -> None:
    import harness

    case = ntk_gpu.cases(tiny=True)[name]()
    assert case.name == name
    calls = {**case.implementations, **case.peers}
    assert case.baseline in calls
    assert case.exact is not None
    exact = case.exact()
    for implementation, call in calls.items():
        if implementation in case.not_compared:
            call()
            continue
        bound = 2e-2 if "torch.mm, bf16" in implementation else 1e-4 if "ResNet" in name else 1e-5
        assert harness.relative_error(call(), exact) <= bound, implementation
    for implementation, against in case.targets:
        assert {implementation, against} <= calls.keys()


def test_the_full_cases_have_the_tiny_ones_names(ntk_gpu: Any) -> None:
    whole = ntk_gpu.cases()
    assert all(name.startswith("GPU ") for name in whole)
    assert {name for name in whole if name.endswith(("trace", "full"))} <= set(NAMES)
