"""The one battery that every op passes: kernel against reference, gradients, torch.func, torch.compile, bad input.

A wing's test_ops.py lists its ops as `OpCase`s and calls `battery(CASES)`. The checks run four times (make test): with
kernels, without (FINITE_WIDTH_DISABLE_EXT=1), and with the instruction set forced down to AVX2 and to generic
(FINITE_WIDTH_ISA), where only those run whose result depends on it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import finite_width as fw

COMMON_CHECKS = ("kernel", "threads", "bad_input", "opcheck", "compile")
DEVICES = ("cpu", "cuda")
# The others trace or transform the same calls, whatever their instruction set.
OF_AN_INSTRUCTION_SET = ("kernel", "threads", "bad_input", "gradcheck")
# Elements of a sample from which on second derivatives are checked in one random direction, not in all.
MOST_SECOND_DERIVATIVES = 64
CHECKS = {
    "differentiable": (*COMMON_CHECKS, "gradcheck", "gradgradcheck", "jvp", "vmap", "vmap_grad"),
    "functional": COMMON_CHECKS,
    "mutating": COMMON_CHECKS,
}


@dataclass
class Sample:
    """One call of an op."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass
class OpCase:
    """What the battery has to know of an op.

    name: the op's name in finite_width._library.SCHEMAS.
    kind: "differentiable", "functional" (no gradient) or "mutating" (writes its arguments).
    call: the public wrapper; it takes a sample's arguments.
    samples: (dtype, generator) -> samples, contiguous, non-contiguous and empty ones among them. Gradients are
        checked on those of at most 400 elements.
    bad: (arguments, exception, part of the message): each must raise, and leave its arguments as they were.
    thread_samples: larger samples for "same bits with 1 and 2 threads"; the samples themselves if left out.
    opt_outs: check -> the reason, which the run prints.
    """

    name: str
    kind: str
    call: Callable[..., Any]
    samples: Callable[[torch.dtype, torch.Generator], Sequence[Sample]]
    bad: Sequence[tuple[tuple[Any, ...], type[Exception], str]]
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    tolerance: dict[torch.dtype, float] = field(default_factory=lambda: {torch.float32: 1e-5, torch.float64: 1e-12})
    thread_samples: Callable[[torch.dtype, torch.Generator], Sequence[Sample]] | None = None
    opt_outs: dict[str, str] = field(default_factory=dict)


def battery(cases: Sequence[OpCase]) -> Callable[..., None]:
    """A test function over every (op, check) pair."""
    for case in cases:
        unknown = set(case.opt_outs) - set(CHECKS[case.kind])
        assert not unknown, f"{case.name}: opt-out of unknown checks {unknown}"
    rows = [
        pytest.param(case, check, device, id=f"{case.name}-{check}" + ("" if device == "cpu" else f"-{device}"))
        for device in DEVICES
        for case in cases
        for check in CHECKS[case.kind]
    ]

    @pytest.mark.battery
    @pytest.mark.parametrize("case, check, device", rows)
    def test_battery(case: OpCase, check: str, device: str) -> None:
        if check in case.opt_outs:
            pytest.skip(f"{case.name} opts out of {check}: {case.opt_outs[check]}")
        need_instruction_set(check)
        need(device)
        globals()[f"_check_{check}"](case if device == "cpu" else case_on(case, device))

    return test_battery


