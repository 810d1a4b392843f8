"""Functions and attributes in the fingerprint of a stored kernel: told apart, and recognised by another process."""

from __future__ import annotations

import functools
import operator
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
from finite_width.ntk.fingerprint import describe_function

COLUMNS = 1


class Scaled(nn.Module):
    """A linear layer times an attribute that repr does not show."""

    def __init__(self, k: Any) -> None:
        super().__init__()
        self.l, self.k = nn.Linear(2, 2), k
        nn.init.ones_(self.l.weight)

    def forward(self, x: Tensor) -> Tensor:
        k = self.k.k if isinstance(self.k, SimpleNamespace) else self.k
        return k(self.l(x)) if callable(k) else self.l(x) * (k[0] if isinstance(k, tuple) else k)


class Times:
    def __init__(self, k: float) -> None:
        self.k, self.whole = k, self

    def __call__(self, result: Tensor) -> Tensor:
        return result * self.k


def times(k: Any) -> Any:
    return lambda result: result * k


def with_default(k: float) -> Any:
    def output(result: Tensor, k: float = k) -> Tensor:
        return result * k

    return output


def with_columns(count: int) -> Any:
    """A function that reads a global of that value."""
    names = {"__name__": "somewhere", "COUNT": count}
    exec("def pick(r): return r[:, :COUNT]\noutput = lambda r: pick(r)", names)
    return names["output"]


def functions() -> list[Any]:
    """No two of them are the same function."""
    return [
        None,
        lambda r: r[:, :1],
        lambda r: r[:, 1:],
        lambda r: r[:, :COLUMNS],
        lambda r: r if r.dtype in {"a", "bb", "ccc", None} else -r,
        times(1.0),
        times(3.0),
        times(torch.ones(2)),
        times(torch.zeros(2)),
        times(torch.eye(2).to_sparse()),
        times(2 * torch.eye(2).to_sparse()),
        times({"b": {1, "x", "y"}, "a": 2}),
        with_default(1.0),
        with_default(3.0),
        with_columns(1),
        with_columns(2),
        Times(1.0),
        Times(3.0),
        Times(1.0).__call__,
        nn.Softmax(0),
        nn.Softmax(1),
        torch.relu,
        torch.ones(2).mul,
        operator.itemgetter("logits"),
        operator.itemgetter("loss"),
        functools.partial(F.cross_entropy, reduction="none"),
        functools.partial(F.cross_entropy, reduction="none", ignore_index=0),
        functools.partial(F.mse_loss, reduction="none"),
    ]


def digests() -> list[str]:
    return [describe_function("output", each) for each in functions()]


def test_functions_are_told_apart_and_recognised_by_another_process() -> None:
    found = digests()
    assert len(set(found)) == len(found)
    assert found == digests()
    folders = [Path(fw.__file__).parent.parent, Path(__file__).parents[__name__.count(".")]]
    script = f"import importlib; print(*importlib.import_module({__name__!r}).digests())"
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders)), "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert done.stdout.split() == found, done.stderr


def test_what_cannot_be_recognised_is_refused() -> None:
    generator = (each for each in ())
    with pytest.raises(TypeError, match="output: a generator in it cannot be told from that of another run"):
        describe_function("output", times(generator))


def test_compiled_functions_count_as_the_original() -> None:
    compiled = [describe_function("output", torch.compile(times(k))) for k in (1.0, 1.0, 3.0)]
    assert compiled[0] == compiled[1] != compiled[2]


@pytest.mark.parametrize(
    "pair",
    [(1.0, 3.0), ((1.0,), (3.0,)), (torch.relu, torch.tanh), (SimpleNamespace(k=1.0), SimpleNamespace(k=3.0))],
    ids=["number", "tuple", "function", "object"],
)
def test_attributes_of_modules(tmp_path: Path, pair: tuple[Any, Any]) -> None:
    pytest.importorskip("zarr", reason="out= as a path needs zarr: pip install finite-width[scale]")
    x, one, other = torch.randn(5, 2), Scaled(pair[0]), Scaled(pair[1])
    other.load_state_dict(one.state_dict())
    store = tmp_path / "kernel.zarr"
    fw.ntk.empirical_ntk(nn.Sequential(one), x, out=store)
    handle = one.register_forward_hook(lambda *_: None)
    handle.remove()
    fw.ntk.empirical_ntk(nn.Sequential(one), x, out=store)
    with pytest.raises(ValueError, match="differs in: model; nothing was changed"):
        fw.ntk.empirical_ntk(nn.Sequential(other), x, out=store)


def test_outputs_and_losses(tmp_path: Path) -> None:
    pytest.importorskip("zarr", reason="out= as a path needs zarr: pip install finite-width[scale]")
    model, x, y = nn.Linear(2, 2), torch.randn(5, 2), torch.randn(5, 2)
    fw.ntk.empirical_ntk(model, x, output=lambda r: r[:, :1], out=tmp_path / "kernel.zarr")
    with pytest.raises(ValueError, match="differs in: output; nothing was changed"):
        fw.ntk.empirical_ntk(model, x, output=lambda r: r[:, 1:], out=tmp_path / "kernel.zarr")
    fw.ntk.loss_gram(model, lambda r, t: (r - t).square().sum(1), x, y, out=tmp_path / "loss.zarr")
    with pytest.raises(ValueError, match="differs in: model; nothing was changed"):
        fw.ntk.loss_gram(model, lambda r, t: (r - t).abs().sum(1), x, y, out=tmp_path / "loss.zarr")
