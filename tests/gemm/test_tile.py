"""The tile GEMM by itself: any shape and strides, and bits that depend on an element's row and column alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import finite_width as fw
from finite_width._gemm import gemm, table

SIZES = st.integers(0, 70) | st.sampled_from([127, 128, 129, 383, 384, 385, 800])
LAYOUTS = st.sampled_from(["rows", "columns", "every second", "offset", "expanded"])


def tile(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """The op, whatever the table says."""
    return torch.ops.finite_width.gemm(a, b, bias)


def matrix(rows: int, columns: int, layout: str, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=dtype, generator=generator)

    if layout == "columns":
        return randn(columns, rows).t()
    if layout == "every second":
        return randn(2 * rows, 2 * columns)[::2, ::2]
    if layout == "offset":
        return randn(rows + 3, columns + 5)[3:, 5:]
    if layout == "expanded":
        return randn(1, columns).expand(rows, columns)
    return randn(rows, columns)


@settings(max_examples=150, deadline=None)
@given(SIZES, SIZES, SIZES, LAYOUTS, LAYOUTS, st.sampled_from([torch.float32, torch.float64]), st.booleans())
def test_any_shape_and_strides(
    rows: int, columns: int, inner: int, left: str, right: str, dtype: torch.dtype, biased: bool
) -> None:
    generator = torch.Generator().manual_seed(rows + 1000 * columns)
    a, b = matrix(rows, inner, left, dtype, generator), matrix(inner, columns, right, dtype, generator)
    bias = torch.randn(columns, dtype=dtype, generator=generator) if biased else None
    result = tile(a, b, bias)
    exact = a.double() @ b.double() + (0 if bias is None else bias.double())
    # Rounding is bounded by the sum of the absolute products.
    scale = a.double().abs() @ b.double().abs() + (0 if bias is None else bias.double().abs())
    assert result.shape == (rows, columns)
    assert bool(((result.double() - exact).abs() <= 32 * torch.finfo(dtype).eps * scale).all())


@pytest.mark.skipif(not fw.has_kernels(), reason="the bits of torch's own product are torch's")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rows, columns, inner", [(100, 90, 1000), (13, 500, 385), (700, 5, 64), (40, 33, 384)])
def test_bits_depend_on_row_and_column_alone(rows: int, columns: int, inner: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, inner, dtype=dtype, generator=generator)
    b = torch.randn(inner, columns, dtype=dtype, generator=generator)
    whole = tile(a, b)
    for begin, end in [(0, 1), (1, 12), (5, rows)]:
        assert torch.equal(tile(a[begin:end], b), whole[begin:end])
    for begin, end in [(0, 1), (2, 5), (3, columns)]:
        assert torch.equal(tile(a, b[:, begin:end]), whole[:, begin:end])
    assert torch.equal(tile(b.t(), a.t()), whole.t())
    assert torch.equal(tile(a.t().contiguous().t(), b), whole)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(tile(a, b), whole)
            assert torch.equal(gemm(a[:1], b), gemm(a[:1].clone(), b.clone()))
    finally:
        torch.set_num_threads(threads)


def test_symmetric_product_is_exactly_symmetric() -> None:
    a = torch.randn(77, 500, generator=torch.Generator().manual_seed(0))
    product = tile(a, a.t())
    if fw.has_kernels():
        assert torch.equal(product, product.t())
    torch.testing.assert_close(product, product.t())


@pytest.mark.parametrize("shape", [(1, 50, 300), (300, 50, 1), (1, 7, 1)])
def test_one_row_or_column_goes_to_torch(shape: tuple[int, int, int]) -> None:
    rows, inner, columns = shape
    assert table.route(rows, columns) == table.TORCH
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
    assert torch.equal(gemm(a, b), a @ b)
    torch.testing.assert_close(gemm(a, b), tile(a, b))


@pytest.mark.skipif(not fw.has_kernels(), reason="shown where the kernels are")
def test_build_info_shows_the_table() -> None:
    shown = fw.build_info()["gemm_table"]
    assert list(shown) == [shapes for shapes, _, _ in table.TABLE]
