"""Computes the known results that take seconds and writes docs/results/known.json; the long ones are examples' runs.

python docs/measure_known.py
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import finite_width as fw

FILE = Path(__file__).resolve().parent / "results" / "known.json"


def tt_errors() -> dict[str, Any]:
    """TT-SVD of a Gaussian 1024 x 1024 matrix, modes (4, 8, 8, 4) twice, float64, seed 0."""
    a = torch.randn(1024, 1024, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    modes = (4, 8, 8, 4)
    found: dict[str, Any] = {}
    for rank in (8, 16, 64):
        cores = fw.tt.tt_matrix_svd(a, modes, modes, max_rank=rank)
        error = float((to_matrix(cores) - a).norm() / a.norm())
        found[str(rank)] = {"relative error": error, "parameters": sum(core.numel() for core in cores)}
    exact = fw.tt.tt_matrix_svd(a, modes, modes, eps=0.0)
    found["maximal ranks"] = [core.shape[-1] for core in exact[:-1]]
    return found


def to_matrix(cores: list[Tensor]) -> Tensor:
    """TT-matrix cores [r, m, n, r'] -> [M, N]."""
    d = len(cores)
    full = fw.tt.tt_to_dense([core.flatten(1, 2) for core in cores])
    full = full.reshape([size for core in cores for size in core.shape[1:3]])
    rows = 1
    for core in cores:
        rows *= core.shape[1]
    return full.permute(*range(0, 2 * d, 2), *range(1, 2 * d, 2)).reshape(rows, -1)


def ranks(tensor: Tensor) -> int:
    return max(core.shape[-1] for core in fw.tt.tt_svd(tensor, eps=1e-10)[:-1])


def matrix_ranks(a: Tensor, modes: tuple[int, ...]) -> int:
    return max(core.shape[-1] for core in fw.tt.tt_matrix_svd(a, modes, modes, eps=1e-10)[:-1])


def tt_ranks() -> dict[str, int]:
    """Ranks that are known exactly."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, dtype=torch.float64, generator=generator)  # noqa: E731
    i = torch.arange(4096, dtype=torch.float64)
    grid = (2,) * 12
    eye = torch.eye(256, dtype=torch.float64)
    laplacian = 2 * eye - torch.diag(torch.ones(255, dtype=torch.float64), 1)
    laplacian = laplacian - torch.diag(torch.ones(255, dtype=torch.float64), -1)
    shift = torch.diag(torch.ones(255, dtype=torch.float64), 1)
    a, b, c = randn(4, 4), randn(4, 4), randn(4, 4)
    rows, columns = torch.arange(64, dtype=torch.float64)[:, None], torch.arange(64, dtype=torch.float64)[None]
    return {
        "Kronecker product": matrix_ranks(torch.kron(torch.kron(a, b), c), (4, 4, 4)),
        "identity": matrix_ranks(eye, (4, 4, 4, 4)),
        "i + j": ranks((rows + columns).reshape((2,) * 12)),
        "sin(ai + bj + c)": ranks(torch.sin(0.1 * rows + 0.2 * columns + 0.3).reshape((2,) * 12)),
        "sin on a grid": ranks(torch.sin(0.01 * i + 0.5).reshape(grid)),
        "shift": matrix_ranks(shift, (2,) * 8),
        "1-D Laplacian": matrix_ranks(laplacian, (2,) * 8),
    }


def tt_counts() -> dict[str, int]:
    def count(**options: Any) -> int:
        layer = fw.tt.TTLinear(bias=False, **options)
        return sum(p.numel() for p in layer.parameters())

    five = {"in_modes": (4,) * 5, "out_modes": (4,) * 5}
    s = {"in_modes": (4, 7, 4, 7), "out_modes": (5,) * 4}
    vgg = {"in_modes": (2, 7, 8, 8, 7, 4), "out_modes": (4,) * 6}
    return {
        "4^5 x 4^5 rank 8": count(in_features=1024, out_features=1024, rank=8, **five),
        "(4,7,4,7) x 5^4 rank 8": count(in_features=784, out_features=625, rank=8, **s),
        "VGG fc6 rank 2": count(in_features=25088, out_features=4096, rank=2, **vgg),
    }


def small_network(bias: bool) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(2, 2, bias=bias), nn.ReLU(), nn.Linear(2, 1, bias=bias)).double()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0, -2.0], [3.0, 4.0]]))
        model[2].weight.copy_(torch.tensor([[5.0, -6.0]]))
        if bias:
            model[0].bias.copy_(torch.tensor([1.0, -1.0]))
            model[2].bias.fill_(2.0)
    return model


def path_vectors() -> dict[str, Any]:
    """The worked vectors of the 2-2-1 network, without and with biases."""
    found: dict[str, Any] = {}
    for p in (1, 2, float("inf")):
        for bias in (False, True):
            model = small_network(bias)
            gamma = fw.pathsgd.path_gamma(model, p)
            total = fw.pathsgd.path_norm(model, p, power=p != float("inf"))
            entry = {"phi": total.item()} | {name: value.tolist() for name, value in gamma.items()}
            found[f"p={p:g}{' with biases' if bias else ''}"] = entry
    found["norm, p=2"] = fw.pathsgd.path_norm(small_network(False), 2).item()
    found["norm, p=2 with biases"] = fw.pathsgd.path_norm(small_network(True), 2).item()
    return found


def path_theorem() -> dict[str, float]:
    """phi_p = mu^d after `balance_`, for a random network of depth d without biases."""
    torch.manual_seed(0)
    found = {}
    for p in (1, 2):
        layers = [nn.Linear(6, 9, bias=False), nn.ReLU(), nn.Linear(9, 7, bias=False), nn.ReLU()]
        model = nn.Sequential(*layers, nn.Linear(7, 1, bias=False)).double()
        norm = fw.pathsgd.path_norm(model, p).item()
        before = fw.pathsgd.max_norm(model, p).item() ** 3
        fw.pathsgd.balance_(model, p)
        after = fw.pathsgd.max_norm(model, p).item() ** 3
        found |= {f"p={p}: mu^d before": before, f"p={p}: mu^d balanced": after, f"p={p}: path norm": norm}
    return found


def kl_at_the_prior() -> dict[str, float]:
    """KL is 0 where q = p: mu = 0 and softplus(rho) = 1."""
    layer = fw.bayes.BayesLinear(64, 32, prior=fw.bayes.GaussianPrior(std=1.0)).double()
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            parameter.fill_(0.0 if name.endswith("mu") else float(torch.expm1(torch.tensor(1.0).double()).log()))
    return {"KL": fw.bayes.kl(layer).item()}


MEASUREMENTS: dict[str, Callable[[], Any]] = {
    "tt_errors": tt_errors,
    "tt_ranks": tt_ranks,
    "tt_counts": tt_counts,
    "path_vectors": path_vectors,
    "path_theorem": path_theorem,
    "kl_at_the_prior": kl_at_the_prior,
}


def main() -> None:
    found: dict[str, Any] = {"command": "python docs/measure_known.py", "seed": 0}
    begin = time.process_time()
    for name, measure in MEASUREMENTS.items():
        before = time.perf_counter()
        found[name] = measure()
        print(f"{name}: {time.perf_counter() - before:.1f} s")
    found["processor seconds"] = round(time.process_time() - begin, 1)
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
