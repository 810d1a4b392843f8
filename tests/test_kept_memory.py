"""Large results live in blocks that are kept for the next ones, bounded, and invisible but for the time."""

from __future__ import annotations

import copy
import pickle
import threading

import pytest
import torch
from torch import Tensor

import finite_width as fw
from finite_width import _library

MIB = 1 << 20


@pytest.fixture(autouse=True)
def empty() -> None:
    if _library.COMPILED is None:
        pytest.skip("the blocks are the compiled module's")
    fw.empty_cache()


def kept() -> int:
    assert _library.COMPILED is not None
    return int(_library.COMPILED.kept_bytes())


def product(size: int, value: float = 1.0) -> Tensor:
    """[size, size] of `value`, made by a kernel."""
    column = torch.full((size, 1), value)
    return torch.ops.finite_width.gemm(column, torch.ones(1, size), None)


def test_the_next_result_of_the_same_size_takes_the_block() -> None:
    first = product(600)
    place = first.data_ptr()
    second = product(600, 2.0)
    assert second.data_ptr() != place
    assert kept() == 0
    del first
    assert 600 * 600 * 4 <= kept() < 600 * 600 * 4 + 8192
    third = product(599, 3.0)  # a little smaller
    assert third.data_ptr() == place
    assert kept() == 0
    assert torch.equal(third, torch.full((599, 599), 3.0))
    assert torch.equal(second, torch.full((600, 600), 2.0))


def test_a_much_smaller_result_does_not_hold_a_large_block() -> None:
    large = product(1000)
    place = large.data_ptr()
    del large
    small = product(600)
    assert small.data_ptr() != place
    assert kept() >= 1000 * 1000 * 4


def test_small_results_are_torchs() -> None:
    small = product(500)
    del small
    assert kept() == 0


def test_what_is_kept_is_bounded_and_can_be_given_back() -> None:
    results = [product(4096 + 64 * i) for i in range(6)]  # 64 MiB and more each
    del results
    assert 128 * MIB < kept() <= 256 * MIB
    alive = product(700, 5.0)
    fw.empty_cache()
    assert kept() == 0
    assert torch.equal(alive, torch.full((700, 700), 5.0))
    del alive
    assert kept() > 0


def test_views_and_saved_tensors_hold_the_block() -> None:
    whole = product(600, 4.0)
    row = whole[5]
    del whole
    other = product(600, 1.0)
    assert kept() == 0
    assert torch.equal(row, torch.full((600,), 4.0))
    del row, other
    assert kept() > 0


def test_results_are_tensors_like_others() -> None:
    result = product(600, 2.0)
    expected = torch.full((600, 600), 2.0)
    assert torch.equal(pickle.loads(pickle.dumps(result)), expected)
    assert torch.equal(copy.deepcopy(result), expected)
    assert torch.equal(result.clone().resize_(1200, 600)[:600], expected)
    assert torch.equal(torch.from_numpy(result.numpy()), expected)
    assert torch.equal(product(600, 2.0).share_memory_(), expected)
    result.add_(1)
    assert torch.equal(result, expected + 1)


def test_many_threads() -> None:
    wrong = []

    def work(value: float) -> None:
        for size in range(560, 600):
            result = product(size, value)
            if not bool((result == value).all()):
                wrong.append((value, size))

    threads = [threading.Thread(target=work, args=(float(i),)) for i in range(1, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert kept() <= 256 * MIB


def test_training_steps_touch_no_new_memory() -> None:
    """The blocks of a step serve the next: weights, their gradients, and nothing beside them."""
    layer = fw.bayes.BayesLinear(640, 640)
    places = []
    for _ in range(4):
        layer.zero_grad()
        (layer(torch.ones(2, 640)).sum() + fw.bayes.kl(layer)).backward()
        assert layer.weight_mu.grad is not None
        assert layer.weight_rho.grad is not None
        places.append({layer.weight_mu.grad.data_ptr(), layer.weight_rho.grad.data_ptr()})
    assert len(set.union(*places)) == 2
