"""Path-SGD's step against SGD's, Adam's, and plain-torch ways to the same step; the γ pass of conv nets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import finite_width as fw
import harness
from finite_width.pathsgd import ops
from harness import Case
from resnet import resnet18

LR = 1e-9  # the weights have to stay where they are over many timed steps
PEERS: dict[str, Callable[[], Any] | str] = {
    "path-sgd (the authors')": "published as a script that cannot be installed; see docs/pathsgd.md",
    "pathnorm-pytorch": "has the path norm, no γ and no optimizer",
}


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def with_gradients(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.grad = 0.01 * torch.randn_like(parameter)
    return model


def twice(step: Callable[[], Any]) -> Callable[[], None]:
    """Two steps: Path-SGD's sweeps go forward and backward in turn, and what is timed should hold both."""

    def steps() -> None:
        step()
        step()

    return steps


def plain_torch_step(model: nn.Sequential, lr: float) -> Callable[[], None]:
    """Path-SGD (p = 2) with F and B vectors in plain torch, everything preallocated."""
    layers = [layer for layer in model if isinstance(layer, nn.Linear)]
    squares = [torch.empty_like(layer.weight) for layer in layers]
    steps = [torch.empty_like(layer.weight) for layer in layers]

    @torch.no_grad()
    def step() -> None:
        forward = [torch.ones(layers[0].in_features)]
        for layer, square in zip(layers, squares, strict=True):
            torch.mul(layer.weight, layer.weight, out=square)
            forward.append(torch.addmv(layer.bias.square(), square, forward[-1]))
        backward = torch.ones(layers[-1].out_features)
        for layer, square, change, known in zip(
            reversed(layers), reversed(squares), reversed(steps), reversed(forward[:-1]), strict=True
        ):
            below = torch.mv(square.T, backward)
            torch.div(layer.weight.grad, known, out=change)
            layer.weight.sub_(change.div_(backward[:, None]), alpha=lr)
            layer.bias.sub_(layer.bias.grad / backward, alpha=lr)
            backward = below

    return step