def need(device: str) -> None:
    """Skip the test where there is no such device."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


def need_instruction_set(check: str) -> None:
    """Skip a check that another run of the battery has shown, where the instruction set is forced down."""
    forced = os.environ.get("FINITE_WIDTH_ISA")
    if forced and fw.has_kernels():
        if fw.build_info()["detected_isa"] == forced:
            pytest.skip(f"{forced} is this processor's own instruction set: the run without FINITE_WIDTH_ISA shows it")
        if check not in OF_AN_INSTRUCTION_SET:
            pytest.skip(f"{check} does not depend on the instruction set: the run without FINITE_WIDTH_ISA shows it")


def moved(value: Any, device: str) -> Any:
    """Every tensor of the value on a device, with its strides; meta tensors stay."""

    def move(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device.type == "meta":
            return x
        base = torch.empty(0, dtype=x.dtype, device=device).set_(x.detach().untyped_storage().to(device=device))
        return base.as_strided(x.shape, x.stride(), x.storage_offset())

    return tree_map(move, value)


def case_on(case: OpCase, device: str) -> OpCase:
    """The same case with its samples and bad input on another device."""

    def there(make: Callable[[torch.dtype, torch.Generator], Sequence[Sample]]) -> Any:
        return lambda dtype, generator: [
            Sample(moved(s.args, device), moved(s.kwargs, device)) for s in make(dtype, generator)
        ]

    bad = [(moved(args, device), error, message) for args, error, message in case.bad]
    larger = case.thread_samples and there(case.thread_samples)
    return replace(case, samples=there(case.samples), bad=bad, thread_samples=larger)


def relative_error(result: Tensor, exact: Tensor) -> float:
    """‖result − exact‖ / ‖exact‖ in float64 (Frobenius); NaN where one of them has a NaN, so that no bound passes."""
    exact = exact.to(torch.float64)
    difference = torch.linalg.vector_norm(result.to(torch.float64) - exact)
    norm = torch.linalg.vector_norm(exact)
    return float(difference if norm == 0 else difference / norm)


def copy(value: Any) -> Any:
    """A copy of every tensor with its strides and storage offset, gaps and overlaps included."""

    def copy_tensor(x: Any) -> Any:
        if not isinstance(x, Tensor) or x.device.type == "meta":
            return x
        base = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.detach().untyped_storage().clone())
        return base.as_strided(x.shape, x.stride(), x.storage_offset())

    return tree_map(copy_tensor, value)


def _tensors(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor)]


def _run(call: Callable[..., Any], sample: Sample) -> list[Tensor]:
    """The tensors that the call returns, then its tensor arguments as they are afterwards (an op may write them)."""
    args, kwargs = copy((sample.args, sample.kwargs))
    result = call(*args, **kwargs)
    return [*_tensors(result), *_tensors((args, kwargs))]


def _upcast(sample: Sample) -> Sample:
    """The sample in float64."""
    args, kwargs = tree_map(
        lambda x: x.to(torch.float64) if isinstance(x, Tensor) and x.is_floating_point() else x,
        copy((sample.args, sample.kwargs)),
    )
    return Sample(args, kwargs)


def _samples(case: OpCase, dtype: torch.dtype) -> Sequence[Sample]:
    samples = case.samples(dtype, torch.Generator().manual_seed(0))
    assert samples, f"{case.name} has no samples"
    return samples


def _check_kernel(case: OpCase) -> None:
    for dtype in case.dtypes:
        for index, sample in enumerate(_samples(case, dtype)):
            with fw.reference_only():
                exact = _run(case.call, _upcast(sample))
            results = _run(case.call, sample)
            for result, right in zip(results, exact, strict=True):
                assert result.shape == right.shape
                error = relative_error(result, right)
                assert error <= case.tolerance[dtype], f"sample {index}, {dtype}: relative error {error:.2e}"


def has_kernel(case: OpCase, sample: Sample) -> bool:
    """Whether a compiled kernel serves the sample's device."""
    key = "CUDA" if _tensors(sample.args)[0].is_cuda else "CPU"
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"finite_width::{case.name}", key))


def _check_threads(case: OpCase) -> None:
    """The same bits with 1 thread and with 2 and 3; on a GPU, in several runs."""
    if not fw.has_kernels():
        pytest.skip("same bits for any number of threads is a promise of the kernels, not of torch's own products")
    if not has_kernel(case, case.samples(torch.float32, torch.Generator())[0]):
        pytest.skip("same bits in every run is a promise of the kernels; this op has none for the device")
    threads = torch.get_num_threads()
    make = case.thread_samples or case.samples
    for dtype in case.dtypes:
        for sample in make(dtype, torch.Generator().manual_seed(1)):
            results = []
            for count in (1, 2, 3):
                torch.set_num_threads(count)
                try:
                    results.append(_run(case.call, sample))
                finally:
                    torch.set_num_threads(threads)
            for result in results[1:]:
                for one, other in zip(results[0], result, strict=True):
                    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def _check_bad_input(case: OpCase) -> None:
    assert case.bad, f"{case.name} has no bad input"
    for args, error, message in case.bad:
        before = copy(args)
        with pytest.raises(error, match=message):
            case.call(*args)
        for now, then in zip(_tensors(args), _tensors(before), strict=True):
            if now.device.type != "meta":
                torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)


def _differentiable_calls(case: OpCase) -> Iterator[tuple[Callable[..., Any], tuple[Tensor, ...]]]:
    """(function of the floating-point tensors alone, their values in float64) for each small sample."""
    found = False
    for sample in _samples(case, torch.float64):
        leaves, spec = tree_flatten(copy((sample.args, sample.kwargs)))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
        sizes = [leaves[i].numel() for i in places]
        if sum(sizes) > 400 or min(sizes) == 0:
            continue
        found = True

        def function(*values: Tensor, leaves: Any = leaves, spec: Any = spec, places: Any = places) -> Any:
            filled = list(leaves)
            for place, value in zip(places, values, strict=True):
                filled[place] = value
            args, kwargs = tree_unflatten(filled, spec)
            outputs = tuple(out for out in _tensors(case.call(*args, **kwargs)) if out.is_floating_point())
            return outputs if len(outputs) > 1 else outputs[0]

        yield function, tuple(leaves[i] for i in places)
    assert found, f"{case.name} has no sample small enough for gradients (400 elements)"


def _check_gradcheck(case: OpCase) -> None:
    for function, values in _differentiable_calls(case):
        assert torch.autograd.gradcheck(function, [v.clone().requires_grad_() for v in values])


def _check_gradgradcheck(case: OpCase) -> None:
    for function, values in _differentiable_calls(case):
        fast = sum(v.numel() for v in values) > MOST_SECOND_DERIVATIVES
        assert torch.autograd.gradgradcheck(function, [v.clone().requires_grad_() for v in values], fast_mode=fast)


