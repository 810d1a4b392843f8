"""The convolutional network of PyTorch's NTK tutorial, its kernel by every method.

The tutorial ("Neural Tangent Kernels", pytorch.org) computes the kernel of a small CNN on 32 × 32 images, N = 20 rows
against M = 5, by torch.func: contraction of two Jacobians, and NTK-vector products. Here both stand beside this
library's three methods (structured derivatives, tiled Jacobians, vector products) and its choice, "auto". All must
agree with the contraction to the tutorial's tolerance of 1e-5; the picture shows times and differences.

    python examples/ntk_tutorial.py
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jacrev, jvp, vjp, vmap
from tqdm.auto import tqdm

import command
import finite_width as fw

N, M = 20, 5
TOLERANCE = 1e-5


class CNN(nn.Module):
    """The tutorial's network: three convolutions and a linear layer, 10 outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 32, (3, 3))
        self.conv2 = nn.Conv2d(32, 32, (3, 3))
        self.conv3 = nn.Conv2d(32, 32, (3, 3))
        self.fc = nn.Linear(21632, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x).relu()
        x = self.conv2(x).relu()
        x = self.conv3(x)
        return self.fc(x.flatten(1))


def _outputs(model: nn.Module) -> tuple[Callable[..., Tensor], dict[str, Tensor]]:
    """The model as a function of its parameters and one row, and the parameters."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def call(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, (row.unsqueeze(0),)).squeeze(0)

    return call, parameters


def contraction(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """torch.func: both Jacobians, contracted parameter by parameter; [N, M, O, O]."""
    call, parameters = _outputs(model)
    jacobian = vmap(jacrev(call), (None, 0))
    left, right = jacobian(parameters, x1), jacobian(parameters, x2)
    terms = [torch.einsum("nap,mbp->nmab", left[name].flatten(2), right[name].flatten(2)) for name in left]
    return torch.stack(terms).sum(0)


def vector_products(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """torch.func: for every pair of rows, J₁ J₂ᵀ applied to the unit vectors; [N, M, O, O]."""
    call, parameters = _outputs(model)

    def pair(row1: Tensor, row2: Tensor) -> Tensor:
        at_row1 = lambda values: call(values, row1)  # noqa: E731
        output, pull = vjp(lambda values: call(values, row2), parameters)

        def product(vector: Tensor) -> Tensor:
            return jvp(at_row1, (parameters,), pull(vector))[1]

        return vmap(product)(torch.eye(output.shape[0], dtype=output.dtype, device=output.device)).T

    return vmap(vmap(pair, (None, 0)), (0, None))(x1, x2)


def methods() -> dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]]:
    """Every way to the kernel, by name."""
    found = {"torch.func contraction": contraction, "torch.func vector products": vector_products}
    for method in ("jacobian", "products", "structured", "auto"):

        def ours(model: nn.Module, x1: Tensor, x2: Tensor, method: str = method) -> Tensor:
            return fw.ntk.empirical_ntk(model, x1, x2, method=method)

        found[f"finite-width {method}"] = ours
    return found


def run(rows: int, columns: int, repeats: int, seed: int, device: str) -> dict[str, Any]:
    """Every method's median time and largest difference to the contraction."""
    torch.manual_seed(seed)
    model = CNN().to(device)
    x1, x2 = torch.randn(rows, 3, 32, 32, device=device), torch.randn(columns, 3, 32, 32, device=device)
    expected = contraction(model, x1, x2)
    exact = contraction(model.double(), x1.double(), x2.double())
    model.float()
    figures: dict[str, Any] = {"rows": rows, "columns": columns, "seed": seed, "repeats": repeats, "methods": {}}
    with tqdm(total=len(methods()) * repeats, unit="run") as bar:
        for name, method in methods().items():
            times = []
            for _ in range(repeats):
                bar.set_description(name)
                started = time.perf_counter()
                found = method(model, x1, x2)
                if device.startswith("cuda"):
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - started)
                bar.update()
            figures["methods"][name] = {
                "seconds": statistics.median(times),
                "agrees": torch.allclose(found, expected, rtol=0, atol=TOLERANCE * float(expected.abs().max())),
                "relative error against float64": float((found - exact).norm() / exact.norm()),
            }
    return figures


def draw(figures: dict[str, Any], path: Any) -> None:
    """Times and errors of every method, side by side."""
    import style

    names = list(figures["methods"])
    rows = [figures["methods"][name] for name in names]
    colours = [style.BLUE if name.startswith("finite-width") else style.GREY for name in names]
    drawn, axes = style.figure(9.6, 3.6, 2, sharey=True)
    panels = (("seconds", "seconds (median)", "{:.3f} s"), ("relative error against float64", None, "{:.1e}"))
    for panel, (key, label, form) in zip(axes, panels, strict=True):
        values = [row[key] for row in rows]
        panel.barh(range(len(names)), values, color=colours, height=0.62)
        panel.set_xscale("log")
        panel.set_xlim(min(values) / 3, max(values) * 5)
        for place, value in enumerate(values):
            panel.annotate(form.format(value), (value * 1.12, place), va="center", fontsize=8.5)
        panel.set_xlabel(label or key)
        panel.grid(axis="y", visible=False)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    axes[0].set_title(f"Kernel of the tutorial's CNN, {figures['rows']} × {figures['columns']} images, 10 × 10 outputs")
    style.save(drawn, path)


def main() -> None:
    options = command.arguments(__doc__).parse_args()
    rows, columns, repeats = (6, 3, 1) if options.quick else (N, M, 5)
    figures = run(rows, columns, repeats, options.seed, options.device)
    out = options.out / "ntk_tutorial"
    draw(figures, out / "methods.png")
    command.save_figures(out / "figures.json", figures)
    baseline = figures["methods"]["torch.func contraction"]["seconds"]
    for name, row in figures["methods"].items():
        verdict = "agrees" if row["agrees"] else "DIFFERS"
        print(
            f"{name:28} {1e3 * row['seconds']:8.1f} ms  {baseline / row['seconds']:6.2f}x  "
            f"error {row['relative error against float64']:.1e}  {verdict}"
        )
    print(f"picture {out / 'methods.png'}, figures {out / 'figures.json'}")
    if not all(row["agrees"] for row in figures["methods"].values()):
        raise SystemExit("a method disagrees with the contraction")


if __name__ == "__main__":
    main()
