"""Networks of which path sums leave float64's range, beside chains."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import finite_width as fw
from pathsgd.networks import Recurrent

P = fw.pathsgd


class Deep(nn.Module):
    """Residual blocks."""

    def __init__(self, depth, width, norm=False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.BatchNorm1d(width) if norm else nn.Identity() for _ in range(depth))
        self.o = nn.Linear(width, 2)

    def forward(self, x):
        for block, norm in zip(self.blocks, self.norms, strict=True):
            x = x + F.relu(norm(block(x)))
        return self.o(x)


def constant(model, value):
    for each in model.parameters():
        nn.init.constant_(each, value)
    return model.double()


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("every", [1, 2])
def test_masses_far_below_the_norm(norm, every) -> None:
    """400 blocks, each of which multiplies by 17: Φ passes 2^1600. B of a layer is one number."""
    depth, width = 400, 4
    model = constant(Deep(depth, width, norm).eval(), 4.0)
    if norm:
        for each in model.norms:
            nn.init.ones_(each.weight)
            each.eps = 0.0
    assert P.path_norm(model, 1, log=True).item() > 1600 * math.log(2)
    optimizer = P.PathSGD(model, 1e-3, p=1, update_every=every, input_shape=(width,))
    wanted, behind = {"o.bias": 1.0}, 2 * 4.0
    for index in reversed(range(depth)):
        wanted[f"blocks.{index}.bias"] = float(behind) if behind < 2.0**500 else None
        behind = behind * (1 + 4 * width)
    if norm:
        wanted |= {name.replace("blocks", "norms"): value for name, value in wanted.items() if "blocks" in name}
    gamma = P.path_gamma(model, 1, input_shape=(width,))
    for step in range(2):
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        for name, each in model.named_parameters():
            each.grad = torch.full_like(each, gamma[name].flatten()[0].sqrt().clamp_max(1e150).item() ** 2)
        optimizer.step()
        for name, mass in wanted.items():
            if mass is not None and step == 0:
                torch.testing.assert_close(gamma[name], torch.full_like(gamma[name], mass**2), rtol=1e-10, atol=0)
                moved = before[name] - model.get_parameter(name)
                torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-9, atol=0)
        if every == 2:
            other = P.PathSGD(model, 1e-3, p=1, update_every=2, input_shape=(width,))
            other.load_state_dict(optimizer.state_dict())
            optimizer = other
    assert gamma["o.weight"].isinf().all()


def test_a_bias_of_a_layer_in_two_places() -> None:
    """Its masses at both exponents are added: Φ = b w + … where the layer comes first, and b where it comes last."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.layer = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)

        def forward(self, x):
            return self.layer(F.relu(self.layer(self.up(x))))

    model = constant(Net(), 2.0)
    nn.init.constant_(model.up.weight, 2.0**300)
    gamma = P.path_gamma(model, 1, input_shape=(1,))
    assert gamma["layer.bias"].item() == (2.0 + 1.0) ** 2
    assert gamma["up.weight"].item() == 16


def test_a_long_sequence() -> None:
    """3000 steps that double: biases late in the sequence count beside 2^3000 of the early ones, in one sum."""
    model = constant(Recurrent(1, 1, 1), 1.0)
    nn.init.constant_(model.rnn.weight_hh_l0, 2.0)
    gamma = P.path_gamma(model, 1, input_shape=(3000, 1))
    assert gamma["out.bias"].item() == 1
    assert gamma["rnn.bias_ih_l0"].item() == math.inf
    short = P.path_gamma(model, 1, input_shape=(300, 1))
    assert short["rnn.bias_ih_l0"].item() == pytest.approx((2.0**300 - 1) ** 2, rel=1e-12)


def test_branches_too_far_apart_are_refused() -> None:
    """A direct branch of 1 beside one of 2^1200: its γ is out of range, and no step would come of it unseen."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.direct = nn.Linear(1, 1, bias=False)
            self.far = nn.Sequential(*[nn.Linear(1, 1, bias=False) for _ in range(12)])

        def forward(self, x):
            return self.direct(x) + self.far(x)

    model = constant(Net(), 2.0**50)
    for call in (P.path_gamma, lambda model, p: P.PathSGD(model, 0.1, p=p)):
        with pytest.raises(ValueError, match=r"path sums at p = 2 are 2\^\d+ apart"):
            call(model, 2)
        call(model, 1)
    nn.init.zeros_(model.direct.weight)
    assert P.path_norm(model, 2, power=True, log=True).item() == pytest.approx(1200 * math.log(2), rel=1e-12)


class Spread(nn.Module):
    """Two layers, in a chain or with a branch, whose units are 2^±60 apart; the function is as before."""

    def __init__(self, branch, apart) -> None:
        super().__init__()
        self.a, self.b, self.c, self.branch = nn.Linear(4, 6), nn.Linear(6, 2), nn.Linear(4, 2), branch
        factors = 2.0 ** (apart * torch.tensor([-1.0, 1, 0, -1, 1, 0]))
        with torch.no_grad():
            self.a.weight.mul_(factors[:, None])
            self.a.bias.mul_(factors)
            self.b.weight.div_(factors)

    def forward(self, x):
        y = self.b(F.relu(self.a(x)))
        return y + self.c(x) if self.branch else y


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("branch", [False, True])
@pytest.mark.parametrize("p", [8.0, 9.0, 12.0])
def test_units_too_far_apart_for_p(p, branch) -> None:
    torch.manual_seed(0)
    model = Spread(branch, 60.0).double()
    optimizer = P.PathSGD(model, 1e-12, p=p)
    if not branch:
        model.c.requires_grad_(False)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
        before = {name: each.detach().clone() for name, each in model.named_parameters()}
        if p <= 8:
            assert all((each > 0).all() for name, each in P.path_gamma(model, p).items() if branch or "c" not in name)
            optimizer.step()
            continue
        for call in (optimizer.step, lambda: P.path_gamma(model, p), lambda: P.path_norm(model, p)):
            with pytest.raises(ValueError, match=f"p = {p:g} takes paths of this model out of float64's range"):
                call()
        assert all(torch.equal(each, before[name]) for name, each in model.named_parameters())


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("branch", [False, True])
def test_a_large_p_of_a_plain_model(branch) -> None:
    torch.manual_seed(0)
    model = Spread(branch, 1.0).double()
    optimizer = P.PathSGD(model, 1e-12, p=12)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
        gamma, before = (
            P.path_gamma(model, 12),
            {name: each.detach().clone() for name, each in model.named_parameters()},
        )
        optimizer.step()
        for name, each in model.named_parameters():
            if each.grad is not None:
                torch.testing.assert_close(each, before[name] - 1e-12 * each.grad / gamma[name])
