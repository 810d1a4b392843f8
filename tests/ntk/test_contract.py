"""What the kernel functions refuse, what they leave untouched, and that budgets change nothing but memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import finite_width as fw


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.ReLU(), nn.Linear(7, 3))


class Lambda(nn.Module):
    """An MLP between two functions."""

    def __init__(self, before: Any = None, after: Any = None) -> None:
        super().__init__()
        self.before, self.layers, self.after = before, mlp(), after

    def forward(self, x: Tensor) -> Any:
        h = self.layers(x if self.before is None else self.before(x))
        return h if self.after is None else self.after(h)


class BatchAttention(nn.Module):
    """Rows taken for positions: batch_first was forgotten."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].flatten(1)


class MixedWords(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedding(x).mean(1)
        return h - h.mean(0)


class BareMixedWords(nn.Module):
    """The same without a use that is recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(9, 4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.table[x].mean(1)
        return h - h.mean(0)


class BareScale(nn.Module):
    """A dense layer, and a parameter with a use that is not recognised."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.scale = mlp(), nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("no,o->no", self.layers(x), self.scale)


class Turning(nn.Module):
    """Another layer where there are more rows than the probe has."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = mlp(), mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if len(x) <= 4 else self.other(x)


class Faint(nn.Module):
    """Noise that the rounding of another sum would hide, and a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.generator = mlp(), torch.Generator()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) * (1 + 1e-5 * torch.rand(1, generator=self.generator))


