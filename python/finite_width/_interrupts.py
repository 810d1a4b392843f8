"""What a call may not leave changed, in torch and in a model, also after a Ctrl-C at any moment of the call."""

from __future__ import annotations

import contextlib
import functools
import signal
import sys
from _signal import getsignal  # type: ignore[import-not-found]
from _signal import signal as set_signal
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, ParamSpec, Self, TypeVar

import torch
from torch import nn
from torch._functorch import eager_transforms
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


@contextlib.contextmanager
def grad_mode(enabled: bool) -> Iterator[None]:
    """Gradients on or off, and back as they were after a Ctrl-C at any moment.

    torch's own contexts can be interrupted between the switch and the block, and then leave it switched; and its switch
    is written in Python, where an interrupt can come first.
    """
    before = torch.is_grad_enabled()
    try:
        torch._C._set_grad_enabled(enabled)
        yield
    finally:
        torch._C._set_grad_enabled(before)


@contextlib.contextmanager
def kept_grad_mode() -> Iterator[None]:
    """Gradients on or off at the end as they were at the beginning, for calls that use torch's own switches inside."""
    with grad_mode(torch.is_grad_enabled()):
        yield


class _Eager:
    """torch.compile's stance in all blocks of `compiled_models_run_eagerly`, in any thread, and what it was before."""

    stance: Any = None
    before: Any = None
    blocks: ClassVar[set[object]] = set()  # that are open


@contextlib.contextmanager
def compiled_models_run_eagerly() -> Iterator[None]:
    """torch.compile's stance "force_eager" inside the block, and as it was behind it, after a Ctrl-C at any moment.

    torch's own context takes the stance when it is made, before its block: an interrupt there leaves it for good, and
    torch.compile then compiles nothing any more. So do two such blocks of two threads, since the stance is the
    process's: here the last one that ends puts back what the first one found. Nothing is done where torch's compiler
    was never loaded.
    """
    compiler: Any = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        yield
        return
    block = object()
    try:
        _Eager.blocks.add(block)
        if compiler._stance is not _Eager.stance:
            _Eager.before = compiler._stance
        _Eager.stance = _Eager.stance or compiler.DynamoStance("force_eager")
        compiler._set_stance(_Eager.stance)
        yield
    finally:
        _Eager.blocks.discard(block)
        if not _Eager.blocks and compiler._stance is _Eager.stance:
            compiler._stance = _Eager.before


class Uninterrupted:
    """Ctrl-C waits until the block is over, so that nothing is left half done; for blocks that are short.

    A class, and the C functions below `signal`: a generator and that module's enums take longer than a step of a small
    network. Where a Ctrl-C is nobody's, or another thread's, nothing is done.
    """

    def __enter__(self) -> None:
        self._pending: list[Any] = []
        self._before: Any = getsignal(signal.SIGINT)
        if callable(self._before):
            try:
                set_signal(signal.SIGINT, self._wait)
            except ValueError:  # in another thread than the main one, which alone sees a Ctrl-C
                self._before = None

    def __exit__(self, *raised: object) -> None:
        if callable(self._before):
            set_signal(signal.SIGINT, self._before)
            if self._pending:
                self._before(*self._pending[0])

    def _wait(self, *number_and_frame: Any) -> None:
        self._pending.append(number_and_frame)


