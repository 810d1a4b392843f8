"""Values that a model makes from parameters alone and all rows share: positions, class tokens, normalised weights."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import finite_width as fw
from ntk.jacobians import jacobian

POSITIONS, WIDTH = 5, 6


class Words(nn.Module):
    """Token embeddings joined with something that all rows share, a layer, and a head on the mean."""

    def __init__(self, join: Callable[[Words, Tensor], Tensor], **shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.join = join
        self.tokens, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(9, WIDTH)
        self.layer, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3)
        for name, shape in shapes.items():
            setattr(self, name, nn.Parameter(torch.randn(shape)))

    def forward(self, x: Tensor) -> Tensor:
        h = self.join(self, self.tokens(x))
        return self.head(torch.tanh(self.layer(h)).mean(1))


def _class_token(model: Words, h: Tensor) -> Tensor:
    return torch.cat([model.p.expand(len(h), -1, -1), h], 1)


def _drawn_apart(model: Words, h: Tensor) -> Tensor:
    shifted = h + model.p[:POSITIONS]
    return shifted + (model.p**2).sum()  # directly, and through a made value


def _written_over(model: Words, h: Tensor) -> Tensor:
    made = model.p * 2
    h = h + made
    made.add_(model.q)  # another value from here on
    return h * made


JOINED = {
    "positions": (lambda m, h: h + m.p, {"p": (POSITIONS, WIDTH)}),
    "positions in a batch of one": (lambda m, h: h + m.p, {"p": (1, POSITIONS, WIDTH)}),
    "positions on the left": (lambda m, h: torch.add(m.p, h), {"p": (POSITIONS, WIDTH)}),
    "a slice": (lambda m, h: m.p[: h.shape[1]] + h, {"p": (9, WIDTH)}),
    "a shift": (lambda m, h: h + m.p, {"p": (WIDTH,)}),
    "a shift back": (lambda m, h: h - m.p, {"p": (WIDTH,)}),
    "a slice taken off": (lambda m, h: torch.sub(h, m.p[:POSITIONS]), {"p": (9, WIDTH)}),
    "a shift, written over": (lambda m, h: (h + m.p).relu_(), {"p": (WIDTH,)}),
    "one value per position": (lambda m, h: h + m.p, {"p": (POSITIONS, 1)}),
    "a number": (lambda m, h: h + m.p, {"p": ()}),
    "a list of one": (lambda m, h: h * m.p, {"p": (1,)}),
    "a scale": (lambda m, h: h * m.p, {"p": (WIDTH,)}),
    "a gate": (lambda m, h: torch.mul(m.p.sigmoid(), h), {"p": (POSITIONS, WIDTH)}),
    "scale and shift": (lambda m, h: m.p * h + m.q, {"p": (WIDTH,), "q": (WIDTH,)}),
    "two made from one": (lambda m, h: h * m.p.sin() + m.p.cos(), {"p": (WIDTH,)}),
    "one made from two": (lambda m, h: h + m.p * m.q, {"p": (WIDTH,), "q": (POSITIONS, 1)}),
    "twice": (lambda m, h: (h + m.p.exp()).tanh() + m.p.exp(), {"p": (WIDTH,)}),
    "a class token": (_class_token, {"p": (1, 1, WIDTH)}),
    "class tokens": (lambda m, h: torch.cat([h, m.p.repeat(len(h), 1, 1)], 1), {"p": (1, 2, WIDTH)}),
    "embedded positions": (lambda m, h: h + m.positions(torch.arange(POSITIONS)), {}),
    "embedded positions in a batch of one": (lambda m, h: h + m.positions(torch.arange(POSITIONS)[None]), {}),
    "embedded positions through a layer": (lambda m, h: h + m.layer(m.positions(torch.arange(POSITIONS))), {}),
    "as many positions as rows": (lambda m, h: h[:, :4] + m.positions(torch.arange(4)), {}),
    "tied to the tokens": (lambda m, h: h + m.tokens.weight[:POSITIONS].flip(0), {}),
    "other axes": (lambda m, h: h + m.p, {"p": (POSITIONS, WIDTH)}),
    "a number besides": (_drawn_apart, {"p": (9, WIDTH)}),
    "written over": (_written_over, {"p": (WIDTH,), "q": (WIDTH,)}),
    "not side by side": (lambda m, h: (h[:, :, None] + m.p).sum(2), {"p": (POSITIONS, 1, WIDTH)}),
    "as large as the rows": (lambda m, h: h + m.p.expand(len(h), -1, -1), {"p": (1, POSITIONS, WIDTH)}),
}


@pytest.mark.parametrize("name", JOINED)
def test_joined_with_rows(name: str) -> None:
    torch.manual_seed(0)
    join, shapes = JOINED[name]
    model, x = Words(join, **shapes).double(), torch.randint(11, (7, POSITIONS))
    j = jacobian(model, x)
    right = torch.einsum("nap,mbp->nmab", j, j)
    for one, two in ((7, 4), (1, 7), (7, 1), (1, 1), (2, 3)):
        found = fw.ntk.empirical_ntk(model, x[:one], x[-two:])
        torch.testing.assert_close(found, right[:one, -two:], rtol=1e-12, atol=1e-13)
    parts = fw.ntk.per_parameter_ntk(model, x)
    torch.testing.assert_close(sum(parts.values()), right, rtol=1e-12, atol=1e-13)
    begin = 0
    for parameter, (key, part) in zip(model.parameters(), parts.items(), strict=True):
        own = j[:, :, begin : begin + parameter.numel()]
        begin += parameter.numel()
        torch.testing.assert_close(part, torch.einsum("nap,mbp->nmab", own, own), rtol=1e-12, atol=1e-13, msg=key)


STRUCTURED = [name for name in JOINED if name not in ("a number besides", "written over", "not side by side")]


@pytest.mark.parametrize("name", STRUCTURED)
def test_no_jacobian_by_autograd(name: str) -> None:
    torch.manual_seed(0)
    join, shapes = JOINED[name]
    model, x = Words(join, **shapes).double(), torch.randint(11, (7, POSITIONS))
    unused = "positions.weight" if "embedded" not in name and "as many" not in name else ""
    methods = {row.parameters: row.method for row in fw.ntk.explain(model, x).rows}
    assert not [names for names, method in methods.items() if method in ("vmap", "loop") and unused not in names]


class Merged(nn.Module):
    """A frozen matrix with a correction of low rank, merged before it is used."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 4), requires_grad=False)
        self.a, self.b = nn.Parameter(torch.randn(5, 2)), nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w + self.a @ self.b)


