"""What a stored kernel was computed from, as digests that can be compared."""

from __future__ import annotations

import copyreg
import dis
import hashlib
import re
from collections.abc import Iterable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .contract import Batch
from .plan import Plan
from .problem import Problem

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...), torch.dtype, torch.device, torch.layout)
_TENSORS_AND_MODULES = {"_parameters", "_buffers", "_modules"}
# What torch keeps in every module, such as hooks, whose numbers depend on what else the process did.
_BOOKKEEPING = {"_compiled_call_impl", "_is_torch_compile", *vars(nn.Module())} - _TENSORS_AND_MODULES - {"training"}


def _digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Names, dtypes, shapes and bytes of tensors."""
    total = hashlib.blake2b(digest_size=16)
    for name, value in named:
        total.update(f"{name}|{value.dtype}|{list(value.shape)}|".encode())
        # On a conjugated or negated view the bits are not the values.
        flat = value.detach().resolve_conj().resolve_neg().cpu().contiguous().reshape(-1)
        total.update(flat.view(torch.uint8).numpy().data)
    return total.hexdigest()


def _batch(batch: Batch) -> str:
    keys = batch.keys or range(len(batch.tensors))
    return _digest((str(key), value) for key, value in zip(keys, batch.tensors.values(), strict=True))


def describe_function(name: str, function: Any) -> str:
    """A digest of the function passed as the argument `name`; see `describe`.

    Raises:
        TypeError: it holds something that cannot be described.
    """
    try:
        return describe(function, {})
    except (TypeError, RuntimeError) as error:
        raise TypeError(f"{name}: {error}; pass a Python function that does without it") from None


def describe(value: Any, seen: dict[int, tuple[Any, str]]) -> str:
    """A digest of a function or any other value: the next process gives the same, and another value another one.

    A function counts by its code, its defaults, its closure and the globals it uses; of these, functions of other
    modules count by their names, like classes. Other objects count by their type and what pickle would keep of them.

    Args:
        seen: digests by id, which keep their values alive, for values that are shared or hold themselves.

    Raises:
        TypeError: something that pickle does not know, such as a lock or a function of torch.jit.
    """
    if type(value) in _PLAIN:
        return repr(value)
    if isinstance(value, type | ModuleType):
        return _name(value)
    if id(value) not in seen:
        seen[id(value)] = value, "itself"
        text = "|".join([_name(type(value)), *(describe(part, seen) for part in _parts(value, seen))])
        seen[id(value)] = value, _hash(text)
    return seen[id(value)][1]


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=16).hexdigest()


def _name(value: Any) -> str:
    return f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', value.__name__)}"


def _parts(value: Any, seen: dict[int, tuple[Any, str]]) -> Iterable[Any]:
    """What makes the value what it is, in an order that is the same in every process."""
    if isinstance(value, Tensor) and value.layout == torch.strided and not value.is_meta:
        return [_digest([("", value)])]
    if isinstance(value, list | tuple):
        return value
    if isinstance(value, set | frozenset):
        return sorted(describe(each, seen) for each in value)
    if isinstance(value, dict):
        return [each for item in sorted(value.items(), key=lambda item: describe(item[0], seen)) for each in item]
    if isinstance(value, nn.Module):
        return [_own(value)]
    if isinstance(value, CodeType):
        return [value.co_code, value.co_consts, value.co_names]
    if isinstance(value, FunctionType):
        if hasattr(value, "_torchdynamo_orig_callable"):  # compiled
            return [value._torchdynamo_orig_callable]
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        defaults = value.__defaults__, value.__kwdefaults__
        return [_name(value), value.__code__, defaults, cells, vars(value), _globals(value)]
    reduce = copyreg.dispatch_table.get(type(value))
    try:
        kept = value.__reduce_ex__(4) if reduce is None else reduce(value)
    except Exception:
        raise TypeError(f"a {type(value).__name__} in it cannot be told from that of another run") from None
    return [kept] if isinstance(kept, str) else [list(each) if isinstance(each, Iterator) else each for each in kept]


def _globals(function: FunctionType) -> dict[str, Any]:
    """The globals that the function uses, by name; functions of other modules as their names."""
    found = {}
    for name in _global_names(function.__code__) & set(function.__globals__):
        value = function.__globals__[name]
        elsewhere = isinstance(value, FunctionType) and value.__module__ != function.__module__
        found[name] = _name(value) if elsewhere else value
    return found


def _global_names(code: CodeType) -> set[str]:
    inner = [_global_names(each) for each in code.co_consts if isinstance(each, CodeType)]
    return {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}.union(*inner)


def _own(module: nn.Module) -> dict[str, Any]:
    """The attributes of a module without torch's bookkeeping; a compiled one counts as the original."""
    own = vars(module) if "_orig_mod" not in module._modules else {"_modules": module._modules}
    return {name: value for name, value in own.items() if name not in _BOOKKEEPING}


def _attributes(model: nn.Module) -> list[str]:
    """The attributes of all modules beside tensors and submodules; those that cannot be described by their types."""
    found, seen = [], dict[int, tuple[Any, str]]()
    for place, module in model.named_modules():
        for name, value in sorted(_own(module).items()):
            if name not in _TENSORS_AND_MODULES:
                try:
                    digest = describe(value, seen)
                except (TypeError, RuntimeError):  # torch's own, for a tensor of an unusual kind
                    digest = _name(type(value))
                found.append(f"{place}.{name}={digest}")
    return found


def fingerprint(problem: Problem, plan: Plan) -> dict[str, str]:
    """The facts that a resumed run must share with the run before, by name."""
    target, model = problem.target, problem.target.model
    substitutes = target.substitutes or {}
    weights = {name: substitutes.get(name, value) for name, value in model.named_parameters()}
    weights |= substitutes
    weights |= dict(model.named_buffers())
    model_text = re.sub(r"0x[0-9a-f]+", "", repr(model))
    return {
        "model": _hash("|".join([model_text, *_attributes(model)])),
        "trainable parameters": _hash("|".join(target.parameters)),
        "weights": _digest(sorted(weights.items())),
        "x1": _batch(problem.left),
        "x2": "" if problem.symmetric else _batch(problem.right),
        "compute": problem.compute,
        "dtype": str(target.dtype).removeprefix("torch."),
        "method": "auto" if problem.method == "structured" else problem.method,
        "output": describe_function("output", target.output),
        "rows of a block": str(plan.block),
    }