class _Recorder(TorchDispatchMode):
    """Records the arguments with which the raw op is called."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.calls: list[tuple[Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == f"finite_width::{self.name}":
            self.calls.append((func, copy(args), copy(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _check_opcheck(case: OpCase) -> None:
    called = False
    for index, sample in enumerate(_samples(case, torch.float64)):
        # Tracing takes a second a sample, and asks for ranks and dtypes; schema and fake results ask for every layout.
        checks = {} if index < 2 else {"test_utils": ("test_schema", "test_autograd_registration", "test_faketensor")}
        args, kwargs = copy((sample.args, sample.kwargs))
        with _Recorder(case.name) as recorder:
            case.call(*args, **kwargs)
        for op, op_args, op_kwargs in recorder.calls[:1]:
            called = True
            if case.kind == "differentiable":
                for tensor in _tensors((op_args, op_kwargs)):
                    tensor.requires_grad_(tensor.is_floating_point())
            torch.library.opcheck(op, op_args, op_kwargs, **checks)
    assert called, f"no sample of {case.name} reaches the op finite_width::{case.name}"


def _random_like(values: Sequence[Tensor], seed: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randn(v.shape, dtype=v.dtype, generator=generator).to(v.device) for v in values)


def _check_jvp(case: OpCase) -> None:
    """⟨u, J v⟩ = ⟨Jᵀ u, v⟩; gradcheck shows that Jᵀ is right."""
    for function, values in _differentiable_calls(case):
        tangents = _random_like(values, 2)
        outputs, directional = torch.func.jvp(function, values, tangents)
        cotangents = _random_like(_tensors(outputs), 3)
        pull = torch.func.vjp(function, *values)[1]
        gradients = pull(cotangents if isinstance(outputs, tuple) else cotangents[0])
        forward = torch.stack([(u * d).sum() for u, d in zip(cotangents, _tensors(directional), strict=True)]).sum()
        backward = torch.stack([(g * t).sum() for g, t in zip(gradients, tangents, strict=True)]).sum()
        assert forward != 0, "jvp is zero"
        torch.testing.assert_close(forward, backward, rtol=1e-10, atol=1e-10)


def _batchings(values: Sequence[Tensor]) -> Iterator[tuple[tuple[int | None, ...], tuple[Tensor, ...]]]:
    """All arguments batched, then each alone, with the batch axis in front or at the end."""
    count = len(values)
    choices = {tuple([True] * count), *(tuple(i == j for i in range(count)) for j in range(count))}
    for dim in (0, -1):
        for chosen in sorted(choices):
            stacked = [torch.stack([v] * 3, dim) for v in values]
            noise = _random_like(stacked, 4)
            batched = tuple(
                s + 0.1 * n if yes else v for v, s, n, yes in zip(values, stacked, noise, chosen, strict=True)
            )
            yield tuple(dim if yes else None for yes in chosen), batched


def _loop(function: Callable[..., Any], in_dims: tuple[int | None, ...], batched: tuple[Tensor, ...]) -> list[Tensor]:
    rows = [
        _tensors(function(*(v if d is None else v.select(d, row) for v, d in zip(batched, in_dims, strict=True))))
        for row in range(3)
    ]
    return [torch.stack(column) for column in zip(*rows, strict=True)]


def _check_vmap(case: OpCase) -> None:
    for function, values in _differentiable_calls(case):
        for in_dims, batched in _batchings(values):
            results = _tensors(torch.func.vmap(function, in_dims=in_dims)(*batched))
            for result, expected in zip(results, _loop(function, in_dims, batched), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-10, atol=1e-10)


def _loss(function: Callable[..., Any]) -> Callable[..., Tensor]:
    """A scalar function with a curved dependence on every output."""
    return lambda *values: torch.stack([(out.sin() ** 2).sum() for out in _tensors(function(*values))]).sum()


def _check_vmap_grad(case: OpCase) -> None:
    for function, values in _differentiable_calls(case):
        gradient = torch.func.grad(_loss(function), argnums=tuple(range(len(values))))
        for in_dims, batched in _batchings(values):
            results = _tensors(torch.func.vmap(gradient, in_dims=in_dims)(*batched))
            for result, expected in zip(results, _loop(gradient, in_dims, batched), strict=True):
                torch.testing.assert_close(result, expected, rtol=1e-9, atol=1e-9)


def _check_compile(case: OpCase) -> None:
    torch.compiler.reset()
    compiled = torch.compile(case.call, backend="aot_eager", fullgraph=True, dynamic=False)
    for dtype in case.dtypes:
        for sample in _samples(case, dtype)[:2]:
            for result, expected in zip(_run(compiled, sample), _run(case.call, sample), strict=True):
                assert relative_error(result, expected) <= case.tolerance[dtype]
    if case.kind != "differentiable":
        return
    for function, values in list(_differentiable_calls(case))[:2]:
        loss = _loss(function)
        gradients = []
        for run in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)):
            leaves = [v.clone().requires_grad_() for v in values]
            run(*leaves).backward()
            gradients.append([leaf.grad for leaf in leaves])
        for plain, traced in zip(*gradients, strict=True):
            torch.testing.assert_close(traced, plain, rtol=1e-10, atol=1e-10)