class Dropout(nn.Module):
    """Functional dropout that does not know of eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(self.layer(x), 0.5)


class Counter(nn.Module):
    """Every call gives another result, without random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 3)
        self.register_buffer("calls", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = mlp(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(checkpoint(self.layers, x.requires_grad_(), use_reentrant=True))


def integer_parameter() -> nn.Module:
    model = mlp()
    model.count = nn.Parameter(torch.ones(2, dtype=torch.int64), requires_grad=False)
    return model


def without_gradients() -> nn.Module:
    return mlp().requires_grad_(False)


def two_dtypes() -> nn.Module:
    model = mlp()
    model[2].double()
    return model


def two_devices() -> nn.Module:
    model = mlp()
    model[2].to("meta")
    return model


X = torch.randn(6, 6)
BAD: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "no module": (lambda: torch.sin, (X,), {}, TypeError, "model must be a torch.nn.Module"),
    "no tensor": (mlp, ([1, 2],), {}, TypeError, "x1 must be a tensor"),
    "empty tuple": (mlp, ((),), {}, ValueError, "x1 must hold at least one tensor"),
    "no axis": (mlp, (torch.ones(()),), {}, ValueError, "x1 must have a batch axis"),
    "empty batch": (mlp, (X[:0],), {}, ValueError, r"x1 must have at least one row, got shape \[0, 6\]"),
    "empty second batch": (mlp, (X, X[:0]), {}, ValueError, r"x2 must have at least one row, got shape \[0, 6\]"),
    "rows differ in a tuple": (mlp, ((X, X[:3]),), {}, ValueError, r"x1\[1\] has 3 rows \(shape \[3, 6\]\).*\[6, 6\]"),
    "features differ": (mlp, (X, X[:, :4]), {}, ValueError, r"x2 has shape \[6, 4\], but x1 has \[6, 6\]"),
    "structures differ": (mlp, (X, (X, X)), {}, ValueError, "x2 must have the structure of x1"),
    "features do not fit": (mlp, (X[:, :4],), {}, ValueError, r"model cannot take x1 with shape \[6, 4\].*7x6|6x7"),
    "integer input": (mlp, (X.long(),), {}, ValueError, "model cannot take x1"),
    "dtype of the input": (mlp, (X.double(),), {}, TypeError, "x1 has dtype torch.float64, but the model's"),
    "dtypes of the batches": (mlp, (X, X.double()), {}, TypeError, "x2 has dtype torch.float64, but x1 has"),
    "device of the input": (mlp, (X.to("meta"),), {}, ValueError, "x1 is on meta, but the model's parameters"),
    "dtypes of the parameters": (two_dtypes, (X,), {}, TypeError, "parameter '2.weight' has dtype torch.float64"),
    "devices of the parameters": (two_devices, (X,), {}, ValueError, "parameter '2.weight' is on meta"),
    "half": (lambda: mlp().half(), (X.half(),), {}, TypeError, "computed in float32 or float64"),
    "bfloat16": (lambda: mlp().bfloat16(), (X.bfloat16(),), {}, TypeError, "computed in float32 or float64"),
    "integer parameters": (integer_parameter, (X,), {}, TypeError, "parameter 'count' has the integer dtype"),
    "no trainable parameter": (without_gradients, (X,), {}, ValueError, "model has no trainable parameter"),
    "no parameter": (nn.ReLU, (X,), {}, ValueError, "model has no trainable parameter"),
    "batch norm in train mode": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)),
        (X,),
        {},
        ValueError,
        "module '1' .BatchNorm1d. is in train mode",
    ),
    "dropout in train mode": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.Dropout()),
        (X,),
        {},
        ValueError,
        "module '1' .Dropout. is in train mode",
    ),
    "functional dropout": (Dropout, (X,), {}, ValueError, "model draws random numbers"),
    "noise": (lambda: Lambda(lambda x: x + torch.randn_like(x)), (X,), {}, ValueError, "model draws random numbers"),
    "state": (Counter, (X,), {}, ValueError, "two forwards of the same rows differ"),
    "faint noise": (Faint, (X,), {}, ValueError, "two forwards of the same rows differ"),
    "batch statistics": (lambda: Lambda(lambda x: x - x.mean(0)), (X,), {}, ValueError, "depends on other rows"),
    "batch statistics behind": (lambda: Lambda(None, lambda h: h / h.norm()), (X,), {}, ValueError, "depends on other"),
    "detached batch statistics": (
        lambda: Lambda(lambda x: x - x.mean(0).detach()),
        (X,),
        {},
        ValueError,
        "depends on other rows",
    ),
    "batch norm without statistics": (
        lambda: nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3, track_running_stats=False)).eval(),
        (X,),
        {},
        ValueError,
        "depends on other rows",
    ),
    "mixing beyond the probe": (lambda: Lambda(lambda x: x.roll(5, 0) + x), (X,), {}, ValueError, "other rows"),
    "attention over rows": (BatchAttention, (X,), {}, ValueError, "depends on other rows"),
    "mixed tokens": (MixedWords, (torch.randint(0, 9, (6, 4)),), {}, ValueError, "rows"),
    "mixed words of a bare parameter": (BareMixedWords, (torch.randint(0, 9, (6, 4)),), {}, ValueError, "rows"),
    "no batch axis": (lambda: Lambda(None, lambda h: h.sum()), (X,), {}, ValueError, "must have a batch axis"),
    "batch axis lost": (lambda: Lambda(None, lambda h: h.t()), (X,), {}, ValueError, r"\[4, ...\] for 4 rows of x1"),
    "tuple output": (lambda: Lambda(None, lambda h: (h, h)), (X,), {}, TypeError, "pass output="),
    "no outputs": (lambda: Lambda(None, lambda h: h[:, :0]), (X,), {}, ValueError, "at least one value per row"),
    "complex output": (lambda: Lambda(None, lambda h: h + 0j), (X,), {}, TypeError, "output has dtype"),
    "max_norm": (lambda: nn.Embedding(9, 4, max_norm=1.0), (torch.ones(3, 2).long(),), {}, ValueError, "max_norm"),
    "frequencies": (
        lambda: nn.Sequential(nn.Embedding(9, 4, scale_grad_by_freq=True), nn.Flatten()),
        (torch.ones(3, 2).long(),),
        {},
        ValueError,
        "scale_grad_by_freq",
    ),
    "reentrant checkpoint": (Reentrant, (X,), {}, ValueError, "use_reentrant=False"),
    "compute": (mlp, (X,), {"compute": "sum"}, ValueError, "compute must be one of"),
    "method": (mlp, (X,), {"method": "fast"}, ValueError, "method must be one of"),
    "output": (mlp, (X,), {"output": 3}, TypeError, "output must be a function"),
    "budget of another type": (mlp, (X,), {"memory_budget": 1e9}, TypeError, "memory_budget must be an int"),
    "no structure": (
        BareScale,
        (X,),
        {"method": "structured"},
        ValueError,
        "got 'structured': the model uses .*'scale'",
    ),
    "structure of some rows": (Turning, (X,), {"method": "structured"}, ValueError, "differently from row to row"),
    "budget too small": (mlp, (X,), {"memory_budget": 100}, ValueError, "memory_budget must be at least"),
    "params of another type": (mlp, (X,), {"params": [torch.ones(1)]}, TypeError, "params must be a dict"),
    "unknown parameter": (mlp, (X,), {"params": {"w": torch.ones(1)}}, ValueError, "no parameter of that name"),
    "shape of a parameter": (
        mlp,
        (X,),
        {"params": {"0.weight": torch.ones(2, 2)}},
        ValueError,
        r"has shape \[2, 2\], but the model's has \[7, 6\]",
    ),
    "integer params": (
        mlp,
        (X,),
        {"params": {"0.weight": torch.ones(7, 6, dtype=torch.int32)}},
        TypeError,
        "integer dtype",
    ),
    "params without gradient": (
        mlp,
        (X,),
        {"params": {"0.weight": torch.ones(7, 6)}},
        ValueError,
        "params has no trainable parameter",
    ),
}


