"""The main job in one command: exact tangent kernels of finite networks, compared, timed, and used to classify.

1. The empirical NTK of a random MLP by torch.func's Jacobian contraction and by this library, side by side: the
   largest relative difference, times, and peak memory (each in a fresh process).
2. The plan by which the library computes it.
3. Test accuracy of NNGP and NTK prediction over 10 seeds, each a new training batch of 128 and a new network.
4. Pictures under out/demo/: the kernel sorted by class, its spectrum, the accuracies.

It runs on scikit-learn's digits 3 and 8; with FINITE_WIDTH_DATA naming a folder that holds
cifar10_airplane_automobile.npz, on two-class CIFAR-10 as well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.func import functional_call, jacrev, vmap

import command
import data
import finite_width as fw
import ntk_cifar2

ROWS = ntk_cifar2.TRAINING_IMAGES
SEEDS = 10


def contraction(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """The kernel as torch's tutorial computes it: both Jacobians by torch.func, contracted parameter by parameter."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def outputs(values: dict[str, Tensor], row: Tensor) -> Tensor:
        return functional_call(model, values, (row.unsqueeze(0),)).squeeze(0)

    jacobian = vmap(jacrev(outputs), (None, 0))
    left, right = jacobian(parameters, x1), jacobian(parameters, x2)
    pairs = [(left[name].flatten(2), right[name].flatten(2)) for name in left]
    return sum((torch.einsum("nap,mbp->nmab", a, b) for a, b in pairs), torch.zeros(()))


def library(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """The same kernel by this library."""
    return fw.ntk.empirical_ntk(model, x1, x2)


METHODS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "torch.func": contraction,
    "finite-width": library,
}


def images_of(name: str, folder: Path | None) -> data.Data:
    """The dataset by its short name, as rows of pixels in [-1, 1]."""
    images = data.cifar2(folder) if name == "cifar2" else data.digits((3, 8))
    return images.scaled(0.5, 0.5).flat()


def problem(images: data.Data) -> tuple[nn.Module, Tensor, Tensor]:
    """The network and the two batches of the comparison: training images against test images."""
    model = ntk_cifar2.network(images.x_train.shape[1], seed=0)
    return model, images.x_train[:ROWS], images.x_test[:ROWS]


def measure(method: str, name: str, folder: Path | None) -> dict[str, float]:
    """Median time and peak memory beyond the data, of one method in this process."""
    model, x1, x2 = problem(images_of(name, folder))
    call = METHODS[method]
    call(model, x1[:2], x2[:2])  # what loads on first use is not the kernel's cost
    before = memory("VmRSS")
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")  # the high-water mark starts here
    call(model, x1, x2)
    megabytes = memory("VmHWM") - before
    times = []
    while len(times) < 3 or (sum(times) < 2 and len(times) < 50):
        started = time.perf_counter()
        call(model, x1, x2)
        times.append(time.perf_counter() - started)
    return {"seconds": statistics.median(times), "megabytes": megabytes}


def memory(what: str) -> float:
    """This process's memory in MB: VmRSS (now) or VmHWM (its high-water mark); 0 where the system does not tell."""
    table = Path("/proc/self/status")
    lines = table.read_text().splitlines() if table.exists() else []
    return next((int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith(what)), 0.0)


def measured_apart(method: str, name: str, folder: Path | None) -> dict[str, float]:
    """`measure` in a fresh process, whose peak memory is that method's alone."""
    arguments = [sys.executable, __file__, "--measure", method, name]
    environment = os.environ | ({"FINITE_WIDTH_DATA": str(folder)} if folder else {})
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring {method} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def compare(name: str, folder: Path | None) -> dict[str, Any]:
    """Both methods' kernels, their difference and their costs."""
    model, x1, x2 = problem(images_of(name, folder))
    expected, found = contraction(model, x1, x2), library(model, x1, x2)
    figures: dict[str, Any] = {method: measured_apart(method, name, folder) for method in METHODS}
    figures["largest relative difference"] = float(((found - expected).abs() / expected.abs().max()).max())
    figures["times faster"] = figures["torch.func"]["seconds"] / figures["finite-width"]["seconds"]
    return figures


