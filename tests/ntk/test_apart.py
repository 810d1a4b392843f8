"""Which forwards prove by their calls that rows do not mix, and that such a proof is never given to others."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
from finite_width.ntk import apart
from finite_width.ntk.plan import Plan
from finite_width.ntk.problem import Problem
from ntk.jacobians import jacobian

ROWS, WIDTH = 6, 12
ELSEWHERE = torch.linspace(1, 2, WIDTH, dtype=torch.float64)  # a tensor that no model holds


class Between(nn.Module):
    """A dense layer, what the test names, and a dense layer."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...] = (WIDTH,)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.function, self.shape = nn.Linear(5, WIDTH), function, shape
        self.register_buffer("row", torch.linspace(0.5, 1.5, WIDTH, dtype=torch.float64))
        with torch.no_grad():
            made = function(torch.zeros(ROWS, *shape, dtype=torch.float64))
        self.last = nn.Linear(made[0].numel(), 3)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.function(self.first(x).reshape(-1, *self.shape))
        result: Tensor = self.last(h.flatten(1))
        return result


def inputs() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(ROWS, 5, dtype=torch.float64)


def plan_of(model: nn.Module, x: Any, **options: Any) -> Plan:
    arguments: dict[str, Any] = {
        "compute": "full",
        "method": "auto",
        "params": None,
        "output": None,
        "memory_budget": None,
        "progress": False,
        "check": True,
        **options,
    }
    return Problem(model, x, None, **arguments).plan()


def kernel_error(model: nn.Module, x: Tensor) -> float:
    rows = jacobian(model, x)
    expected = torch.einsum("nap,mbp->nmab", rows, rows)
    return float((fw.ntk.empirical_ntk(model, x) - expected).norm() / expected.norm())


def in_place(call: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def function(h: Tensor) -> Tensor:
        h = h * 1
        call(h)
        return h

    return function


def heads(h: Tensor) -> Tensor:
    """Attention as torch's own layer has it: positions first, and rows and heads on one axis."""
    q = h.transpose(0, 1).reshape(3, -1, 2).transpose(0, 1)
    mixed = F.scaled_dot_product_attention(*[q.view(-1, 2, 3, 2)] * 3)
    return mixed.permute(2, 0, 1, 3).reshape(-1, 4).view(3, -1, 4).transpose(1, 0)


PAIR = (3, 4)  # three channels of four positions, or three words of four values

KEPT: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "relu": (torch.relu, (WIDTH,)),
    "relu in place": (in_place(lambda h: F.relu(h, inplace=True)), (WIDTH,)),
    "gelu": (F.gelu, (WIDTH,)),
    "leaky relu": (F.leaky_relu, (WIDTH,)),
    "softplus": (F.softplus, (WIDTH,)),
    "tanh": (torch.tanh, (WIDTH,)),
    "method": (lambda h: h.sigmoid(), (WIDTH,)),
    "scaled": (lambda h: 2 * h + 1 - h / 3, (WIDTH,)),
    "product": (lambda h: h * torch.tanh(h), (WIDTH,)),
    "power": (lambda h: h**2, (WIDTH,)),
    "constant": (lambda h: h + torch.arange(WIDTH, dtype=h.dtype), (WIDTH,)),
    "added in place": (in_place(lambda h: h.add_(1)), (WIDTH,)),
    "view": (lambda h: h.view(h.shape[0], -1), PAIR),
    "flatten": (lambda h: torch.flatten(h, 1), PAIR),
    "unflatten": (lambda h: h.unflatten(1, PAIR), (WIDTH,)),
    "transpose": (lambda h: h.transpose(1, 2), PAIR),
    "permute": (lambda h: h.permute(0, 2, 1), PAIR),
    "mean": (lambda h: h.mean(-1), PAIR),
    "sum": (lambda h: torch.sum(h, dim=(1,), keepdim=True), PAIR),
    "largest": (lambda h: h.amax(1), PAIR),
    "softmax": (lambda h: F.softmax(h, dim=-1), (WIDTH,)),
    "column": (lambda h: h[:, 1], PAIR),
    "columns": (lambda h: h[:, :2, ::2], PAIR),
    "cat": (lambda h: torch.cat([h, torch.sin(h)], dim=1), (WIDTH,)),
    "stack": (lambda h: torch.stack([h, torch.sin(h)], 1), (WIDTH,)),
    "chunk": (lambda h: h.chunk(2, dim=1)[1], (WIDTH,)),
    "squeeze": (lambda h: h.unflatten(1, (1, WIDTH)).squeeze(1), (WIDTH,)),
    "pad": (lambda h: F.pad(h, (1, 2)), (WIDTH,)),
    "rows among positions": (lambda h: F.softmax(h.reshape(-1, 4), -1).reshape(-1, 3, 4), PAIR),
    "positions first": (lambda h: (h.transpose(0, 1) + h.transpose(0, 1).mean(0, keepdim=True)).transpose(0, 1), PAIR),
    "permuted": (lambda h: F.layer_norm(h.permute(1, 2, 0).permute(0, 2, 1), (4,)).transpose(0, 1), PAIR),
    "stacked": (lambda h: torch.stack([h, torch.sin(h)])[1], PAIR),
    "heads": (heads, PAIR),
    "dropout": (lambda h: F.dropout(h, 0.5, training=False), (WIDTH,)),
    "attention": (lambda h: F.softmax(h @ h.transpose(1, 2), dim=-1) @ h, PAIR),
    "max pool": (lambda h: F.max_pool1d(h, 2), PAIR),
    "average pool": (lambda h: F.adaptive_avg_pool1d(h, 2), PAIR),
    "convolution": (lambda h: torch.conv1d(h, torch.ones(2, 3, 2, dtype=h.dtype)), PAIR),
    "layer norm": (lambda h: F.layer_norm(h, (4,)), PAIR),
    "group norm": (lambda h: F.group_norm(h, 3), (WIDTH,)),
    "masked": (lambda h: h.masked_fill(torch.eye(3, 4, dtype=torch.bool), 0.0), PAIR),
    "where": (lambda h: torch.where(torch.eye(3, 4, dtype=torch.bool), h, torch.sin(h)), PAIR),
}


