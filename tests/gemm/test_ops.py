"""The matrix product through the op battery."""

from __future__ import annotations

import torch

from finite_width._gemm import gemm
from op_battery import OpCase, Sample, battery


def samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, generator=generator)

    return [
        Sample((randn(5, 7), randn(7, 3), randn(3))),
        Sample((randn(7, 5).mT, randn(3, 7).mT)),
        Sample((randn(6, 9)[::2, 1:8], randn(7, 8)[:, ::3])),
        Sample((randn(1, 40), randn(40, 1))),
        Sample((randn(0, 4), randn(4, 3))),
        Sample((randn(4, 0), randn(0, 3), randn(3))),
        Sample((randn(65, 129), randn(129, 33), randn(33))),
        Sample((randn(300, 200), randn(200, 150))),
    ]


def thread_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    shapes = [((257, 300), (300, 190)), ((2, 900), (900, 1000)), ((1000, 17), (17, 3)), ((64, 4000), (4000, 64))]
    return [
        Sample((torch.randn(a, dtype=dtype, generator=generator), torch.randn(b, dtype=dtype, generator=generator)))
        for a, b in shapes
    ]


CASES = [
    OpCase(
        name="gemm",
        kind="differentiable",
        call=gemm,
        samples=samples,
        thread_samples=thread_samples,
        bad=[
            ((torch.ones(2, 3), torch.ones(4, 2)), ValueError, "b must have 3 rows"),
            ((torch.ones(2, 3), torch.ones(3)), ValueError, "b must have shape"),
            ((torch.ones(2, 3), torch.ones(3, 2, dtype=torch.float64)), TypeError, "b has dtype"),
            ((torch.ones(2, 3, dtype=torch.int32), torch.ones(3, 2)), TypeError, "a must be float32 or float64"),
            ((torch.ones(2, 3), torch.ones(3, 2), torch.ones(3)), ValueError, "bias must have shape"),
            (([1.0], torch.ones(3, 2)), TypeError, "a must be a torch.Tensor"),
            ((torch.ones(2, 3), torch.ones(3, 2, device="meta")), ValueError, "b is on meta"),
        ],
    )
]

test_battery = battery(CASES)


def test_a_row_again_and_again_under_vmap() -> None:
    """A unit cotangent has stride 0 over the rows: the product is made once, with the bits of the whole."""
    generator = torch.Generator().manual_seed(0)
    units, b = torch.eye(5), torch.randn(5, 33, generator=generator)
    expanded = units[:, None, :].expand(5, 7, 5)
    found = torch.func.vmap(lambda a: gemm(a, b))(expanded)
    assert torch.equal(found, torch.func.vmap(lambda a: gemm(a, b))(expanded.contiguous()))
    torch.testing.assert_close(found, expanded @ b)
