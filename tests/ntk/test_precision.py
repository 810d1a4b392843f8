"""fw.ntk.cuda_precision: a setting of the CUDA kernels alone, and torch's TF32 kept out of the kernel functions."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import finite_width as fw
from finite_width.ntk import ops, precision


def test_the_precision_holds_inside_the_block() -> None:
    seen = []
    with fw.ntk.cuda_precision("split"):
        with fw.ntk.cuda_precision("bf16"):
            seen.append(precision.chosen())
        seen.append(precision.chosen())
    with pytest.raises(KeyError), fw.ntk.cuda_precision("split"):
        raise KeyError
    assert [precision.PRECISIONS[index] for index in (*seen, precision.chosen())] == ["bf16", "split", "ieee"]


@pytest.mark.parametrize("given", ["tf32", "high", 1, None])
def test_another_precision_is_an_error(given: object) -> None:
    with pytest.raises(ValueError, match="precision must be one of 'ieee', 'split', 'bf16', 'split-bf16', got"):
        fw.ntk.cuda_precision(given)  # at once, not on entering the block


def test_the_cpu_ignores_it() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.ReLU(), torch.nn.Linear(40, 3))
    x = torch.randn(9, 5)
    expected = fw.ntk.empirical_ntk(model, x)
    for name in precision.PRECISIONS:
        with fw.ntk.cuda_precision(name):
            assert torch.equal(fw.ntk.empirical_ntk(model, x), expected)


def test_a_compiled_call_sees_it() -> None:
    def call(out: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
        ops.jacobian_accumulate(out, j, j, "trace")
        return out

    with fw.ntk.cuda_precision("split"):
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
        j = torch.randn(3, 2, 4)
        torch.testing.assert_close(compiled(torch.zeros(3, 3), j), call(torch.zeros(3, 3), j))


def test_tf32_is_off_on_a_gpu_and_comes_back() -> None:
    def settings() -> list[str]:
        backends = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        return [each.fp32_precision for each in backends]

    before = settings()
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        allowed = settings()
        inside = []
        with contextlib.suppress(KeyError), precision.ieee_products(True):
            inside = settings()
            raise KeyError
        assert inside == ["ieee"] * 3
        assert settings() == allowed
        with precision.ieee_products(False):
            assert settings() == allowed
    finally:
        torch.backends.cuda.matmul.fp32_precision = before[0]


@pytest.mark.parametrize("allowed", ["highest", "high", "medium"])
def test_torch_s_older_switches_agree_inside_and_come_back(allowed: str) -> None:
    """A model may read them (torch.backends.cudnn.flags does); torch raises where they contradict the newer ones."""

    def settings() -> tuple[Any, ...]:
        newer = (torch.backends.cuda.matmul, torch.backends.cudnn.conv, torch.backends.cudnn.rnn)
        newer = (*newer, torch.backends.mkldnn.matmul)
        older = (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
        return torch.get_float32_matmul_precision(), *older, *(each.fp32_precision for each in newer)

    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(allowed)
        outside = settings()
        with precision.ieee_products(True), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            inside = settings()
        assert inside[:3] == ("highest", False, False)
        assert "tf32" not in inside
        assert settings() == outside
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("outputs", [1, 3])
def test_dense_layers_go_to_the_kernel_where_a_precision_asks_for_it(
    monkeypatch: pytest.MonkeyPatch, outputs: int
) -> None:
    """As on a GPU, where the switch is thrown: forward, and backward where it is not batched, by the NTK's product."""
    calls = []

    def dense(rows: torch.Tensor, matrix: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        calls.append(tuple(rows.shape))
        return whole(rows, matrix, bias)

    whole = ops.dense
    model = torch.nn.Sequential(
        torch.nn.Linear(5, 40), torch.nn.ReLU(), torch.nn.Linear(40, 30, bias=False), torch.nn.ReLU(),
        torch.nn.Linear(30, outputs),
    )  # fmt: skip
    x = torch.randn(9, 5)
    expected = fw.ntk.empirical_ntk(model, x)
    assert calls == []
    monkeypatch.setattr("finite_width.ntk.layers.splits_dense_layers", lambda like: True)
    monkeypatch.setattr(ops, "dense", dense)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, check=False), expected, rtol=1e-5, atol=1e-6)
    assert calls.count((9, 5)) == 1
    assert calls.count((9, 30)) == (2 if outputs == 1 else 1)


def test_nothing_on_the_cpu_is_split() -> None:
    with fw.ntk.cuda_precision("split"):
        assert not precision.splits_dense_layers(torch.zeros(1))