@pytest.mark.parametrize("name", KEPT)
def test_calls_that_keep_rows_apart(name: str) -> None:
    model, x = Between(*KEPT[name]), inputs()
    plan = plan_of(model, x)
    assert plan.apart
    assert plan.batched_backward
    assert all(plan.sure)
    assert kernel_error(model, x) < 1e-12


class Transformer(nn.Module):
    """Words and their positions, two layers of attention, the mean over positions."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first, self.positions = batch_first, nn.Parameter(torch.randn(4, 6))
        layer = nn.TransformerEncoderLayer(6, 2, 8, 0.0, batch_first=batch_first)
        self.layers, self.head = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = x + self.positions[: x.shape[1]]
        if self.batch_first:
            return self.head(self.layers(h).mean(1))
        return self.head(self.layers(h.transpose(0, 1)).mean(0))


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convolutions": (
        lambda: nn.Sequential(
            nn.Conv2d(3, 4, 3, padding=1),
            nn.BatchNorm2d(4),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
            nn.Conv2d(4, 4, 3, padding="same"),
            nn.GroupNorm(2, 4),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Dropout(),
            nn.Linear(4, 2),
        ),
        (3, 8, 8),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose1d(3, 2, 3), nn.GELU(), nn.Flatten(), nn.Linear(14, 2)),
        (3, 5),
    ),
    "transformer": (lambda: Transformer(True), (3, 6)),
    "transformer, positions first": (lambda: Transformer(False), (3, 6)),
    "norms": (
        lambda: nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.PReLU(), nn.RMSNorm(6), nn.Linear(6, 2)),
        (5,),
    ),
}


@pytest.mark.parametrize("name", MODULES)
def test_modules_that_keep_rows_apart(name: str) -> None:
    make, shape = MODULES[name]
    torch.manual_seed(0)
    model, x = make().double().eval(), torch.randn(ROWS, *shape, dtype=torch.float64)
    assert plan_of(model, x).apart
    assert kernel_error(model, x) < 1e-12


def test_tokens_stay_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 2)).double()
    tokens = torch.randint(0, 9, (ROWS, 3))
    assert plan_of(model, tokens).apart
    assert kernel_error(model, tokens) < 1e-12


def test_given_parameters_are_constants() -> None:
    model, x = Between(torch.relu), inputs()
    given = {name: value.detach().clone().requires_grad_() for name, value in model.named_parameters()}
    assert plan_of(model, x, params=given).apart


class Mixing(torch.autograd.Function):
    """Keeps the rows apart forward, and mixes their cotangents."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        return h * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] - grads[0].mean(0)


def hooked(h: Tensor) -> Tensor:
    if h.requires_grad:
        h.register_hook(lambda gradient: gradient.flip(0))
    return h * 1


def unseen(h: Tensor) -> Tensor:
    """What a call makes that torch does not show, as an extension's own: then it counts for nothing."""
    with torch._C.DisableTorchFunction():
        mean = h.mean(0, keepdim=True)
    return h - mean


def unseen_in_place(h: Tensor) -> Tensor:
    h = h * 1
    with torch._C.DisableTorchFunction():
        h -= h.mean(0, keepdim=True)
    return h * 1


def merged(h: Tensor) -> Tensor:
    return torch.cat([h.reshape(-1)[1:], h.reshape(-1)[:1]]).reshape(h.shape)