def autograd_step(model: nn.Sequential, lr: float) -> Callable[[], None]:
    """Path-SGD (p = 2) with γ from autograd on the network of squared weights."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    inputs = next(layer.in_features for layer in model if isinstance(layer, nn.Linear))

    def step() -> None:
        squares = [parameter.detach().square().requires_grad_() for parameter in parameters]
        network = torch.func.functional_call(model, dict(zip(names, squares, strict=True)), (torch.ones(1, inputs),))
        gammas = torch.autograd.grad(network.sum(), squares)
        with torch.no_grad():
            for parameter, gamma in zip(parameters, gammas, strict=True):
                parameter.sub_(parameter.grad / gamma, alpha=lr)

    return step


def optimizer_case(sizes: Sequence[int], limit: float) -> Case:
    """The optimizer's time alone. `limit`: our time over fused SGD's that is aimed at."""
    name = "-".join(map(str, sizes))
    models = [with_gradients(mlp(sizes)) for _ in range(6)]
    weights = sum(parameter.numel() for parameter in models[0].parameters())
    steps = {
        "finite-width": fw.pathsgd.PathSGD(models[0], LR).step,
        "SGD(fused)": torch.optim.SGD(models[1].parameters(), LR, fused=True).step,
        "Adam(fused)": torch.optim.Adam(models[2].parameters(), LR, fused=True).step,
        "Path-SGD, plain torch": plain_torch_step(models[3], LR),
        "Path-SGD, autograd": autograd_step(models[4], LR),
        "finite-width, momentum": fw.pathsgd.PathSGD(models[5], LR, momentum=0.9).step,
    }
    return Case(
        name=name,
        what=f"two optimizer steps, {weights / 1e6:.1f} M float32 parameters, no momentum",
        implementations={name: twice(step) for name, step in steps.items()},
        baseline="SGD(fused)",
        peers=PEERS,
        bytes=2 * 12.0 * weights,
        targets={
            ("finite-width", "SGD(fused)"): 1 / limit,
            ("finite-width", "Adam(fused)"): 1 / 0.6,
            ("finite-width", "Path-SGD, plain torch"): 3.0,
            ("finite-width", "Path-SGD, autograd"): 20.0,
        },
        memory=False,
    )


def large_case(sizes: Sequence[int]) -> Case:
    """Layers that are bound by the memory: three passes, held against a copy of as many bytes."""
    models = [with_gradients(mlp(sizes)) for _ in range(5)]
    weights = sum(parameter.numel() for parameter in models[0].parameters())
    steps = {
        "finite-width": fw.pathsgd.PathSGD(models[0], LR).step,
        "copy": harness.copy_of(12.0 * weights),
        "SGD(fused)": torch.optim.SGD(models[1].parameters(), LR, fused=True).step,
        "Adam(fused)": torch.optim.Adam(models[2].parameters(), LR, fused=True).step,
        "Path-SGD, plain torch": plain_torch_step(models[3], LR),
        "finite-width, momentum": fw.pathsgd.PathSGD(models[4], LR, momentum=0.9).step,
    }
    return Case(
        name=f"{len(sizes) - 1} of {sizes[0]}",
        what=f"two optimizer steps, {weights / 1e6:.1f} M float32 parameters; the copy: three passes over the weights",
        implementations={name: twice(step) for name, step in steps.items()},
        baseline="SGD(fused)",
        bytes=2 * 12.0 * weights,
        targets={
            ("finite-width", "copy"): 0.85,
            ("finite-width", "SGD(fused)"): 1 / 1.15,
            ("finite-width", "Adam(fused)"): 2.0,
        },
        memory=False,
    )


def replayed_case(sizes: Sequence[int], steps: int = 10) -> Case:
    """Steps from a captured graph, without Python between them."""
    models = [with_gradients(mlp(sizes)) for _ in range(3)]
    weights = sum(parameter.numel() for parameter in models[0].parameters())
    path = fw.pathsgd.PathSGD(models[0], LR, capturable=harness.DEVICE != "cpu")
    implementations = {
        "finite-width": path.step,
        "SGD(fused)": torch.optim.SGD(models[1].parameters(), LR, fused=True).step,
        "Path-SGD, plain torch": plain_torch_step(models[2], LR),
    }
    return Case(
        name="-".join(map(str, sizes)) + ", replayed",
        what=f"{steps} optimizer steps from one graph, {weights / 1e6:.1f} M float32 parameters, no momentum",
        implementations={name: harness.replayed(step, steps) for name, step in implementations.items()},
        baseline="SGD(fused)",
        bytes=12.0 * weights * steps,
        targets={("finite-width", "SGD(fused)"): 1 / 1.3},
        memory=False,
    )


def sweep_case(size: int) -> Case:
    """The op alone, without an optimizer around it, against fused SGD on the same weight."""
    weight, grad, plain = (torch.randn(size, size, device=harness.DEVICE) for _ in range(3))
    vectors = [torch.ones(size + 1, dtype=torch.float64, device=harness.DEVICE) for _ in range(4)]
    mass = torch.zeros(2, dtype=torch.float64, device=harness.DEVICE)
    rates = (LR, 0.0, 0.0, 1.0, 1.0)
    parameter = nn.Parameter(plain)
    parameter.grad = grad

    def sweep(forward: bool) -> Callable[[], None]:
        return lambda: ops.path_sweep(weight, grad, None, None, None, None, *vectors, mass, forward, 2.0, rates, rates)

    return Case(
        name=f"sweep {size}",
        what=f"one {size}×{size} float32 layer: update by 1/γ and both path vectors; against the update alone",
        implementations={
            "forward sweep": sweep(True),
            "backward sweep": sweep(False),
            "SGD(fused)": torch.optim.SGD([parameter], LR, fused=True).step,
        },
        baseline="SGD(fused)",
        bytes=12.0 * size * size,
        memory=False,
    )


def exactness_case() -> Case:
    """One step from the same weights and gradients; the result is the change of the weights."""
    sizes = (784, 1000, 1000, 10)
    start = with_gradients(mlp(sizes))

    def change(make: Callable[[nn.Sequential], Callable[[], Any]]) -> Callable[[], tuple[Tensor, ...]]:
        def run() -> tuple[Tensor, ...]:
            model = mlp(sizes)
            for parameter, other in zip(model.parameters(), start.parameters(), strict=True):
                parameter.data.zero_().add_(other.data)
                parameter.grad = other.grad
            make(model)()
            return tuple(a.detach() for a in model.parameters())

        return run

    def exact() -> tuple[Tensor, ...]:
        gamma = fw.pathsgd.path_gamma(start)
        return tuple(p.detach().double() - 1e-4 * p.grad.double() / gamma[n] for n, p in start.named_parameters())

    return Case(
        name="one step",
        what="784-1000-1000-10, one step of lr 1e-4 from a fresh optimizer: the new weights against float64",
        implementations={
            "finite-width": change(lambda model: fw.pathsgd.PathSGD(model, 1e-4).step),
            "Path-SGD, plain torch": change(lambda model: plain_torch_step(model, 1e-4)),
            "Path-SGD, autograd": change(lambda model: autograd_step(model, 1e-4)),
        },
        baseline="Path-SGD, plain torch",
        exact=exact,
        memory=False,
    )


def training_case() -> Case:
    """A whole training step: forward, backward, optimizer."""
    models = [mlp((784, 4000, 4000, 10)) for _ in range(2)]
    x, y = torch.randn(100, 784), torch.randint(0, 10, (100,))
    optimizers = [fw.pathsgd.PathSGD(models[0], LR), torch.optim.SGD(models[1].parameters(), LR, fused=True)]

    def train(index: int) -> Callable[[], None]:
        def run() -> None:
            optimizers[index].zero_grad(set_to_none=False)
            F.cross_entropy(models[index](x), y).backward()
            optimizers[index].step()

        return run

    return Case(
        name="training step",
        what="784-4000-4000-10, batch 100: forward, backward and optimizer, two steps",
        implementations={"finite-width": twice(train(0)), "SGD(fused)": twice(train(1))},
        baseline="SGD(fused)",
        targets={("finite-width", "SGD(fused)"): 1 / 1.02},
        min_runs=40,
        memory=False,
    )


def vgg11() -> nn.Sequential:
    layers: list[nn.Module] = []
    inputs = 3
    for width in (64, "pool", 128, "pool", 256, 256, "pool", 512, 512, "pool", 512, 512, "pool"):
        if isinstance(width, str):
            layers.append(nn.MaxPool2d(2))
        else:
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
            inputs = width
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(512, 10))


def conv_case(name: str, make: Callable[[], nn.Sequential]) -> Case:
    """PathSGD's whole step, γ pass and update, against the forward and backward pass that fed it."""
    torch.manual_seed(0)
    model = make()
    x, y = torch.randn(100, 3, 32, 32), torch.randint(0, 10, (100,))
    optimizer = fw.pathsgd.PathSGD(model, 0.0, input_shape=(3, 32, 32), batchnorm="running")

    def forward_backward() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()

    def step() -> None:
        for parameter in model.parameters():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        optimizer.step()

    return Case(
        name=name,
        what="32×32 images, batch 100, float32: PathSGD's step (γ pass and update) against forward + backward",
        implementations={"forward + backward": forward_backward, "finite-width": step},
        baseline="forward + backward",
        targets={("finite-width", "forward + backward"): 1 / 0.06},
        limit=90.0,
        memory=False,
    )


CASES: dict[str, Callable[[], Case]] = {
    "784-4000-4000-10": lambda: optimizer_case((784, 4000, 4000, 10), 1.25),
    "3072-4000-4000-10": lambda: optimizer_case((3072, 4000, 4000, 10), 1.15),
    "training step": training_case,
    "one step": exactness_case,
    "VGG-11": lambda: conv_case("VGG-11", vgg11),
    "ResNet-18": lambda: conv_case("ResNet-18", resnet18),
}


def gpu_cases(scale: int = 1) -> dict[str, Callable[[], Case]]:
    """The cases of a GPU; a scale makes them smaller, to see that they run."""
    wide, hidden = 8192 // scale, 4000 // scale
    return {
        f"sweep {wide}": lambda: sweep_case(wide),
        f"four of {wide}": lambda: large_case((wide,) * 5),
        "784-4000-4000-10, replayed": lambda: replayed_case((784 // scale, hidden, hidden, 10)),
        "one step": exactness_case,
    }


if harness.DEVICE != "cpu":
    CASES = gpu_cases()
