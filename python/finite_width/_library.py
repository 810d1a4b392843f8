"""The torch.ops library: every op's schema in one place, the compiled module, and the switch to the references."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, TypeVar

import torch
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

VERSION = "0.1.0"

# Name -> schema, wing by wing. `(a!)` marks an argument that the op writes. No default values: the dispatcher drops
# arguments that equal theirs, and a backward would then see fewer inputs than it returns gradients.
SCHEMAS: dict[str, str] = {
    # Shared.
    "gemm": "(Tensor a, Tensor b, Tensor? bias) -> Tensor",
    # NTK.
    "ntk_gram_accumulate": "(Tensor(a!) out, Tensor a1, Tensor a2, Tensor d1, Tensor d2, float bias, "
    "int compute, int precision) -> ()",
    "ntk_jacobian_accumulate": "(Tensor(a!) out, Tensor j1, Tensor j2, int compute, int precision) -> ()",
    "ntk_ghost_accumulate": "(Tensor(a!) out, Tensor a1, Tensor a2, Tensor d1, Tensor d2, float bias, "
    "int compute, int precision) -> ()",
    "ntk_position_gradients": "(Tensor a, Tensor d, int precision) -> Tensor",
    "ntk_conv_gradients": "(Tensor input, Tensor delta, int[] kernel_size, int[] stride, int[] padding, "
    "int[] dilation, int groups, bool bias, int precision) -> Tensor",
    "ntk_convolve": "(Tensor input, Tensor weight, Tensor? bias, Tensor? gate, int[] padding, int[] dilation, "
    "int groups, bool local) -> Tensor",
    "ntk_gated_product": "(Tensor a, Tensor b, Tensor gate) -> Tensor",
    # Tensor-Train.
    "tt_linear": "(Tensor x, Tensor[] cores, Tensor? bias, int[] plan) -> Tensor",
    "tt_linear_backward": "(Tensor grad, Tensor x, Tensor[] cores, int[] plan, int[] needs) -> Tensor[]",
    # Path-SGD.
    "path_sweep": "(Tensor(a!) weight, Tensor? grad, Tensor(b!)? momentum, Tensor(c!)? bias, Tensor? bias_grad, "
    "Tensor(d!)? bias_momentum, Tensor from_old, Tensor from_new, Tensor(e!) across, Tensor(f!) fresh, "
    "Tensor(g!) mass, bool forward, float p, float[] weight_rates, float[] bias_rates, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? weight_lr, Tensor? bias_lr) -> ()",
    "path_step": "(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momenta, Tensor(c!)[] biases, "
    "Tensor[] bias_grads, Tensor(d!)[] bias_momenta, Tensor(e!) vectors, Tensor(f!) state, float p, float[] rates, "
    "Tensor[] lrs, Tensor? grad_scale, Tensor? found_inf, int rebuild) -> ()",
    "path_update": "(Tensor(a!) param, Tensor grad, Tensor(b!)? momentum, Tensor mass, Tensor exponent, float p, "
    "float[] rates, Tensor? grad_scale, Tensor? found_inf, Tensor? lr) -> ()",
    "path_convolution": "(Tensor x, Tensor weight, float p, int[] stride, int[] padding, int[] dilation, "
    "int groups) -> Tensor",
    "path_convolution_backward": "(Tensor known, Tensor x, Tensor weight, float p, int[] stride, int[] padding, "
    "int[] dilation, int groups) -> Tensor",
    "path_convolution_update": "(Tensor(a!) weight, Tensor grad, Tensor(b!)? momentum, Tensor x, Tensor known, "
    "Tensor exponent, float p, float[] rates, int[] stride, int[] padding, int[] dilation, int groups, "
    "Tensor? grad_scale, Tensor? found_inf, Tensor? lr) -> ()",
    # Bayes.
    "bayes_noise": "(Tensor like, Tensor seed, int sample, int stream) -> Tensor",
    "bayes_sample": "(Tensor mu, Tensor rho, Tensor seed, Tensor? prior_mean, float? prior_std, int stream,"
    " bool centred, ScalarType? dtype) -> (Tensor, Tensor)",
    "bayes_sample_backward": "(Tensor? grad, Tensor? grad_kl, Tensor mu, Tensor rho, Tensor? seed, Tensor? prior_mean,"
    " float? prior_std, int stream, bool centred) -> (Tensor, Tensor)",
    "bayes_kl": "(Tensor[] mu, Tensor[] rho, Tensor[] prior_mean, float[] prior_std) -> Tensor",
    "bayes_kl_backward": "(Tensor grad, Tensor[] mu, Tensor[] rho, Tensor[] prior_mean, float[] prior_std) -> Tensor[]",
    "bayes_linear": "(Tensor x, Tensor weight_mu, Tensor weight_rho, Tensor? bias_mu, Tensor? bias_rho, Tensor seed,"
    " Tensor? weight_prior_mean, Tensor? bias_prior_mean, float? prior_std) -> (Tensor, Tensor)",
    "bayes_linear_backward": "(Tensor grad_y, Tensor? grad_kl, Tensor x, Tensor weight_mu, Tensor weight_rho,"
    " Tensor? bias_mu, Tensor? bias_rho, Tensor seed, Tensor? weight_prior_mean, Tensor? bias_prior_mean,"
    " float? prior_std, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "bayes_local": "(Tensor x, Tensor weight_mu, Tensor weight_rho, Tensor? bias_mu, Tensor? bias_rho, Tensor seed,"
    " Tensor? weight_prior_mean, Tensor? bias_prior_mean, float? prior_std) -> (Tensor, Tensor, Tensor)",
    "bayes_local_backward": "(Tensor grad_y, Tensor? grad_kl, Tensor x, Tensor weight_mu, Tensor weight_rho,"
    " Tensor? bias_mu, Tensor? bias_rho, Tensor seed, Tensor? weight_prior_mean, Tensor? bias_prior_mean,"
    " float? prior_std, Tensor deviation, bool needs_x) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    "bayes_linear_samples": "(Tensor x, Tensor weight_mu, Tensor weight_rho, Tensor? bias_mu, Tensor? bias_rho,"
    " Tensor seed, int first, SymInt samples) -> Tensor",
}

_LIBRARY = torch.library.Library("finite_width", "DEF")
for _name, _schema in SCHEMAS.items():
    _LIBRARY.define(_name + _schema)

# Name -> the plain-torch definition; filled by `register`.
REFERENCES: dict[str, Callable[..., Any]] = {}


def register(name: str, reference: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register an op's reference and shape function; returns the op, `torch.ops.finite_width.<name>`.

    The reference is registered under CompositeExplicitAutograd: where the compiled module has a kernel for the
    device, the kernel wins; else the reference runs.

    Args:
        name: a key of `SCHEMAS`.
        reference: the op in plain torch, with the schema's arguments.
        fake: computes the result's shape and dtype alone, for torch.compile.
    """
    _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"finite_width::{name}", fake, lib=_LIBRARY)
    REFERENCES[name] = reference
    return getattr(torch.ops.finite_width, name).default