class Masked(nn.Linear):
    def __init__(self) -> None:
        super().__init__(4, 5)
        self.register_buffer("mask", (torch.rand(5, 4) > 0.5).float())

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight * self.mask).t() + self.bias.exp()


class Symmetric(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.triu() + x.triu(1).mT


class Standardised(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


def _symmetric() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


WEIGHTS: dict[str, Callable[[], nn.Module]] = {
    "weight norm": lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
    "older weight norm": lambda: torch.nn.utils.weight_norm(nn.Linear(4, 5)),
    "orthogonal": lambda: parametrizations.orthogonal(nn.Linear(4, 5)),
    "spectral norm": lambda: parametrizations.spectral_norm(nn.Linear(4, 5)),
    "symmetric": _symmetric,
    "merged": Merged,
    "masked": Masked,
}


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("compute", ["full", "trace"])
def test_made_weights(name: str, compute: str) -> None:
    torch.manual_seed(0)
    layer = WEIGHTS[name]()
    head = nn.Linear(layer(torch.randn(2, 4)).shape[1], 3)
    model, x = nn.Sequential(layer, nn.Tanh(), head).double().eval(), torch.randn(6, 4).double()
    j = jacobian(model, x)
    right = torch.einsum("nap,mbp->nmab", j, j)
    right = right if compute == "full" else right.diagonal(dim1=2, dim2=3).sum(2)
    torch.testing.assert_close(fw.ntk.empirical_ntk(model, x, compute=compute), right, rtol=1e-12, atol=1e-12)
    assert "made" in {row.method for row in fw.ntk.explain(model, x).rows}


@pytest.mark.parametrize("slopes", [1, 3])
def test_prelu(slopes: int) -> None:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 3, 3), nn.PReLU(slopes), nn.Flatten(), nn.Linear(12, 5), nn.PReLU(), nn.Linear(5, 2)]
    model, x = nn.Sequential(*layers).double(), torch.randn(5, 2, 4, 4).double()
    j = jacobian(model, x)
    found = fw.ntk.empirical_ntk(model, x, x[:2])
    torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", j, j[:2]), rtol=1e-12, atol=1e-12)
    assert not {row.method for row in fw.ntk.explain(model, x).rows} & {"vmap", "loop"}