def state(model: nn.Module) -> list[Any]:
    """All that must be as it was."""
    facts: list[Any] = [
        (name, value, value.clone(), value.requires_grad, value.grad) for name, value in model.named_parameters()
    ]
    facts += [(name, value, value.clone()) for name, value in model.named_buffers()]
    for module in model.modules():
        facts.append((module.training, len(module._forward_hooks), len(module._backward_hooks), set(module.__dict__)))
    return facts


def assert_as_before(model: nn.Module, before: list[Any]) -> None:
    for now, then in zip(state(model), before, strict=True):
        assert len(now) == len(then)
        for new, old in zip(now, then, strict=True):
            if isinstance(new, Tensor) and new.device.type != "meta":
                torch.testing.assert_close(new, old, rtol=0, atol=0)
            elif not isinstance(new, Tensor):
                assert new == old


NOT_OF_AN_OPERATOR = ("method", "no structure", "structure of some rows", "budget of another type", "budget too small")


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name: str) -> None:
    make, args, options, error, message = BAD[name]
    torch.manual_seed(0)
    model = make()
    before = state(model) if isinstance(model, nn.Module) else []
    generator = torch.get_rng_state()
    with pytest.raises(error, match=message):
        fw.ntk.empirical_ntk(model, *args, **options)
    assert torch.equal(generator, torch.get_rng_state())
    if before:
        assert_as_before(model, before)
    assert torch.is_grad_enabled()
    if not {"compute"} & options.keys():
        options = {key: value for key, value in options.items() if key not in ("method", "memory_budget")}
        if options or name not in NOT_OF_AN_OPERATOR:
            with pytest.raises(error, match=message):
                fw.ntk.NTKOperator(model, *args, **options)