MIXED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "mean of rows": (lambda h: h - h.mean(0), (WIDTH,)),
    "mean of rows from behind": (lambda h: h - h.mean(-2), (WIDTH,)),
    "mean of all": (lambda h: h - h.mean(), (WIDTH,)),
    "softmax of rows": (lambda h: F.softmax(h, dim=0), (WIDTH,)),
    "softmax of rows from behind": (lambda h: F.softmax(h, -2), (WIDTH,)),
    "product of rows": (lambda h: h @ h.t() @ h, (WIDTH,)),
    "attention over rows": (
        lambda h: (F.softmax(h.transpose(0, 1) @ h.permute(1, 2, 0), -1) @ h.transpose(0, 1)).transpose(0, 1),
        PAIR,
    ),
    "turned": (lambda h: h.flip(0) + h, (WIDTH,)),
    "rolled": (lambda h: h.roll(1, 0) + h, (WIDTH,)),
    "summed up": (lambda h: h.cumsum(0), (WIDTH,)),
    "merged": (merged, (WIDTH,)),
    "cut and joined": (lambda h: torch.cat([h[1:], h[:1]]), (WIDTH,)),
    "rows as channels": (lambda h: torch.conv1d(h, torch.ones(len(h), len(h), 1, dtype=h.dtype)), (WIDTH,)),
    "rows as positions": (lambda h: F.avg_pool1d(h.t(), 3, 1, 1).t(), (WIDTH,)),
    "norm over all": (lambda h: F.layer_norm(h, h.shape), (WIDTH,)),
    "norm of the batch": (lambda h: F.batch_norm(h, None, None, training=True), (WIDTH,)),
    "written over": (in_place(lambda h: h.copy_(h.flip(0) + h)), (WIDTH,)),
    "backward in Python": (Mixing.apply, (WIDTH,)),
    "hook": (hooked, (WIDTH,)),
    "unseen": (unseen, (WIDTH,)),
    "unseen, in place": (unseen_in_place, (WIDTH,)),
}


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_mix_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="rows"):
        fw.ntk.empirical_ntk(Between(*MIXED[name]), inputs())


DOUBTED: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "unknown call": (lambda h: torch.einsum("nc->nc", h), (WIDTH,)),
    "places": (lambda h: h + 0 * torch.where(h[:, 0] > -9)[0].to(h.dtype)[:, None], (WIDTH,)),
    "constant of the rows": (lambda h: h + 0 * torch.arange(len(h), dtype=h.dtype)[:, None], (WIDTH,)),
    "value in Python": (lambda h: h if float(h.detach().abs().max()) > -1 else h - h.mean(0), (WIDTH,)),
    "tensor from elsewhere": (lambda h: h * ELSEWHERE, (WIDTH,)),
    "through numpy": (lambda h: h + torch.from_numpy(h.detach().numpy()) * 0, (WIDTH,)),
}


@pytest.mark.parametrize("name", DOUBTED)
def test_other_rows_are_probed(name: str) -> None:
    model, x = Between(*DOUBTED[name]), inputs()
    assert not plan_of(model, x).apart
    assert kernel_error(model, x) < 1e-12


@pytest.mark.parametrize(
    ("func", "args", "kwargs"),
    [
        (Tensor.view, (), {"dtype": torch.float32}),
        (Tensor.view, (torch.float32,), {}),
        (torch.sum, (), {"axis": 1}),
        (torch.relu, (), {"out": torch.empty(0)}),
        (Tensor.__getitem__, (slice(0, torch.tensor(2)),), {}),
        (torch.mean, (3,), {}),
    ],
)
def test_arguments_that_no_rule_knows(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    x = torch.randn(4, 6, dtype=torch.float64)
    followed = apart.Apart([x], frozenset())
    assert followed.before(func, (x, *args), kwargs)[1] is None
    assert not followed.holds


def test_a_backward_hook_is_probed() -> None:
    model, x = Between(torch.relu), inputs()
    model.first.register_full_backward_hook(lambda module, inputs, outputs: None)
    assert not plan_of(model, x).apart


def test_every_block_must_keep_rows_apart() -> None:
    """More rows than the probe has may take another way."""
    model, x = Between(lambda h: h - h.mean(0) if len(h) > 4 else h), inputs()
    with pytest.raises(ValueError, match="other rows"):
        fw.ntk.empirical_ntk(model, x)


@pytest.mark.parametrize("rows", [1, 2, 9])
def test_any_number_of_rows(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a last block of a single row, which lies in more layouts than one."""
    monkeypatch.setattr("finite_width.ntk.plan.BLOCK_ROWS", 8)
    torch.manual_seed(0)
    model, x = Transformer(False).double().eval(), torch.randn(rows, 3, 6, dtype=torch.float64)
    assert plan_of(model, x).apart == (rows > 1)
    assert plan_of(model, x).generic == []
    assert kernel_error(model, x) < 1e-12


def test_how_many_rows_there_are_may_not_count() -> None:
    model = Between(lambda h: h / len(h))
    for rows in (3, ROWS):
        with pytest.raises(ValueError, match="other rows"):
            fw.ntk.empirical_ntk(model, inputs()[:rows])


def test_nothing_is_left_on_the_users_tensors() -> None:
    model, x = Between(lambda h: h + 1), inputs()
    model.function = lambda h: h + model.row.contiguous()
    fw.ntk.empirical_ntk(model, x)
    for value in (x, *model.parameters(), *model.buffers()):
        assert not hasattr(value, apart._MARK)