def test_made_filters() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Standardised(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 16, 2)).double()
    x = torch.randn(5, 2, 4, 4).double()
    j = jacobian(model, x)
    found = fw.ntk.empirical_ntk(model, x, x[:2], memory_budget=1 << 20)
    torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", j, j[:2]), rtol=1e-12, atol=1e-12)
    assert {row.method for row in fw.ntk.explain(model, x).rows} == {"gradients", "made", "last"}


def test_weights_from_other_weights_and_rows_from_none() -> None:
    """A generated weight is made; what is made through a recorded layer is not, nor what rows enter."""

    class Generated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.code, self.generator = nn.Parameter(torch.randn(4, 3)), nn.Linear(3, 5)
            self.gate = nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.generator(self.code) * self.gate(x).sigmoid()

    torch.manual_seed(0)
    model, x = Generated().double(), torch.randn(6, 4).double()
    j = jacobian(model, x)
    for rows in (6, 4, 1):
        found = fw.ntk.empirical_ntk(model, x[:rows], x)
        torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", j[:rows], j), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("entries", "method"), [(11, "gradients"), (40, "tokens")])
def test_small_tables_and_large_ones(entries: int, method: str) -> None:
    """Rows of five tokens: 25 pairs of positions cost more than a table of 11 entries, and less than one of 40."""
    torch.manual_seed(0)
    layers = [nn.Embedding(entries, WIDTH, padding_idx=2), nn.Flatten(), nn.Linear(POSITIONS * WIDTH, 2)]
    model, x = nn.Sequential(*layers).double(), torch.randint(min(entries, 6), (7, POSITIONS))
    j = jacobian(model, x)
    found = fw.ntk.empirical_ntk(model, x, x[:3])
    torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", j, j[:3]), rtol=1e-12, atol=1e-13)
    assert method in {row.method for row in fw.ntk.explain(model, x, x[:3]).rows}


def test_other_parameters_in_its_place() -> None:
    torch.manual_seed(0)
    model = Words(lambda m, h: h + m.p[:POSITIONS], p=(9, WIDTH)).double()
    x, other = torch.randint(11, (6, POSITIONS)), torch.randn(9, WIDTH).double()
    found = fw.ntk.empirical_ntk(model, x, params={"p": other.requires_grad_()})
    with torch.no_grad():
        model.p.copy_(other)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name == "p")
    j = jacobian(model, x)
    torch.testing.assert_close(found, torch.einsum("nap,mbp->nmab", j, j), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", ["a slice", "two made from one", "embedded positions"])
def test_blocks_sketches_and_operators(name: str) -> None:
    """The same from many blocks, from the operator, and the Jacobian itself from a sketch of the other method."""
    torch.manual_seed(0)
    join, shapes = JOINED[name]
    model, x = Words(join, **shapes).double(), torch.randint(11, (9, POSITIONS))
    j = jacobian(model, x)
    right = torch.einsum("nap,mbp->nmab", j, j)
    least = fw.ntk.empirical_ntk(model, x, memory_budget=200_000)
    assert torch.equal(least, fw.ntk.empirical_ntk(model, x))
    torch.testing.assert_close(fw.ntk.NTKOperator(model, x).to_dense(), right.transpose(1, 2).flatten(2).flatten(0, 1))
    sketches = [
        fw.ntk.sketch(model, x, 64, kind="srht", **options)
        for options in ({}, {"params": dict(model.named_parameters())})
    ]
    torch.testing.assert_close(*sketches, rtol=1e-12, atol=1e-13)


def test_rows_that_share_through_values_are_refused() -> None:
    """A made value scaled by the rows' largest entry mixes them, though no gradient shows it."""

    class Mixing(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.weight * x.detach().abs().max(), self.bias)

    with pytest.raises(ValueError, match="rows"):
        fw.ntk.empirical_ntk(Mixing(4, 2), torch.randn(9, 4))
