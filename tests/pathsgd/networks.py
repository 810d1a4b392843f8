"""Networks for the tests: random small DAGs with all their paths enumerated, LeNet, ResNet-18, a ReLU RNN."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Residual(nn.Module):
    """Two layers, the first one beside its input: no chain."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.b(x + F.relu(self.a(x)))


class Dag(nn.Module):
    """Values 0 (the input), 1, 2, ...; each is ("linear", source), ("add", a, b) or ("cat", a, b)."""

    def __init__(self, spec, width: int, sizes, bias: bool) -> None:
        super().__init__()
        self.spec = spec
        self.layers = nn.ModuleDict()
        widths = [width]
        for index, (kind, *sources) in enumerate(spec):
            if kind == "linear":
                self.layers[str(index)] = nn.Linear(widths[sources[0]], sizes[index], bias=bias)
                widths.append(sizes[index])
            else:
                widths.append(widths[sources[0]] + (widths[sources[1]] if kind == "cat" else 0))

    def forward(self, x: Tensor) -> Tensor:
        values = [x]
        for index, (kind, *sources) in enumerate(self.spec):
            if kind == "linear":
                values.append(F.relu(self.layers[str(index)](values[sources[0]])))
            elif kind == "add":
                values.append(values[sources[0]] + values[sources[1]])
            else:
                values.append(torch.cat([values[sources[0]], values[sources[1]]], 1))
        return values[-1]


@dataclass
class Paths:
    """Every path as the list of its edges (parameter name, index)."""

    paths: list = field(default_factory=list)

    def total(self, weight, p: float) -> float:
        products = [math.prod(abs(weight(edge)) for edge in path) for path in self.paths]
        if math.isinf(p):
            return max(products, default=0.0)
        return math.fsum(product**p for product in products)

    def gamma(self, weight, edge, p: float) -> float:
        rests = [
            math.prod(abs(weight(other)) for other in path if other != edge) for path in self.paths if edge in path
        ]
        if math.isinf(p):
            return max(rests, default=0.0) ** 2
        return math.fsum(rest**p for rest in rests) ** (2 / p)


def enumerate_paths(model: Dag, width: int) -> Paths:
    """All input-output paths of a Dag, biases starting from a unit that is always 1; found backward, one by one."""
    widths = [width]
    for index, (kind, *sources) in enumerate(model.spec):
        if kind == "linear":
            widths.append(model.layers[str(index)].out_features)
        else:
            widths.append(widths[sources[0]] + (widths[sources[1]] if kind == "cat" else 0))

    def into(value: int, unit: int) -> list:
        if value == 0:
            return [[]]
        kind, *sources = model.spec[value - 1]
        if kind == "add":
            return into(sources[0], unit) + into(sources[1], unit)
        if kind == "cat":
            first = widths[sources[0]]
            return into(sources[0], unit) if unit < first else into(sources[1], unit - first)
        name = f"layers.{value - 1}"
        found = [
            [*path, (f"{name}.weight", (unit, i))] for i in range(widths[sources[0]]) for path in into(sources[0], i)
        ]
        if model.layers[str(value - 1)].bias is not None:
            found.append([(f"{name}.bias", (unit,))])
        return found

    return Paths([path for unit in range(widths[-1]) for path in into(len(model.spec), unit)])


def mlp(*sizes: int, bias: bool = True, norm: bool = False) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs, bias=bias)]
        layers += [nn.BatchNorm1d(outputs)] if norm else []
        layers += [nn.ReLU()]
    return nn.Sequential(*layers[: -2 if norm else -1])


def lenet() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class ResNet18(nn.Module):
    """ResNet-18 for 32×32 images; `width` channels in front (64 in the paper)."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        widths = [width, width, 2 * width, 4 * width, 8 * width]
        blocks = []
        for index, (inputs, outputs) in enumerate(pairwise(widths)):
            blocks += [Block(inputs, outputs, 1 if index == 0 else 2), Block(outputs, outputs, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(8 * width, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.conv(x))))
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Recurrent(nn.Module):
    def __init__(self, inputs: int = 3, hidden: int = 8, outputs: int = 2, layers: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.rnn = nn.RNN(inputs, hidden, layers, nonlinearity="relu", bias=bias, batch_first=True)
        self.out = nn.Linear(hidden, outputs, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        states, _ = self.rnn(x)
        return self.out(states[:, -1])
