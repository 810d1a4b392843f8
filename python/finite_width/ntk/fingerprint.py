"""What a stored kernel was computed from, as digests that can be compared."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .contract import Batch
from .plan import Plan
from .problem import Problem


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


def describe_function(function: Any) -> str:
    """A name for a function that is the same in the next process."""
    if function is None:
        return ""
    inner = getattr(function, "func", None)  # functools.partial
    if inner is not None:
        return f"{describe_function(inner)}{function.args}{sorted(function.keywords.items())}"
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', '')}.{name}"


def fingerprint(problem: Problem, plan: Plan) -> dict[str, str]:
    """The facts that a resumed run must share with the run before, by name."""
    target, model = problem.target, problem.target.model
    substitutes = target.substitutes or {}
    weights = {name: substitutes.get(name, value) for name, value in model.named_parameters()}
    weights |= substitutes
    weights |= dict(model.named_buffers())
    model_text = re.sub(r"0x[0-9a-f]+", "", repr(model))
    return {
        "model": hashlib.blake2b(model_text.encode(), digest_size=16).hexdigest(),
        "trainable parameters": hashlib.blake2b("|".join(target.parameters).encode(), digest_size=16).hexdigest(),
        "weights": _digest(sorted(weights.items())),
        "x1": _batch(problem.left),
        "x2": "" if problem.symmetric else _batch(problem.right),
        "compute": problem.compute,
        "dtype": str(target.dtype).removeprefix("torch."),
        "method": "auto" if problem.method == "structured" else problem.method,
        "output": describe_function(target.output),
        "rows of a block": str(plan.block),
    }
