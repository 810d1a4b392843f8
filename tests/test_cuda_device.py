"""What the CUDA kernels promise on a GPU beyond the op battery; `make gpu` runs these, elsewhere they skip."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from finite_width import _library
from finite_width.bayes import ops as bayes
from finite_width.bayes import reference
from finite_width.ntk import cuda_precision, empirical_ntk
from finite_width.ntk.contract import preserved
from finite_width.ntk.ops import conv_gradients, gram_accumulate, jacobian_accumulate, position_gradients
from finite_width.ntk.problem import Problem
from finite_width.ntk.walk import Walk
from finite_width.pathsgd.ops import path_sweep
from finite_width.tt import ops as tt
from finite_width.tt.precision import PRECISIONS
from op_battery import need, relative_error
from pathsgd.networks import lenet, mlp


@pytest.fixture(autouse=True)
def _kernels_on_a_gpu() -> None:
    need("cuda")
    if not torch._C._dispatch_has_kernel_for_dispatch_key("finite_width::path_sweep", "CUDA"):
        pytest.skip("the CUDA kernels are not registered (FINITE_WIDTH_UNTRIED_CUDA=1)")


@pytest.mark.parametrize("count", [1, 63, 65, 4097, 1_000_003])
def test_noise_weights_and_gradients_have_the_cpu_s_bits(count: int) -> None:
    if _library.COMPILED is None:
        pytest.skip("the promise is between kernels; this process has none for the CPU")
    seed = torch.tensor(-987654321987654321)
    mu, rho, grad = torch.randn(count), 3 * torch.randn(count), torch.randn(count)
    for call in (
        lambda seed, mu, rho, grad: bayes.noise(mu, seed, 3, 1),
        lambda seed, mu, rho, grad: bayes.sample(mu, rho, seed, None, 0.7)[0],
        lambda seed, mu, rho, grad: torch.stack(
            torch.ops.finite_width.bayes_sample_backward(grad, grad[0], mu, rho, seed, None, 0.7, 0, False)
        ),
    ):
        here = call(seed, mu, rho, grad)
        there = call(*(x.cuda() for x in (seed, mu, rho, grad)))
        assert torch.equal(here, there.cpu())


def test_a_sweep_can_be_captured_in_a_graph() -> None:
    def arguments(forward: bool) -> list[torch.Tensor | None]:
        torch.manual_seed(0)
        tensors = [torch.randn(300, 517), torch.randn(300, 517), None, torch.randn(300), torch.randn(300), None]
        vectors = [
            torch.rand(n + 1, dtype=torch.float64) for n in ((517, 517, 300, 300) if forward else (300, 300, 517, 517))
        ]
        return [t if t is None else t.cuda() for t in (*tensors, *vectors, torch.zeros(2, dtype=torch.float64))]

    rates = (0.1, 0.0, 0.0, 1.0, 1.0)
    for forward in (True, False):
        eager, captured = arguments(forward), arguments(forward)
        path_sweep(*eager, forward, 2.0, rates, rates)
        path_sweep(*arguments(forward), forward, 2.0, rates, rates)  # loads the kernels
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            path_sweep(*captured, forward, 2.0, rates, rates)
        graph.replay()
        for one, other in zip(eager, captured, strict=True):
            assert one is None or torch.equal(one, other)


@pytest.mark.parametrize("rows, cols", [(4000, 784), (10, 4000), (1027, 1030)])
def test_sweeps_have_the_same_bits_in_every_run(rows: int, cols: int) -> None:
    rates = (0.1, 0.9, 1.0, 0.99, 1.0)
    for forward in (True, False):
        results = []
        for _ in range(5):
            torch.manual_seed(1)
            into, out = (cols, rows) if forward else (rows, cols)
            matrices = [torch.randn(rows, cols, device="cuda") for _ in range(3)]
            vectors = [torch.rand(n + 1, dtype=torch.float64, device="cuda") for n in (into, into, out, out)]
            mass = torch.zeros(2, dtype=torch.float64, device="cuda")
            path_sweep(*matrices, None, None, None, *vectors, mass, forward, 2.0, rates, rates)
            results.append([*matrices, *vectors])
        for result in results[1:]:
            assert all(torch.equal(one, other) for one, other in zip(results[0], result, strict=True))


@pytest.mark.parametrize("precision", ["ieee", "split", "bf16"])
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_kernel_tiles_have_the_same_bits_in_every_run_and_in_a_graph(precision: str, compute: str) -> None:
    torch.manual_seed(2)
    a, d = torch.randn(1030, 770, device="cuda"), torch.randn(1030, 2, 130, device="cuda")
    shape = (1030, 1030, 2, 2) if compute == "full" else (1030, 1030)

    def run(out: torch.Tensor) -> torch.Tensor:
        with cuda_precision(precision):
            gram_accumulate(out, a, a, d, d, 1.0, compute)
        return out

    first = run(torch.zeros(shape, device="cuda"))
    assert all(torch.equal(first, run(torch.zeros(shape, device="cuda"))) for _ in range(4))
    captured = torch.zeros(shape, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(captured)
    graph.replay()
    assert torch.equal(first, captured)


@pytest.mark.parametrize("precision", ["ieee", "split"])
def test_gradients_and_long_products_have_the_same_bits_in_every_run_and_in_a_graph(precision: str) -> None:
    torch.manual_seed(3)
    input, delta = torch.randn(9, 40, 31, 30, device="cuda"), torch.randn(9, 3, 50, 31, 30, device="cuda")
    a, d = torch.randn(9, 130, 70, device="cuda"), torch.randn(9, 3, 130, 65, device="cuda")
    long = torch.randn(33, 2, 30000, device="cuda")

    def run() -> list[torch.Tensor]:
        out = torch.zeros(33, 33, 2, 2, device="cuda")
        with cuda_precision(precision):
            found = conv_gradients(input, delta, [3, 3], [1, 1], [1, 1], [1, 1], 1, True)
            jacobian_accumulate(out, long, long, "full")
            return [found, position_gradients(a, d), out]

    first = run()
    results = [run() for _ in range(3)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    for result in (*results, captured):
        assert all(torch.equal(one, other) for one, other in zip(first, result, strict=True))


def small_networks() -> dict[str, tuple[nn.Module, torch.Tensor]]:
    torch.manual_seed(4)
    convolutions = [nn.Conv2d(3, 32, 3, 2), nn.Tanh(), nn.Conv2d(32, 40, 3, padding=1), nn.Tanh()]
    return {
        "mlp": (nn.Sequential(nn.Linear(700, 300), nn.Tanh(), nn.Linear(300, 4)), torch.randn(150, 700)),
        "one output": (
            nn.Sequential(nn.Linear(700, 300), nn.Tanh(), nn.Linear(300, 200), nn.Tanh(), nn.Linear(200, 1)),
            torch.randn(150, 700),
        ),
        "cnn": (nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(40 * 49, 4)), torch.randn(20, 3, 15, 15)),
    }


@pytest.mark.parametrize("name", ["mlp", "one output", "cnn"])
@pytest.mark.parametrize("precision, bound", [("ieee", 2e-6), ("split", 1e-5), ("split-bf16", 1e-5), ("bf16", 1e-2)])
def test_no_tf32_leaks_into_a_kernel(name: str, precision: str, bound: float) -> None:
    """Against float64 on the CPU, while the user allows torch TF32 wherever it can; a leak is an error of 1e-4."""
    model, x = small_networks()[name]
    exact = empirical_ntk(copy.deepcopy(model).double(), x.double())
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        torch.set_float32_matmul_precision("medium")
        torch.backends.cudnn.allow_tf32 = True
        with cuda_precision(precision):
            found = empirical_ntk(model.cuda(), x.cuda())
        assert torch.get_float32_matmul_precision() == "medium"
        assert torch.backends.cudnn.allow_tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]
    assert relative_error(found.cpu(), exact) <= bound


@pytest.mark.parametrize("name", ["mlp", "one output", "cnn"])
@pytest.mark.parametrize("precision", ["ieee", "split"])
def test_blocks_of_a_kernel_never_wait_for_the_gpu(name: str, precision: str) -> None:
    """The plan looks at values; sweeps and products, which are repeated, only start what comes next."""
    model, x = small_networks()[name]
    model, x = model.cuda(), x.cuda()
    problem = Problem(
        model, x, None, compute="full", method="auto", params=None, output=None, memory_budget=None, progress=False,
        check=False,
    )  # fmt: skip
    with cuda_precision(precision), preserved(model):
        plan = problem.plan()
        out = problem.empty(plan.outputs)
        walk = Walk(problem, plan, [out] * len(plan.entries))
        walk.run(1)  # loads the kernels
        torch.cuda.set_sync_debug_mode("error")
        try:
            walk.run(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(
    "dtype, precision", [(torch.bfloat16, "ieee"), (torch.float32, "split"), (torch.float32, "ieee")]
)
def test_tensor_trains_have_the_same_bits_in_every_run_and_in_a_graph(dtype: torch.dtype, precision: str) -> None:
    torch.manual_seed(3)
    shapes = [(1, 8, 8, 9), (9, 7, 8, 9), (9, 8, 5, 9), (9, 8, 7, 1)]
    cores = [torch.randn(shape, device="cuda").mul_(0.3).to(dtype) for shape in shapes]
    x, grad = (torch.randn(1030, size, device="cuda").to(dtype) for size in (2240, 3584))
    plan = (2, 0, 0, 0, 0, 0, PRECISIONS.index(precision))

    def run() -> list[torch.Tensor]:
        return [tt.tt_linear(x, cores, None, plan), *tt.tt_linear_backward(grad, x, cores, plan, (1, 1, 1))]

    first = run()
    for _ in range(4):
        assert all(torch.equal(one, other) for one, other in zip(first, run(), strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    graph.replay()
    assert all(torch.equal(one, other) for one, other in zip(first, captured, strict=True))


def test_rows_of_a_tensor_train_do_not_depend_on_the_rows_beside_them() -> None:
    cores = [torch.randn(1, 32, 32, 8, device="cuda").bfloat16(), torch.randn(8, 32, 32, 1, device="cuda").bfloat16()]
    x = torch.randn(70, 1024, device="cuda").bfloat16()
    y = tt.tt_linear(x, cores, None, (1, 0, 0, 0, 0, 0))
    assert torch.equal(y[13:14], tt.tt_linear(x[13:14].contiguous(), cores, None, (1, 0, 0, 0, 0, 0)))


def test_normals_are_within_their_bound() -> None:
    """8 units of 2^-24 of themselves, against float64 from the same words."""
    count = 1 << 20
    like, seed = torch.empty(count, device="cuda"), torch.tensor(7, device="cuda")
    words = reference.philox(torch.arange(count // 4, device="cuda"), seed, 0, 0)
    exact = torch.stack([*reference.box_muller(words[0], words[1]), *reference.box_muller(words[2], words[3])])
    exact = exact.reshape(4, -1, 16).transpose(0, 1).reshape(-1)
    error = (bayes.noise(like, seed).double() - exact).abs()
    assert bool((error <= 8 * 2.0**-24 * exact.abs() + 1e-30).all())


def batch(model: nn.Module, seed: int, shape: tuple[int, ...] = (20,)) -> None:
    """Fresh gradients of a loss, in the tensors that hold them already."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, *shape, generator=generator).cuda()
    gradients = torch.autograd.grad(F.cross_entropy(model(x), torch.arange(8).cuda() % 2), list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        if parameter.grad is None:
            parameter.grad = torch.empty_like(parameter)
        parameter.grad.copy_(gradient)


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(("make", "shape"), [(lambda: mlp(20, 150, 70, 2), (20,)), (lenet, (1, 28, 28))])
def test_training_does_not_feel_powers_of_two(make: Callable[[], nn.Module], shape: tuple[int, ...], p: float) -> None:
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        model = make().cuda()
        other = copy.deepcopy(model)
        on_cpu = copy.deepcopy(other).cpu()
        fw.pathsgd.rescale_(on_cpu, seed=0, power_of_two=True, input_shape=shape)
        other.load_state_dict(on_cpu.state_dict())
        for each in (model, other):
            optimizer = fw.pathsgd.PathSGD(each, 1e-3, p=p, momentum=0.9, input_shape=shape)
            for seed in range(6):
                batch(each, seed, shape)
                optimizer.step()
        x = torch.randn(4, *shape, device="cuda")
        assert torch.equal(model(x), other(x))
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("settings", [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}])
def test_a_captured_step_is_an_eager_one(settings: dict[str, Any]) -> None:
    """Bit for bit over an odd number of replays, with eager steps before and after, and without waiting."""
    torch.manual_seed(0)
    model = mlp(20, 150, 70, 2).cuda()
    other = copy.deepcopy(model)
    rates = [torch.tensor(1e-3, device="cuda") for _ in range(2)]
    optimizers = [
        fw.pathsgd.PathSGD(each, lr, capturable=True, **settings)
        for each, lr in zip((model, other), rates, strict=True)
    ]
    for each, optimizer in zip((model, other), optimizers, strict=True):
        batch(each, 0)
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    kept = copy.deepcopy([model.state_dict(), optimizers[0].state_dict()["state"]])
    with torch.cuda.graph(graph):
        optimizers[0].step()
    for parameter, value in zip(model.parameters(), kept[0].values(), strict=True):
        assert torch.equal(parameter, value)  # a capture runs nothing
    for seed in range(1, 6):
        for each, lr in zip((model, other), rates, strict=True):
            batch(each, seed)
            lr.mul_(0.9)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            graph.replay()
            optimizers[1].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    for each, optimizer in zip((model, other), optimizers, strict=True):
        batch(each, 9)
        optimizer.step()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


