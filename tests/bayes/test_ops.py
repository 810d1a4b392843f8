"""The variational ops through the op battery."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import finite_width as fw
from finite_width.bayes import ops
from op_battery import OpCase, Sample, battery

SEED = torch.tensor(-1234567890123456789)
# The noise is float32 noise in every dtype, and the reference computes it in float64: float64 results differ by that.
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-6}


def pair(dtype: torch.dtype, generator: torch.Generator, *shape: int) -> tuple[Tensor, Tensor]:
    """(μ, ρ) with σ between about 0.02 and 3."""
    mu = torch.randn(*shape, dtype=dtype, generator=generator)
    return mu, 4 * torch.randn(*shape, dtype=dtype, generator=generator).clamp(-1, 0.7)


def noise_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    shapes = [(), (1,), (3, 21), (64,), (5, 13, 7), (0,), (0, 4), (40000,)]
    result = [Sample((torch.zeros(shape, dtype=dtype), SEED, 3, 1)) for shape in shapes]
    return [*result, Sample((torch.zeros(7, 9, dtype=dtype).mT, SEED))]


def sample_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    mu, rho = pair(dtype, generator, 3, 29)
    mean = torch.randn(3, 29, dtype=dtype, generator=generator)
    wide = pair(dtype, generator, 20, 30)
    return [
        Sample((mu, rho, SEED, mean, 0.5)),
        Sample((mu, rho, SEED, None, 2.0, 1, True)),
        Sample((mu, rho, SEED)),
        Sample((*pair(dtype, generator, 64), SEED, None, 1.0)),
        Sample((*(x.mT for x in pair(dtype, generator, 7, 5)), SEED, None, 1.0)),
        Sample((*(x[::2, 1::3] for x in wide), SEED, None, 1.0)),
        Sample((*pair(dtype, generator, 0, 4), SEED, None, 1.0)),
        Sample((*pair(dtype, generator, 300, 117), SEED, None, 0.3)),
    ]


def kl_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    def tensor(shape: tuple[int, ...], with_mean: bool = False) -> tuple[Any, ...]:
        mean = torch.randn(*shape, dtype=dtype, generator=generator) if with_mean else None
        return *pair(dtype, generator, *shape), mean

    def lists(*rows: tuple[Any, ...]) -> Sample:
        return Sample(tuple(list(column) for column in zip(*rows, strict=True)))

    transposed = (*(x.mT for x in pair(dtype, generator, 7, 5)), None)
    return [
        lists((*tensor((3, 29), True), 0.5)),
        lists((*tensor((130,)), 2.0)),
        lists((*transposed, 1.0)),
        lists((*tensor((0,)), 1.0)),
        lists((*tensor((200, 301)), 0.3)),
        lists((*tensor((3, 5)), 0.5), (*tensor((0, 4)), 1.0), (*tensor((70,), True), 2.0), (*tensor((1,)), 0.3)),
        # More than a CUDA launch takes, and more than a block holds.
        lists(*((*tensor((4 * i, 11), i % 3 == 0), 0.1 + 0.2 * i) for i in range(20)), (*tensor((150, 301)), 0.3)),
    ]


def kl_backward_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    grad = torch.randn((), dtype=dtype, generator=generator)
    samples = []
    for sample in kl_samples(dtype, generator):
        mu, rho, means, stds = sample.args
        samples.append(Sample((grad, mu, rho, [torch.empty(0, dtype=dtype) if m is None else m for m in means], stds)))
    return samples


def linear_arguments(
    dtype: torch.dtype, generator: torch.Generator, batch: int, wide_in: int, out: int, bias: bool = True
) -> tuple[Any, ...]:
    x = torch.randn(batch, wide_in, dtype=dtype, generator=generator)
    biases = pair(dtype, generator, out) if bias else (None, None)
    return x, *pair(dtype, generator, out, wide_in), *biases, SEED


def linear_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    x, *rest = linear_arguments(dtype, generator, 6, 5, 7)
    mean = torch.randn(7, 5, dtype=dtype, generator=generator)
    bias_mean = torch.randn(7, dtype=dtype, generator=generator)
    return [
        Sample((x, *rest, mean, bias_mean, 0.7)),
        Sample((*linear_arguments(dtype, generator, 3, 4, 6, bias=False), None, None, 1.0)),
        Sample((x[::2], *rest)),
        Sample((torch.randn(5, 6, dtype=dtype, generator=generator).mT, *rest, None, None, 1.0)),
        Sample((*linear_arguments(dtype, generator, 0, 5, 3), None, None, 1.0)),
        Sample((*linear_arguments(dtype, generator, 33, 70, 130), None, None, 1.0)),
        Sample((*linear_arguments(dtype, generator, 128, 400, 10), None, None, 1.0)),
        Sample((*linear_arguments(dtype, generator, 2, 900, 70), None, None, 1.0)),
    ]


def thread_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    return [Sample((*linear_arguments(dtype, generator, 64, 300, 513), None, None, 1.0))]


def prediction_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    x, *rest = linear_arguments(dtype, generator, 6, 5, 7)
    large, *large_rest = linear_arguments(dtype, generator, 17, 70, 130)
    many, *many_rest = linear_arguments(dtype, generator, 100, 33, 20, bias=False)
    return [
        Sample((x.unsqueeze(0), *rest, 0, 3)),
        Sample((torch.stack([x, 2 * x, -x]).mT.contiguous().mT, *rest, 2, 3)),
        Sample((large.unsqueeze(0), *large_rest, 1, 4)),
        Sample((torch.stack([large, -large]), *large_rest, 0, 2)),
        Sample((many.unsqueeze(0), *many_rest, 0, 2)),
        Sample((x[:0].unsqueeze(0), *rest, 0, 2)),
    ]


def sample_backward_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    samples = []
    for sample in sample_samples(dtype, generator):
        mu, rho, seed, mean, std, stream, centred = (*sample.args, *(None, None, 0, False)[len(sample.args) - 3 :])
        grad = torch.randn(mu.shape, dtype=dtype, generator=generator)
        grad_kl = torch.randn((), dtype=dtype, generator=generator)
        samples.append(Sample((grad, None if std is None else grad_kl, mu, rho, seed, mean, std, stream, centred)))
        if std is not None:  # the KL's part alone
            samples.append(Sample((None, grad_kl, mu, rho, None, mean, std, stream, centred)))
    return samples


def with_cotangents(sample: Sample) -> Sample:
    """The backward call that belongs to a forward call of `linear`."""
    x, mu, rho, bias_mu, bias_rho, seed, mean, bias_mean, std = (*sample.args, *(None,) * (9 - len(sample.args)))
    grad_y = torch.linspace(-1, 0.7, x.shape[0] * mu.shape[0], dtype=x.dtype).reshape(x.shape[0], mu.shape[0])
    grad_kl = None if std is None else torch.tensor(0.3, dtype=x.dtype)
    return Sample((grad_y, grad_kl, x, mu, rho, bias_mu, bias_rho, seed, mean, bias_mean, std, True))


def with_deviation(sample: Sample) -> Sample:
    """The backward call of `local` for the same arguments; one output in seven has no noise."""
    *args, needs_x = with_cotangents(sample).args
    deviation = torch.linspace(0.1, 2, args[0].numel(), dtype=args[0].dtype).reshape(args[0].shape)
    return Sample(
        (*args, torch.where(torch.arange(args[0].numel()).reshape(args[0].shape) % 7 == 3, 0, deviation), needs_x)
    )


def local_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    """Those of `linear`, and inputs of zeros: outputs without variance where there is no bias.

    There the deviation has a kink, as |x| has, so that sample is too large for the gradient checks' finite differences.
    """
    x, *rest = linear_arguments(dtype, generator, 6, 21, 25, bias=False)
    x[2] = 0
    return [*linear_samples(dtype, generator), Sample((x, *rest, None, None, 1.0))]


def linear_backward_samples(dtype: torch.dtype, generator: torch.Generator) -> list[Sample]:
    return [with_cotangents(sample) for sample in linear_samples(dtype, generator)]


two, three = torch.ones(2), torch.ones(3)
matrix = torch.ones(3, 2)
BAD_WEIGHTS: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    (([1.0], two, SEED), TypeError, "mu must be a torch.Tensor"),
    ((two, three, SEED), ValueError, "rho must have the shape of mu"),
    ((two, two.double(), SEED), TypeError, "rho has dtype"),
    ((two.half(), two.half(), SEED), TypeError, "mu must be float32 or float64"),
    ((two, two.to("meta"), SEED), ValueError, "rho is on meta"),
    ((two, two, SEED, three, 1.0), ValueError, "prior_mean must have the shape"),
    ((two, two, SEED, None, 0.0), ValueError, "prior_std must be positive"),
    ((two, two, SEED, None, float("nan")), ValueError, "prior_std must be positive"),
    ((two, two, torch.tensor(1.0)), TypeError, "seed must be int64"),
    ((two, two, torch.tensor([1, 2])), ValueError, "seed must have one element"),
]
BAD_LINEAR: list[tuple[tuple[Any, ...], type[Exception], str]] = [
    ((torch.ones(4, 3), matrix, matrix, None, None, SEED), ValueError, "x must have 2 columns"),
    ((two, matrix, matrix, None, None, SEED), ValueError, "x must have shape"),
    ((torch.ones(4, 2), matrix, matrix, three, None, SEED), ValueError, "bias_mu and bias_rho go together"),
    ((torch.ones(4, 2), matrix, matrix, two, two, SEED), ValueError, "bias_mu must have shape"),
    ((torch.ones(4, 2).double(), matrix, matrix, None, None, SEED), TypeError, "weight_mu has dtype"),
    ((torch.ones(4, 2), matrix, two, None, None, SEED), ValueError, "weight_rho must have the shape"),
    ((torch.ones(4, 2).int(), matrix, matrix, None, None, SEED), TypeError, "x must be float32 or float64"),
]

CASES = [
    OpCase(
        name="bayes_noise",
        kind="functional",
        call=ops.noise,
        samples=noise_samples,
        bad=[
            ((1.0, SEED), TypeError, "like must be a torch.Tensor"),
            ((two.int(), SEED), TypeError, "like must be float32 or float64"),
            ((two, torch.tensor(1.0)), TypeError, "seed must be int64"),
            ((two, SEED.to("meta")), ValueError, "seed is on meta"),
        ],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_sample",
        kind="differentiable",
        call=ops.sample,
        samples=sample_samples,
        bad=BAD_WEIGHTS,
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_kl",
        kind="differentiable",
        call=ops.kl_sum,
        samples=kl_samples,
        bad=[
            (([two], [three], [None], [1.0]), ValueError, r"rho\[0\] must have the shape of mu\[0\]"),
            (([two, three], [two, three], [None, two], [1.0, 1.0]), ValueError, r"prior_mean\[1\] must have the shape"),
            (([two], [two], [None], [-1.0]), ValueError, r"prior_std\[0\] must be positive"),
            (([two.int()], [two.int()], [None], [1.0]), TypeError, r"mu\[0\] must be float32 or float64"),
            (([two, two.double()], [two, two.double()], [None] * 2, [1.0] * 2), TypeError, r"mu\[1\] has dtype"),
            (([two, two], [two], [None], [1.0]), ValueError, "lists of one length"),
            (([], [], [], []), ValueError, "at least 1"),
        ],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_linear",
        kind="differentiable",
        call=ops.linear,
        samples=linear_samples,
        thread_samples=thread_samples,
        bad=[*BAD_LINEAR, ((torch.ones(4, 2), matrix, matrix, None, None, SEED, None, None, -1.0), ValueError, "std")],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_local",
        kind="differentiable",
        call=ops.local,
        samples=local_samples,
        thread_samples=thread_samples,
        bad=[*BAD_LINEAR, ((torch.ones(4, 2), matrix, matrix, None, None, SEED, None, None, -1.0), ValueError, "std")],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_linear_samples",
        kind="functional",
        call=ops.linear_samples,
        samples=prediction_samples,
        bad=[
            ((torch.ones(1, 4, 2), matrix, matrix, None, None, SEED, 0, 0), ValueError, "samples must be at least 1"),
            ((torch.ones(3, 4, 2), matrix, matrix, None, None, SEED, 0, 2), ValueError, "x must have shape"),
            ((torch.ones(4, 2), matrix, matrix, None, None, SEED, 0, 2), ValueError, "x must have shape"),
        ],
        tolerance=TOLERANCE,
    ),
    # The backward ops have no public wrapper: the layers' gradients call them. A second derivative goes through plain
    # torch around the same noise (ops.py), so they are not differentiable themselves.
    OpCase(
        name="bayes_sample_backward",
        kind="functional",
        call=lambda *arguments: torch.ops.finite_width.bayes_sample_backward(*arguments),
        samples=sample_backward_samples,
        bad=[
            ((two, None, two, three, SEED, None, None, 0, False), RuntimeError, "rho|size of tensor"),
            (("grad", None, two, two, SEED, None, None, 0, False), RuntimeError, "Tensor"),
        ],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_kl_backward",
        kind="functional",
        call=lambda *arguments: torch.ops.finite_width.bayes_kl_backward(*arguments),
        samples=kl_backward_samples,
        bad=[
            ((torch.tensor(1.0), [two], [two], [three], [1.0]), RuntimeError, "prior_mean|size of tensor"),
            (("grad", [two], [two], [torch.ones(0)], [1.0]), RuntimeError, "Tensor"),
        ],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_local_backward",
        kind="functional",
        call=lambda *arguments: torch.ops.finite_width.bayes_local_backward(*arguments),
        samples=lambda dtype, generator: [with_deviation(s) for s in local_samples(dtype, generator)],
        thread_samples=lambda dtype, generator: [with_deviation(s) for s in thread_samples(dtype, generator)],
        bad=[
            (
                (
                    torch.ones(4, 3),
                    None,
                    torch.ones(4, 2),
                    matrix,
                    matrix,
                    *[None] * 2,
                    SEED,
                    *[None] * 3,
                    matrix,
                    True,
                ),
                RuntimeError,
                "deviation|size of tensor",
            ),
        ],
        tolerance=TOLERANCE,
    ),
    OpCase(
        name="bayes_linear_backward",
        kind="functional",
        call=lambda *arguments: torch.ops.finite_width.bayes_linear_backward(*arguments),
        samples=linear_backward_samples,
        thread_samples=lambda dtype, generator: [with_cotangents(s) for s in thread_samples(dtype, generator)],
        bad=[
            (
                (torch.ones(4, 5), None, torch.ones(4, 2), matrix, matrix, *[None] * 2, SEED, *[None] * 3, True),
                RuntimeError,
                "grad_y|size of tensor|shapes cannot be multiplied",
            ),
            (
                ("grad", None, torch.ones(4, 2), matrix, matrix, *[None] * 2, SEED, *[None] * 3, True),
                RuntimeError,
                "Tensor",
            ),
        ],
        tolerance=TOLERANCE,
    ),
]

test_battery = battery(CASES)


@pytest.mark.parametrize("dtype", ops.NARROW)
def test_a_narrow_weight_is_the_wide_one_rounded(dtype: torch.dtype, device: str) -> None:
    """W in 16 bits; the KL, and the gradients from a ∂W in 16 bits, have the bits that they have in float32."""
    generator = torch.Generator().manual_seed(0)
    pattern = torch.randint(-(2**31), 2**31, (20_011,), generator=generator).to(torch.int32)
    edges = torch.tensor([0.0, -0.0, 65519.0, 65520.0, -65536.0, 6e-8, 2.9e-8, 2.0**-14, 3.4e38, torch.inf, torch.nan])
    values = torch.cat([edges, pattern.view(torch.float32)]).to(device)
    seed = SEED.to(device)
    # σ = 0: W is μ, any float there is.
    exact, _ = ops.sample(values, torch.full_like(values, -200.0), seed, dtype=dtype)
    torch.testing.assert_close(exact, values.to(dtype), rtol=0, atol=0, equal_nan=True)
    mu, rho = (each.to(device) for each in pair(torch.float32, generator, 70, 63))
    mean = torch.randn(70, 63, generator=generator).to(device)
    results = []
    for chosen in (torch.float32, dtype):
        leaves = [each.clone().requires_grad_() for each in (mu, rho, mean)]
        weight, kl = ops.sample(*leaves[:2], seed, leaves[2], 0.5, dtype=chosen)
        assert weight.dtype == chosen
        assert kl.dtype == torch.float32
        cotangent = torch.linspace(-1, 1, weight.numel(), device=device).reshape(weight.shape).to(dtype)
        gradients = torch.autograd.grad([weight, kl], leaves, [cotangent.to(chosen), torch.ones_like(kl)])
        results.append([weight.to(dtype), kl, *gradients])
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_narrow_weights_where_they_make_no_sense() -> None:
    with pytest.raises(TypeError, match="dtype must be that of mu, or bfloat16 or float16 where mu is float32"):
        ops.sample(two.double(), two.double(), SEED, dtype=torch.bfloat16)
    with pytest.raises(TypeError, match="dtype must be that of mu"):
        ops.sample(two, two, SEED, dtype=torch.float64)


@pytest.mark.parametrize("estimator", ["weight", "flipout"])
def test_autocast_draws_weights_in_its_own_dtype(estimator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layer = fw.bayes.BayesLinear(7, 5, estimator=estimator)
    drawn: list[Any] = []
    sample = ops.sample_unchecked
    monkeypatch.setattr(ops, "sample_unchecked", lambda *args: drawn.append(args[7]) or sample(*args))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(4, 7)).float().sum().backward()
    layer(torch.randn(4, 7))
    assert drawn[:2] == [torch.bfloat16] * 2
    assert set(drawn[2:]) <= {None}
    assert layer.weight_mu.grad.dtype == torch.float32