def comparison_table(figures: dict[str, Any]) -> Table:
    """What `compare` found, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "time", "ratio", "peak memory"):
        table.add_column(column, justify="left" if not column else "right")
    baseline = figures["torch.func"]["seconds"]
    for method in METHODS:
        each = figures[method]
        row = [f"{1e3 * each['seconds']:.1f} ms", f"{baseline / each['seconds']:.0f}×", f"{each['megabytes']:.0f} MB"]
        table.add_row(method, *row, style="bold green" if method == "finite-width" else "")
    return table


def accuracy_table(results: dict[str, dict[str, Any]]) -> Table:
    """The accuracies of every dataset, for the terminal."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("")
    for column in ("NNGP", "NTK"):
        table.add_column(column, justify="right")
    for name, rows in results.items():
        cells = [
            f"{statistics.mean(rows[each]):.1f} ± {statistics.stdev(rows[each]):.1f} %" for each in ("nngp", "ntk")
        ]
        table.add_row(name, *cells)
    return table


def draw_kernel(images: data.Data, out: Path) -> Path:
    """Both kernels of a training batch, rows sorted by class, as correlations."""
    import style

    model, _, _ = problem(images)
    order = torch.argsort(images.y_train[:ROWS], stable=True)
    x, labels = images.x_train[:ROWS][order], images.y_train[:ROWS][order]
    kernels = {"NNGP": fw.ntk.nngp_kernel(model, x), "NTK": fw.ntk.empirical_ntk(model, x, compute="trace")}
    drawn, axes = style.figure(9.2, 4.5, 2)
    classes = images.name.split()[-1].split("/")
    boundary = int((labels == 0).sum()) - 0.5
    for panel, (name, K) in zip(axes, kernels.items(), strict=True):
        scale = K.diagonal().sqrt()
        correlation = (K / scale / scale.unsqueeze(1)).numpy()
        off_diagonal = correlation[~torch.eye(len(K), dtype=torch.bool).numpy()]
        low, high = np.quantile(off_diagonal, [0.01, 0.99])  # a few extreme pairs would take all the contrast
        image = panel.imshow(correlation, cmap="magma", vmin=low, vmax=high, interpolation="nearest")
        panel.axhline(boundary, color="white", linewidth=1)
        panel.axvline(boundary, color="white", linewidth=1)
        panel.set_xticks([boundary / 2, (boundary + len(K)) / 2], classes)
        panel.set_yticks([boundary / 2, (boundary + len(K)) / 2], classes, rotation=90, va="center")
        panel.tick_params(length=0)
        panel.grid(visible=False)
        panel.spines[["left", "bottom"]].set_visible(False)
        panel.set_title(f"{name}, sorted by class")
        bar = drawn.colorbar(image, ax=panel, shrink=0.85, pad=0.02, extend="both")
        bar.outline.set_visible(False)
    subtitle = f"{images.name}, {ROWS} training images: K(x, x′) / √(K(x, x) K(x′, x′))"
    drawn.suptitle(subtitle, x=0.01, ha="left", fontsize=10, color=style.GREY)
    return style.save(drawn, out)


def draw_spectrum(every: list[data.Data], out: Path) -> Path:
    """Eigenvalues of both kernels of a training batch, with the ridges that predictions add."""
    import style

    drawn, axes = style.figure(4.8 * len(every), 3.9, len(every), squeeze=False)
    for panel, images in zip(axes[0], every, strict=True):
        model, x, _ = problem(images)
        model, x = model.double(), x.double()
        kernels = {
            "NNGP": (fw.ntk.nngp_kernel(model, x), style.ORANGE, ntk_cifar2.NNGP_RIDGE),
            "NTK": (fw.ntk.empirical_ntk(model, x, compute="trace"), style.BLUE, ntk_cifar2.NTK_RIDGE),
        }
        for name, (K, colour, ridge) in kernels.items():
            values = torch.linalg.eigvalsh(K).flip(0).clamp_min(1e-16)
            panel.loglog(range(1, len(values) + 1), values, color=colour, label=name)
            panel.axhline(ridge, color=colour, linestyle=":", linewidth=1.2)
            panel.annotate(f"{name} ridge {ridge:g}", (1.05, ridge * 1.15), fontsize=8, color=colour)
        panel.set(xlabel="index", ylabel="eigenvalue", title=images.name)
        panel.legend(loc="upper right")
    return style.save(drawn, out)