def differentiable(op: Any, function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """One callable for a differentiable op, right in eager mode, under torch.func and under torch.compile.

    In eager mode it is `function`, whose `jvp`, `vmap` and double backward all work; while compiling it is the op
    itself with the same backward, since torch.compile refuses a Function with a `jvp`.

    Args:
        op: what `register` returned.
        function: an autograd.Function with `setup_context`, `backward`, `jvp` and `vmap`, whose `forward` calls `op`.
    """
    derivatives(op, function.setup_context, function.backward, function.vmap)
    apply = applied(function)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        if transformed() or (
            torch.is_grad_enabled() and any(isinstance(value, torch.Tensor) and value.requires_grad for value in args)
        ):
            return apply(*args)
        return below_autograd(op, *args)

    return call


_Function = TypeVar("_Function", bound=Callable[..., Any])


def constant_while_tracing(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result`, which would load torch's compiler: as long as torch itself takes.

    A function of shapes and settings alone, which torch.compile calls while it traces.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _one_level(jvp: Callable[..., Any]) -> Callable[..., Any]:
    """A Function's jvp that raises inside of two forward-mode derivatives, where torch would return 0 for the second.

    torch calls jvp with forward mode switched off at every level, so what it computes has no tangents.
    """

    @functools.wraps(jvp)
    def checked(*args: Any) -> Any:
        stack = torch._C._functorch.get_interpreter_stack() or []
        if sum(level.key() == torch._C._functorch.TransformType.Jvp for level in stack) > 1:
            raise NotImplementedError(
                "finite_width's ops have no forward-mode derivative of a forward-mode derivative (jvp of jvp, jacfwd "
                "of jacfwd); take one of the two in reverse mode: jvp of grad, or torch.func.hessian"
            )
        return jvp(*args)

    return checked


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """`function.apply`, 50 µs cheaper a call where neither torch.func nor forward-mode derivatives are at work.

    Nested forward mode is refused (`_one_level`).

    There, `apply` binds its arguments to forward's signature in Python, and the op inside meets its own autograd once
    more; so the plain calls of training go to a twin of the Function that does neither. Both save the same tensors and
    run the same backward.

    Args:
        function: an autograd.Function with `setup_context`.
    """
    function.jvp = staticmethod(_one_level(function.jvp))  # type: ignore[assignment]
    # Under torch.func the binding remains: with the signature made once, 25 µs of it are gone.
    function.forward.__signature__ = inspect.signature(function.forward)  # type: ignore[attr-defined]

    def forward(ctx: Any, *args: Any) -> Any:
        output = below_autograd(function.forward, *args)
        function.setup_context(ctx, args, output)
        return output

    def save_for_forward(ctx: Any, *tensors: torch.Tensor) -> None:
        """Nothing: the twin has no jvp that would read them."""

    body = {
        "forward": staticmethod(forward),
        "backward": staticmethod(function.backward),
        "save_for_forward": save_for_forward,
    }
    twin = type(function.__name__, (torch.autograd.Function,), body)
    plain = super(torch.autograd.Function, twin).apply  # type: ignore[misc]  # the C++ half of Function.apply

    def apply(*args: Any) -> Any:
        return function.apply(*args) if transformed() else plain(*args)

    return apply


def transformed() -> bool:
    """Whether a torch.func transform or forward-mode differentiation is under way."""
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def below_autograd(call: Callable[..., Any], *args: Any) -> Any:
    """An op, or what calls one, without the detour through the op's autograd: for calls that nothing differentiates."""
    with torch._C._AutoDispatchBelowAutograd():
        return call(*args)


def derivatives(
    op: Any, setup_context: Callable[..., Any], backward: Callable[..., Any], vmap: Callable[..., Any]
) -> None:
    """Register the raw op's own autograd and vmap rules, which torch.compile uses.

    Args:
        op: what `register` returned.
        setup_context, backward, vmap: as those of an autograd.Function, with the op's arguments; a list of tensors
            among them is one argument, whose gradient is a list.
    """
    name = op._schema.name
    torch.library.register_autograd(name, backward, setup_context=setup_context, lib=_LIBRARY)
    torch.library.register_vmap(name, vmap, lib=_LIBRARY)


def nothing_to_differentiate() -> bool:
    """Whether a raw op may be called in place of its autograd.Function: no gradients, dual numbers or transforms."""
    return not torch.is_grad_enabled() and not transformed()


class _ReferenceMode(TorchDispatchMode):
    """Sends this library's ops to their references."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "finite_width":
            return REFERENCES[func._schema.name.split("::")[1]](*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def reference_only() -> Iterator[None]:
    """Run this library's ops in plain torch inside the block, without the compiled kernels.

    For comparing a kernel with its definition. It holds in eager mode, with autograd and under vmap.

    Raises:
        RuntimeError: inside torch.compile, which cannot trace such a mode. There, set
            FINITE_WIDTH_DISABLE_EXT=1 before the import instead.

    Example:
        >>> import torch, finite_width as fw
        >>> with fw.reference_only():
        ...     fw.build_info()["kernels"]
        'reference_only()'
    """
    if torch.compiler.is_compiling():
        raise RuntimeError(
            "fw.reference_only() is a dispatch mode, which torch.compile cannot trace; "
            "set FINITE_WIDTH_DISABLE_EXT=1 before importing finite_width instead"
        )
    global _reference_depth
    _reference_depth += 1
    try:
        with _ReferenceMode():
            yield
    finally:
        _reference_depth -= 1


_reference_depth = 0


def _schema_fingerprint() -> str:
    """What setup.py wrote into the compiled module, of the schemas that it was built for."""
    return hashlib.sha256(json.dumps(SCHEMAS, sort_keys=True).encode()).hexdigest()[:16]


def _load_compiled_module() -> ModuleType | None:
    """The module finite_width._C, or None where it was not built or is switched off."""
    if os.environ.get("FINITE_WIDTH_DISABLE_EXT") == "1":
        return None
    if importlib.util.find_spec("finite_width._C") is None:
        return None  # a pure-Python install; `build_info()` says so
    # A module that is there but does not load is an error to see, never to swallow.
    module = importlib.import_module("finite_width._C")
    if module.version != VERSION:
        raise ImportError(
            f"finite_width {VERSION} found a compiled module of version {module.version}; reinstall finite-width"
        )
    if getattr(module, "schemas", None) != _schema_fingerprint():
        raise ImportError(
            f"{module.__file__} was built for other schemas than {__file__} has, and its kernels would be called with "
            "the wrong arguments; rebuild it: `make setup` in a clone, or reinstall finite-width"
        )
    return module


COMPILED: ModuleType | None = _load_compiled_module()


def has_kernels() -> bool:
    """Whether the compiled kernels are loaded and in force.

    Example:
        >>> import finite_width as fw
        >>> isinstance(fw.has_kernels(), bool)
        True
    """
    return COMPILED is not None and _reference_depth == 0


def has_kernel(name: str, device: torch.device) -> bool:
    """Whether a compiled kernel of this op is in force for tensors on the device."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device.type)
    return (
        key is not None
        and _reference_depth == 0
        and torch._C._dispatch_has_kernel_for_dispatch_key(f"finite_width::{name}", key)
    )


def _cuda_kernels(architectures: str) -> str:
    """Whether tensors on a GPU take compiled kernels, in words."""
    if not architectures:
        return "not built: plain torch on a GPU"
    if os.environ.get("FINITE_WIDTH_UNTRIED_CUDA") == "1":
        return "registered by FINITE_WIDTH_UNTRIED_CUDA=1; never run on a GPU"
    return "compiled but not registered, since no GPU has run them: plain torch on a GPU (FINITE_WIDTH_UNTRIED_CUDA=1)"


def empty_cache() -> None:
    """Gives memory that results have left behind, and that is kept for the next ones, back to the system.

    Kernels on the CPU make results of 1 MiB and more in blocks of their own; up to 256 MiB of freed ones are kept,
    since a training step or a kernel's sweep makes the same ones again. Tensors in use stay as they are.

    Example:
        >>> import finite_width as fw
        >>> fw.empty_cache()
    """
    if COMPILED is not None:
        COMPILED.release_kept()


def build_info() -> dict[str, Any]:
    """Facts about this installation: versions, compiler, instruction set, GEMM table, CUDA, threads.

    Returns:
        A dict of printable values. `kernels` is "compiled", or the reason why the references run instead.

    Example:
        >>> import finite_width as fw
        >>> fw.build_info()["version"]
        '0.1.0'
    """
    if _reference_depth:
        kernels = "reference_only()"
    elif COMPILED is not None:
        kernels = "compiled"
    elif os.environ.get("FINITE_WIDTH_DISABLE_EXT") == "1":
        kernels = "switched off by FINITE_WIDTH_DISABLE_EXT=1"
    else:
        kernels = "not built: plain torch"
    info: dict[str, Any] = {
        "version": VERSION,
        "kernels": kernels,
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "ops": sorted(SCHEMAS),
    }
    if COMPILED is not None:
        from ._gemm import table

        facts = COMPILED.build_facts()
        info |= {"cuda_kernels": _cuda_kernels(facts["cuda_architectures"]), "gemm_table": table.as_text()}
        info |= facts
        info |= {"isa": COMPILED.isa(), "detected_isa": COMPILED.detected_isa()}
    return info
