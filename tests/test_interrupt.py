"""Ctrl-C at any moment of a long call: the model and the optimizer are as they were, or as after whole steps."""

from __future__ import annotations

import copy
import inspect
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import eval_frame
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace
from torch.overrides import BaseTorchFunctionMode

import finite_width as fw
from finite_width._interrupts import Uninterrupted, closed_transforms


@pytest.fixture(autouse=True)
def grad_mode() -> Iterator[None]:
    """Keep a failure here from failing every later test: gradients may be left off, a transform open."""
    with closed_transforms():
        yield
    torch.set_grad_enabled(True)


def interrupt(call: Callable[[], Any], after: float) -> None:
    """Run a call, again and again, until a KeyboardInterrupt comes after some seconds.

    Python drops an exception that a signal raises inside a finalizer: then the next signal, a second later, interrupts.
    """

    def handler(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, after, 1.0)
        while True:
            call()
    except KeyboardInterrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def at_many_moments(call: Callable[[], Any], check: Callable[[], None], moments: int = 12) -> None:
    """Interrupt the call at moments spread over its duration, and check after each."""
    call()
    started = time.perf_counter()
    call()
    duration = time.perf_counter() - started
    for moment in range(moments):
        interrupt(call, max(1e-4, duration * (moment + 0.5) / moments))
        check()


def at_torchs_doors(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], check: Callable[[], None], moments: int = 200
) -> None:
    """Interrupt the call where it enters functions by which torch begins and ends what holds for the whole process.

    A signal's handler runs where a function begins, and so does this: in contexts, transforms, modes, dual levels, and
    torch.fx's patches. A generator is left out: an exception that comes while one is finalised is dropped by Python.
    """
    count, target = 0, 0

    def trace(frame: FrameType, event: str, _: Any) -> None:
        nonlocal count
        code = frame.f_code
        if event != "call" or code.co_flags & inspect.CO_GENERATOR or not code.co_filename.endswith(DOORS):
            return
        count += 1
        if count == target:
            raise KeyboardInterrupt

    def run(at: int) -> None:
        nonlocal count, target
        count, target = 0, at
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(None)

    call()
    run(0)
    total, interrupted = count, 0
    dropped: list[Any] = []  # exceptions that Python dropped, since they came while it finalised something
    monkeypatch.setattr(sys, "unraisablehook", dropped.append)
    for at in sorted({1 + moment * (total - 1) // (moments - 1) for moment in range(moments)}):
        before = switches()
        dropped.clear()
        try:
            run(at)
        except KeyboardInterrupt:
            interrupted += 1
            assert switches() == before  # while the traceback is still there, and once it is gone
        else:
            assert dropped or count < at, "the call went on after an interrupt"
        assert switches() == before
        check()
    assert interrupted > moments // 2 or interrupted > total // 2


DOORS = (
    "contextlib.py",
    "torch/_functorch/vmap.py",
    "torch/_functorch/predispatch.py",
    "torch/_functorch/eager_transforms.py",
    "torch/_dynamo/decorators.py",
    "torch/_dynamo/eval_frame.py",
    "torch/_export/utils.py",
    "torch/autograd/forward_ad.py",
    "torch/autograd/grad_mode.py",
    "torch/fx/_symbolic_trace.py",
    "torch/nn/utils/stateless.py",
    "torch/overrides.py",
)


def switches() -> dict[str, Any]:
    """What torch holds for the whole process."""
    return {
        "transforms": torch._C._functorch.get_dynamic_layer_stack_depth(),
        "modes": torch._C._len_torch_function_stack(),
        "dual level": forward_ad._current_level,
        "nested jvp": eager_transforms.JVP_NESTING,
        "forward mode": torch._C._is_fwd_grad_enabled(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "fused attention": torch.backends.cuda.flash_sdp_enabled(),
        "torch.compile's stance": eval_frame._stance.stance,
        "tracing": (_symbolic_trace.CURRENT_PATCHER, _symbolic_trace.is_fx_tracing()),
        "module's methods": (nn.Module.__call__, nn.Module.__getattr__),
    }


def facts(model: nn.Module) -> dict[str, Any]:
    """What a call may not leave changed: values, grads, flags, hooks, and the kinds of modules."""
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "grads": {name: p.grad is None for name, p in model.named_parameters()},
        "requires_grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "training": [m.training for m in model.modules()],
        "hooks": hooks,
        "kinds": [type(m).__name__ for m in model.modules()],
    }


def same(model: nn.Module, expected: dict[str, Any]) -> None:
    found = facts(model)
    values, rights = found.pop("values"), dict(expected)
    for name, value in rights.pop("values").items():
        assert torch.equal(values[name], value), name
    assert found == rights


def network(width: int = 64) -> nn.Sequential:
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), nn.ReLU(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(8 * 12 * 12, width), nn.ReLU(), nn.Linear(width, 3))


@pytest.mark.parametrize("method", ["structured", "jacobian"])
def test_empirical_ntk(method: str) -> None:
    model, x = network(), torch.randn(40, 3, 12, 12)
    expected, right = facts(model), fw.ntk.empirical_ntk(model, x, method=method)
    at_many_moments(lambda: fw.ntk.empirical_ntk(model, x, method=method), lambda: same(model, expected))
    assert torch.equal(fw.ntk.empirical_ntk(model, x, method=method), right)


@pytest.mark.parametrize("method", ["structured", "jacobian", "products"])
def test_a_kernel_at_torchs_doors(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.LayerNorm(4), nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)]
    model, x = nn.Sequential(*layers), torch.randn(3, 3, 6, 6)
    expected, right = facts(model), fw.ntk.empirical_ntk(model, x, method=method)
    at_torchs_doors(monkeypatch, lambda: fw.ntk.empirical_ntk(model, x, method=method), lambda: same(model, expected))
    assert torch.equal(fw.ntk.empirical_ntk(model, x, method=method), right)