@pytest.mark.parametrize("interrupt", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize(("call", "block"), [(1, 512), (2, 512), (2, 4), (3, 4), (4, 4)])
def test_the_model_comes_back_after_an_interrupt(
    interrupt: type[BaseException], call: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception in any of the forwards: the probe's, and the blocks'."""
    monkeypatch.setattr("finite_width.ntk.plan.BLOCK_ROWS", block)
    calls = 0

    def count(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == call:
            raise interrupt("stop")
        return x

    model = Lambda(count)
    model.register_buffer("seen", torch.zeros(3))
    model.layers[0].weight.grad = torch.ones(7, 6)
    before = state(model)
    with pytest.raises((interrupt, ValueError), match="stop"):
        fw.ntk.empirical_ntk(model, X, X + 1)
    assert_as_before(model, before)
    fw.ntk.empirical_ntk(model, X, X + 1)
    assert_as_before(model, before)


def test_buffers_are_put_back() -> None:
    class Remembers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 3)
            self.register_buffer("last", torch.zeros(3))
            self.register_buffer("written", torch.zeros(3))

        def forward(self, x: Tensor) -> Tensor:
            out = self.layer(x)
            self.last = out.detach().mean(0)
            self.written.add_(1)
            return out

    model = Remembers()
    before = state(model)
    fw.ntk.empirical_ntk(model, X)
    assert_as_before(model, before)


def test_no_grad_and_autocast_around_the_call_change_nothing() -> None:
    model = mlp()
    expected = fw.ntk.empirical_ntk(model, X)
    with torch.no_grad():
        assert torch.equal(fw.ntk.empirical_ntk(model, X), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fw.ntk.empirical_ntk(model, X), expected)
    with torch.inference_mode():
        assert torch.equal(fw.ntk.empirical_ntk(model, X), expected)
        assert torch.equal(fw.ntk.empirical_ntk(model, X * 1), expected)


def test_the_result_needs_no_gradient() -> None:
    assert not fw.ntk.empirical_ntk(mlp(), X.clone().requires_grad_()).requires_grad


def test_tuple_and_dict_inputs_and_output() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = mlp()

        def forward(self, left: Tensor, right: Tensor) -> dict[str, Tensor]:
            return {"logits": self.layers(left) + right, "other": left}

    model, offset = Sum(), torch.randn(6, 3)
    expected = fw.ntk.empirical_ntk(model.layers, X, X[:4])

    def pick(result: dict[str, Tensor]) -> Tensor:
        return result["logits"]

    inputs = [((X, offset), (X[:4], offset[:4]))]
    inputs.append(({"left": X, "right": offset}, {"left": X[:4], "right": offset[:4]}))
    for first, second in inputs:
        result = fw.ntk.empirical_ntk(model, first, second, output=pick)
        torch.testing.assert_close(result, expected)
    reshaped = fw.ntk.empirical_ntk(model.layers, X, X[:4], output=lambda h: h.reshape(-1, 3, 1))
    torch.testing.assert_close(reshaped, expected)


def test_params_replace_the_models_own() -> None:
    model, other = mlp(), mlp()
    with torch.no_grad():
        for value in other.parameters():
            value.mul_(1.5)
    expected = fw.ntk.empirical_ntk(other, X)
    replaced = fw.ntk.empirical_ntk(model, X, params=dict(other.named_parameters()))
    assert torch.equal(replaced, expected)
    for method in ("jacobian", "products"):
        result = fw.ntk.empirical_ntk(model, X, params=dict(other.named_parameters()), method=method)
        torch.testing.assert_close(result, expected)
    subset = {name: value if name == "0.weight" else value.detach() for name, value in other.named_parameters()}
    parts = fw.ntk.per_parameter_ntk(model, X, params=subset)
    assert list(parts) == ["0.weight"]
    turned = dict(reversed(list(other.named_parameters())))
    assert list(fw.ntk.per_parameter_ntk(model, X, params=turned)) == [name for name, _ in model.named_parameters()]
    torch.testing.assert_close(parts["0.weight"], fw.ntk.per_parameter_ntk(other, X)["0.weight"])


def convolutions() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.BatchNorm2d(8), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(72, 4)).eval()


@pytest.mark.parametrize("compute", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("same", [False, True])
def test_a_budget_changes_no_bit(compute: str, same: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On small blocks, so that a few rows make many: rows that no block divides."""
    monkeypatch.setattr("finite_width.ntk.plan.BLOCK_ROWS", 4)
    torch.manual_seed(1)
    x1 = torch.randn(23, 3, 9, 9)
    x2 = None if same else torch.randn(14, 3, 9, 9)
    model = convolutions()
    expected = fw.ntk.empirical_ntk(model, x1, x2, compute=compute)
    with pytest.raises(ValueError, match="memory_budget must be at least") as caught:
        fw.ntk.empirical_ntk(model, x1, x2, compute=compute, memory_budget=1)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    counts = []
    for budget in (least, 2 * least, 3 * least, 100 * least):
        assert torch.equal(fw.ntk.empirical_ntk(model, x1, x2, compute=compute, memory_budget=budget), expected)
        counts.append(fw.ntk.explain(model, x1, x2, compute=compute, memory_budget=budget).recomputations)
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0
    assert counts[-1] == 0
    whole = fw.ntk.empirical_ntk(model.double(), x1.double(), None if same else x2.double(), compute=compute)
    assert (expected - whole).norm() <= 1e-5 * whole.norm()


def test_structured_is_auto_where_every_use_is_recognised() -> None:
    model, x1, x2 = convolutions(), torch.randn(5, 3, 9, 9), torch.randn(4, 3, 9, 9)
    structured = fw.ntk.empirical_ntk(model, x1, x2, method="structured")
    assert torch.equal(structured, fw.ntk.empirical_ntk(model, x1, x2))
    assert "vmap" in {row.method for row in fw.ntk.explain(BareScale(), X).rows}


@pytest.mark.parametrize("rows", [(5, 9), (9, 5), (1, 6)])
@pytest.mark.parametrize("compute", ["full", "diagonal", "trace"])
def test_small_batches_share_a_sweep(rows: tuple[int, int], compute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = convolutions().double()
    x1, x2 = (torch.randn(count, 3, 9, 9, dtype=torch.float64) for count in rows)
    together = fw.ntk.empirical_ntk(model, x1, x2, compute=compute)
    plan = fw.ntk.explain(model, x1, x2, compute=compute)
    assert (plan.sweeps, plan.blocks, plan.recomputations) == (1, 1, 0)
    with pytest.raises(ValueError, match=f"a sweep over {sum(rows)} rows") as caught:
        fw.ntk.empirical_ntk(model, x1, x2, compute=compute, memory_budget=1)
    least = int(str(caught.value).split("at least ")[1].split()[0])
    assert torch.equal(fw.ntk.empirical_ntk(model, x1, x2, compute=compute, memory_budget=least), together)
    monkeypatch.setattr("finite_width.ntk.plan.BLOCK_ROWS", 4)
    apart = fw.ntk.empirical_ntk(model, x1, x2, compute=compute)
    assert fw.ntk.explain(model, x1, x2, compute=compute).blocks > 1
    assert (together - apart).norm() <= 1e-12 * apart.norm()


def test_progress_shows_a_bar(capfd: pytest.CaptureFixture[str]) -> None:
    fw.ntk.empirical_ntk(mlp(), X, progress=True)
    assert "empirical NTK" in capfd.readouterr().err


def test_explain_reads_well_where_little_is_to_be_done() -> None:
    text = str(fw.ntk.explain(torch.nn.Linear(2, 1), torch.randn(3, 2)))
    assert text.splitlines()[-1].startswith("outputs: 1; blocks of ")
    assert " rows: 1, recomputed: 0; " in text
    assert "e-" not in text.splitlines()[1]
    assert " FLOP" in text


def test_explain_prints_a_table() -> None:
    plan = fw.ntk.explain(convolutions(), torch.randn(5, 3, 9, 9))
    text = str(plan)
    for row in plan.rows:
        assert row.method in text
        assert row.flops > 0
        assert row.bytes > 0
    assert [name for row in plan.rows for name in row.parameters] == [
        name for name, _ in convolutions().named_parameters()
    ]
    assert plan.outputs == 4
    methods = [row.method for row in fw.ntk.explain(convolutions(), torch.randn(5, 3, 9, 9), method="jacobian").rows]
    assert methods == ["vmap"]