def test_found_inf_leaves_a_step_out() -> None:
    torch.manual_seed(0)
    for make, shape in ((lambda: mlp(20, 150, 70, 2), (20,)), (lenet, (1, 28, 28))):
        model = make().cuda()
        optimizer = fw.pathsgd.PathSGD(model, 1e-4, momentum=0.9, input_shape=shape)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
        for step in range(4):
            batch(model, step, shape)
            scale = scaler.scale(torch.ones((), device="cuda"))
            for parameter in model.parameters():
                parameter.grad.mul_(scale)
            if step == 2:
                next(model.parameters()).grad.view(-1)[0] = math.inf
            before = copy.deepcopy([list(model.parameters()), optimizer.state_dict()["state"]])
            scaler.step(optimizer)
            scaler.update()
            same = all(torch.equal(one, two) for one, two in zip(model.parameters(), before[0], strict=True))
            assert same == (step == 2)
            for index, state in optimizer.state_dict()["state"].items():
                if step == 2:
                    assert torch.equal(state["momentum_buffer"], before[1][index]["momentum_buffer"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_the_wide_ones_rounded(dtype: torch.dtype) -> None:
    mu, rho, grad = (torch.randn(100_003, device="cuda") for _ in range(3))
    seed = torch.tensor(3, device="cuda")
    wide, kl = bayes.sample(mu, rho, seed, None, 1.0)
    narrow, same_kl = bayes.sample(mu, rho, seed, None, 1.0, dtype=dtype)
    assert torch.equal(narrow, wide.to(dtype))
    assert torch.equal(kl, same_kl)
    backward = torch.ops.finite_width.bayes_sample_backward
    rest = (kl, mu, rho, seed, None, 1.0, 0, False)
    for one, two in zip(backward(grad.to(dtype), *rest), backward(grad.to(dtype).float(), *rest), strict=True):
        assert torch.equal(one, two)