def test_products_at_torchs_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x, vector = network(4), torch.randn(2, 3, 12, 12), torch.randn(6)
    expected, right = facts(model), fw.ntk.NTKOperator(model, x) @ vector
    at_torchs_doors(monkeypatch, lambda: fw.ntk.NTKOperator(model, x) @ vector, lambda: same(model, expected))
    assert torch.equal(fw.ntk.NTKOperator(model, x) @ vector, right)


def test_paths_at_torchs_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), fw.tt.TTLinear(64, 8, rank=2), nn.ReLU(), nn.Linear(8, 2)]
    model = nn.Sequential(*layers)

    def call() -> Tensor:
        return fw.pathsgd.path_norm(model, input_shape=(3, 6, 6))

    expected, right = facts(model), call()
    at_torchs_doors(monkeypatch, call, lambda: same(model, expected))
    assert torch.equal(call(), right)


@pytest.mark.parametrize("replace", [lambda model: fw.tt.compress(model, max_rank=2), fw.bayes.convert])
def test_replacing_layers_at_torchs_doors(replace: Callable[[nn.Module], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    models = [plain]

    def call() -> None:
        models[0] = copy.deepcopy(plain)
        replace(models[0])

    def check() -> None:  # all layers are replaced or none
        found = [type(layer) for layer in models[0]]
        assert found in (before, after)

    before = [type(layer) for layer in plain]
    call()
    after = [type(layer) for layer in models[0]]
    assert after != before
    at_torchs_doors(monkeypatch, call, check)


def test_predictions_at_torchs_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(fw.bayes.BayesLinear(8, 6), nn.ReLU(), fw.bayes.BayesLinear(6, 3))
    x, expected = torch.randn(5, 8), facts(model)
    at_torchs_doors(monkeypatch, lambda: fw.bayes.predict(model, x, samples=6), lambda: same(model, expected))


def test_refreshing_at_torchs_doors(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
    optimizer, expected = fw.pathsgd.PathSGD(model, lr=1e-3), facts(model)
    at_torchs_doors(monkeypatch, optimizer.refresh, lambda: same(model, expected))


def test_another_error_comes_through() -> None:
    """A model's own error stays what it is, also where it was raised beside an interrupt that somebody had caught."""

    class Failing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            try:
                raise KeyboardInterrupt
            except KeyboardInterrupt:
                raise OSError("no such file") from None

    with pytest.raises(OSError, match="no such file"):
        fw.ntk.empirical_ntk(Failing(4, 2), torch.randn(3, 4))


def test_an_interrupted_vmap_is_closed() -> None:
    """The moment in which torch.func.vmap has begun and its block has not: every later call would be inside of it."""
    depth = torch._C._functorch.get_dynamic_layer_stack_depth

    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            torch._C._functorch._vmap_increment_nesting(2, "error")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fw.ntk.empirical_ntk(Interrupted(4, 2), torch.randn(3, 4))
    assert depth() == 0
    with pytest.raises(KeyboardInterrupt):
        fw.ntk.NTKOperator(Interrupted(4, 2), torch.randn(3, 4))
    assert depth() == 0


@pytest.mark.parametrize("left_open", [True, False])
def test_an_interrupted_mode_is_closed(left_open: bool) -> None:
    """The moments in which torch has put a mode on its stack before its block, or taken it off for a call."""
    depth = torch._C._len_torch_function_stack

    class Interrupted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if left_open:
                BaseTorchFunctionMode().__enter__()
            else:
                torch._C._pop_torch_function_stack()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fw.ntk.empirical_ntk(Interrupted(4, 2), torch.randn(3, 4))
    assert depth() == 0
    with BaseTorchFunctionMode():  # the caller's own stays
        with pytest.raises(KeyboardInterrupt):
            fw.ntk.empirical_ntk(Interrupted(4, 2), torch.randn(3, 4))
        assert depth() == 1


def test_two_threads_leave_torch_compile_as_it_was() -> None:
    """The one that began first ends first: the other one still sees its model's calls, and then all is as before."""

    class Waiting(nn.Linear):
        def __init__(self) -> None:
            super().__init__(4, 2)
            self.begun, self.go_on = threading.Event(), threading.Event()

        def forward(self, x: Tensor) -> Tensor:
            self.begun.set()
            assert self.go_on.wait(60)
            return super().forward(x)

    models = [Waiting(), Waiting()]
    threads = [threading.Thread(target=fw.ntk.empirical_ntk, args=(model, torch.randn(3, 4))) for model in models]
    for thread, model in zip(threads, models, strict=True):
        thread.start()
        assert model.begun.wait(60)
    seen = []
    for thread, model in zip(threads, models, strict=True):
        seen.append(eval_frame._stance.stance)
        model.go_on.set()
        thread.join()
    assert [*seen, eval_frame._stance.stance] == ["force_eager", "force_eager", "default"]


def test_an_interrupt_waits_for_the_block(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    passed = []

    def work() -> None:
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
                passed.append("inner block")
            passed.append("outer block")

    with pytest.raises(KeyboardInterrupt):
        work()
    assert passed == ["inner block", "outer block"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_interrupt_that_is_ignored_stays_so(request: pytest.FixtureRequest) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    with Uninterrupted():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN


def test_another_thread_is_not_interrupted() -> None:
    passed = []

    def work() -> None:
        with Uninterrupted():
            passed.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert passed == [signal.getsignal(signal.SIGINT)]


def test_regressor() -> None:
    model, x, y = network(), torch.randn(48, 3, 12, 12), torch.randn(48, 3)
    expected = facts(model)
    regressor = fw.ntk.NTKRegressor(model, ridge=1e-2)
    at_many_moments(lambda: regressor.fit(x, y), lambda: same(model, expected), 6)
    assert regressor.fit(x, y).predict(x[:2]).shape == (2, 3)


def test_path_sgd() -> None:
    """An interrupted loop can go on: every value finite, and further steps lower the loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 4))
    x, y = torch.randn(128, 64), torch.randint(4, (128,))
    optimizer = fw.pathsgd.PathSGD(model, lr=1e-4, momentum=0.5)

    def loop(steps: int = 8) -> Tensor:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
        return loss.detach()

    first = loop(1)

    def check() -> None:
        assert torch.is_grad_enabled()
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        assert len(optimizer.state_dict()["param_groups"]) == 1

    at_many_moments(loop, check)
    assert loop(20) < first


def test_bayes_predict() -> None:
    model = nn.Sequential(fw.bayes.BayesLinear(200, 400), nn.ReLU(), fw.bayes.BayesLinear(400, 3))
    x = torch.randn(64, 200)
    expected = facts(model)
    at_many_moments(lambda: fw.bayes.predict(model, x, samples=200), lambda: same(model, expected))


def test_bayes_convert_is_all_or_nothing() -> None:
    plain = nn.Sequential(*(nn.Linear(150, 150) for _ in range(40)))
    kinds: set[frozenset[str]] = set()
    models = [copy.deepcopy(plain)]

    def convert() -> None:
        models[0] = copy.deepcopy(plain)
        fw.bayes.convert(models[0], init="moped")

    def check() -> None:
        kinds.add(frozenset(type(layer).__name__ for layer in models[0]))

    at_many_moments(convert, check)
    assert kinds <= {frozenset({"Linear"}), frozenset({"BayesLinear"})}