def draw_accuracies(results: dict[str, dict[str, Any]], out: Path) -> Path:
    """Every seed's accuracy."""
    import style

    drawn, axes = style.figure(4.6 * len(results), 3.9, len(results), squeeze=False)
    for panel, (name, rows) in zip(axes[0], results.items(), strict=True):
        style.strips(
            panel, {"NNGP": (rows["nngp"], style.ORANGE), "NTK": (rows["ntk"], style.BLUE)}, "test accuracy (%)"
        )
        panel.set_title(name)
    return style.save(drawn, out)


def main() -> None:
    parser = command.arguments(__doc__)
    parser.add_argument("--measure", nargs=2, help="(internal) measure one method on one dataset, as JSON")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure, options.data)))
        return
    started = time.perf_counter()
    console = Console()
    names = ["digits"] + (["cifar2"] if data.has_cifar2(options.data) and not options.quick else [])
    every = [images_of(name, options.data) for name in names]
    seeds = range(options.seed, options.seed + SEEDS)
    out = options.out / "demo"
    figures: dict[str, Any] = {"seeds": list(seeds), "comparisons": {}, "accuracies": {}}

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=len(names) * (SEEDS + 1) + 1)
        for name, images in zip(names, every, strict=True):
            progress.update(task, description=f"{images.name}: both methods' kernels")
            figures["comparisons"][images.name] = compare(name, options.data)
            progress.advance(task)
            progress.update(task, description=f"{images.name}: accuracies")
            rows = []
            for seed in seeds:
                rows.append(ntk_cifar2.one_seed(images, seed, options.device))
                progress.advance(task)
            figures["accuracies"][images.name] = {each: [row[each] for row in rows] for each in ("nngp", "ntk")}
        progress.update(task, description="pictures")
        pictures = [draw_kernel(images, out / f"kernel_{name}.png") for name, images in zip(names, every, strict=True)]
        pictures.append(draw_spectrum(every, out / "spectrum.png"))
        pictures.append(draw_accuracies(figures["accuracies"], out / "accuracies.png"))
        progress.advance(task)

    for images in every:
        features = images.x_train.shape[1]
        title = f"NTK of an MLP {features}-{ntk_cifar2.WIDTH}-{ntk_cifar2.WIDTH}-1 on {images.name}, {ROWS} × {ROWS}"
        comparison = figures["comparisons"][images.name]
        console.print(f"[bold]{title}[/bold]", highlight=False, soft_wrap=True)
        console.print(comparison_table(comparison))
        difference = comparison["largest relative difference"]
        console.print(
            f"  largest difference of the two kernels: {difference:.1e} of the largest entry\n", highlight=False
        )
    model, x1, x2 = problem(every[-1])
    console.print(f"[bold]The plan[/bold] (fw.ntk.explain, {every[-1].name})")
    console.print(str(fw.ntk.explain(model, x1, x2)), highlight=False, markup=False, soft_wrap=True)
    console.print(f"\n[bold]Test accuracy from {ROWS} training images, {SEEDS} seeds[/bold]", highlight=False)
    console.print(accuracy_table(figures["accuracies"]))
    seconds = time.perf_counter() - started
    command.save_figures(out / "figures.json", figures | {"seconds": round(seconds, 1)})
    console.print("pictures: " + ", ".join(map(str, pictures)), highlight=False, soft_wrap=True)
    console.print(f"figures:  {out / 'figures.json'}   ({seconds:.0f} s)", highlight=False)


if __name__ == "__main__":
    main()