@contextlib.contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Puts back what a forward may write: modules' attributes, their lists, dicts and sets as well, and buffers.

    The dicts also hold hooks and parameters, and what prune and the older weight_norm make from parameters.
    """
    modules = list(model.modules())
    attributes = [(vars(module), dict(vars(module))) for module in modules]
    plain = [value for _, own in attributes for value in own.values() if type(value) in _PLAIN_CONTAINERS]
    containers = [(value, value.copy()) for value in plain]
    found = {id(value): value for module in modules for value in module._buffers.values() if value is not None}
    buffers = [(value, value.clone(), value._version) for value in found.values() if not value.is_inference()]
    try:
        yield
    finally:
        for now, before in (*attributes, *containers):
            if now or before:  # a module has a dozen dicts that stay empty
                _put_back(now, before)
        for value, saved, version in buffers:
            # `.data` writes without a new version.
            dense = value.layout == torch.strided and not value.is_meta and not value.is_nested
            if value._version != version or (dense and not torch.equal(value, saved)):
                with torch.no_grad():
                    value.copy_(saved)


_PLAIN_CONTAINERS = (dict, OrderedDict, list, set)


def _put_back(now: Any, before: Any) -> None:
    """A dict, list or set, to the very same objects as before."""
    if isinstance(now, dict):
        for name in [name for name in now if name not in before]:
            del now[name]
        for name, value in before.items():
            if name not in now or now[name] is not value:
                now[name] = value
    elif isinstance(now, list):
        if len(now) != len(before) or any(one is not two for one, two in zip(now, before, strict=True)):
            now[:] = before
    elif now != before:
        now.clear()
        now.update(before)


@contextlib.contextmanager
def closed_transforms() -> Iterator[None]:
    """What an exception left open of torch.func's transforms, forward mode and modes inside is closed at the end.

    A Ctrl-C can come between the beginning of a transform and its block, or between its block and its end; then every
    later operation of the process would count as one inside of it. torch also undoes a beginning that was interrupted
    before it was made, and the error of that stands in the place of the KeyboardInterrupt; here it comes through.
    """
    depth = torch._C._functorch.get_dynamic_layer_stack_depth()
    modes = _modes()
    level, nesting, forward = forward_ad._current_level, eager_transforms.JVP_NESTING, torch._C._is_fwd_grad_enabled()
    try:
        yield
    except BaseException as error:
        _finish_contexts(error)
        _leave_transforms(depth)
        _leave_dual_levels(level)
        eager_transforms.JVP_NESTING = nesting
        torch._C._set_fwd_grad_enabled(forward)
        _set_modes(modes)
        interrupt = replaced(error)
        if interrupt is not error:
            raise interrupt from None
        raise


class FunctionMode(TorchFunctionMode):
    """A TorchFunctionMode that takes nothing but itself off torch's stack.

    torch takes a mode off while the mode handles a call; an interrupt beside that leaves it off.
    """

    def __init__(self) -> None:
        super().__init__()
        self._depths: list[int] = []  # of the stack, where the mode was entered

    def __enter__(self) -> Self:
        self._depths.append(torch._C._len_torch_function_stack())
        super().__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        if torch._C._len_torch_function_stack() > self._depths.pop():
            super().__exit__(*raised)


def _modes() -> list[TorchFunctionMode]:
    """torch's stack of function modes, outermost first."""
    return [torch._C._get_function_stack_at(index) for index in range(torch._C._len_torch_function_stack())]


def _set_modes(modes: list[TorchFunctionMode]) -> None:
    """Makes the stack of function modes hold these very modes."""
    now = _modes()
    if len(now) == len(modes) and all(one is two for one, two in zip(now, modes, strict=True)):
        return
    for _ in now:
        torch._C._pop_torch_function_stack()
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)


def _leave_transforms(depth: int) -> None:
    """Closes torch.func's transforms above this depth, one by one: torch 2.11's own function takes one too many."""
    functorch = torch._C._functorch
    kinds = functorch.TransformType
    leave = {
        kinds.Vmap: functorch._vmap_decrement_nesting,
        kinds.Grad: functorch._grad_decrement_nesting,
        kinds.Jvp: functorch._jvp_decrement_nesting,
        kinds.Functionalize: functorch._func_decrement_nesting,
    }
    while functorch.get_dynamic_layer_stack_depth() > depth:
        top = functorch.peek_interpreter_stack()
        assert top is not None
        leave[top.key()]()


def _leave_dual_levels(level: int) -> None:
    """Closes forward mode's levels above this one; the topmost may be open in C++ and not yet counted in Python."""
    for open_level in range(forward_ad._current_level + 1, level, -1):
        with contextlib.suppress(RuntimeError):  # it was not open
            torch._C._exit_dual_level(level=open_level)
    forward_ad._current_level = level


def _finish_contexts(error: BaseException | None) -> None:
    """Runs the `finally` of generators that an interrupt cut off from it.

    An interrupt at the first instruction of a context manager's `__exit__` leaves its generator suspended, alive in the
    traceback. It would go on when somebody drops that, and change what is by then another call's.
    """
    while error is not None:
        trace = error.__traceback__
        while trace is not None:
            if trace.tb_frame.f_code.co_filename == contextlib.__file__:
                with contextlib.suppress(RuntimeError):  # it still runs: a context manager around this block
                    trace.tb_frame.clear()
            trace = trace.tb_next
        error = error.__context__


def replaced(error: BaseException) -> BaseException:
    """The exception in whose place torch raised that a transform or a trace was not begun; any other error itself."""
    while error.__context__ is not None and (
        (isinstance(error, RuntimeError) and "INTERNAL ASSERT FAILED" in str(error))
        or (isinstance(error, AssertionError) and "CURRENT_PATCHER is None" in str(error))
    ):
        error = error.__context__
    return error


def ends_its_contexts(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """A function whose contexts are all over where it raises, also where an interrupt came in the end of one.

    No context can do this for itself: an interrupt at the first instruction of its `__exit__` comes before.
    """

    @functools.wraps(function)
    def call(*args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            _finish_contexts(error)
            raise

    return call
