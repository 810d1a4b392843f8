"""The known results: what was published and what was expected stand here; what was measured comes from docs/results."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parent / "results"
Figures = dict[str, Any]


@dataclass(frozen=True)
class Known:
    """One result: `run` names the example (or "known", docs/measure_known.py) whose JSON `read` turns into text."""

    wing: str
    what: str
    published: str
    expected: str
    run: str
    read: Callable[[Figures], str] | None


def percent(figures: Figures) -> str:
    """Mean and deviation over seeds, in percent."""
    return f"{figures['mean']:.2f} ± {figures['deviation']:.2f} %"


def vector(case: str, *names: str) -> Callable[[Figures], str]:
    def read(figures: Figures) -> str:
        entry = figures["path_vectors"][case]
        parts = [f"Φ = {entry['phi']:g}"]
        for name in names:
            values = entry[name]
            rows = [str([round(x, 9) for x in row]).replace(".0", "") for row in values if isinstance(row, list)]
            parts.append(f"γ({name}) = {', '.join(rows) if rows else str(values).replace('.0', '')}")
        return "; ".join(parts)

    return read


def path_sgd(optimizer: str) -> Callable[[Figures], str]:
    """Train loss / test error after the last epoch, balanced and unbalanced, means over seeds."""

    def read(figures: Figures) -> str:
        parts = []
        for start in dict.fromkeys(run["start"] for run in figures["runs"]):
            runs = [run for run in figures["runs"] if run["optimizer"] == optimizer and run["start"] == start]
            loss, error = (sum(run[kind][-1] for run in runs) / len(runs) for kind in ("train_loss", "test_error"))
            parts.append(f"{start} {loss:.4f} / {error:.2f} %")
        return ", ".join(parts)

    return read


def epoch(index: int) -> Callable[[Figures], str]:
    return lambda f: f"{f['mean'][index]:.2f} ± {f['deviation'][index]:.2f} %"


def tutorial(figures: Figures) -> str:
    """Each method's result against the float64 Jacobian, or whether it agrees."""
    found = []
    for name, method in figures["methods"].items():
        agree = [entry.get("agrees") for entry in method.values() if isinstance(entry, dict)] or [method.get("agrees")]
        found.append(f"{name}: {'agrees' if all(agree) else 'does not agree'}")
    return "; ".join(found)


KNOWN = [
    Known(
        "NTK",
        "Two-class CIFAR-10, NNGP, ridge 0.1, 128 training images",
        "71.35 % (one run)",
        "72.33 ± 1.55 % (50 seeds)",
        "ntk_cifar2",
        lambda f: percent(f["nngp"]),
    ),
    Known(
        "NTK",
        "Two-class CIFAR-10, NTK, ridge 1e-4, at the random initialisation",
        "78.85 % (one run)",
        "77.24 ± 2.12 % (50 seeds)",
        "ntk_cifar2",
        lambda f: percent(f["ntk"]),
    ),
    Known(
        "NTK",
        "The same, of the network whose last layer NNGP has overwritten",
        "–",
        "74.62 %",
        "ntk_cifar2",
        lambda f: percent(f["ntk_after_nngp"]),
    ),
    Known(
        "NTK",
        "The PyTorch tutorial's CNN: contraction, vector products and structured agree",
        "to 1e-5",
        "to 1e-5",
        "ntk_tutorial",
        tutorial,
    ),
    *(
        Known(
            "Tensor-Train",
            f"TT-SVD of a Gaussian 1024², modes (4, 8, 8, 4)², rank {rank}, float64",
            "–",
            f"error {error}, {parameters:,} parameters",
            "known",
            lambda f, rank=rank: (
                f"error {f['tt_errors'][str(rank)]['relative error']:.4f}, "
                f"{f['tt_errors'][str(rank)]['parameters']:,} parameters"
            ),
        )
        for rank, error, parameters in ((8, ".9937", 8448), (16, ".9703", 33280), (64, ".8888", 131584))
    ),
    Known(
        "Tensor-Train",
        "Maximal ranks of that matrix",
        "–",
        "(16, 1024, 16)",
        "known",
        lambda f: str(tuple(f["tt_errors"]["maximal ranks"])),
    ),
    Known(
        "Tensor-Train",
        "Exact ranks: Kronecker product, identity; i + j, sin(ai + bj + c), shift; 1-D Laplacian",
        "1, 1; 2, 2, 2; 3",
        "1, 1; 2, 2, 2; 3",
        "known",
        lambda f: "{Kronecker product}, {identity}; {i + j}, {sin(ai + bj + c)}, {shift}; {1-D Laplacian}".format_map(
            f["tt_ranks"]
        ),
    ),
    Known(
        "Tensor-Train",
        "Parameters: 4⁵×4⁵ rank 8; (4,7,4,7)×5⁴ rank 8; VGG fc6 25088×4096 rank 2",
        "–; –; 528 (1 : 194,622)",
        "3328; 3960; 528",
        "known",
        lambda f: "; ".join(str(count) for count in f["tt_counts"].values()),
    ),
    Known(
        "Tensor-Train",
        "MNIST, two cores 784×50×10, epoch 1, shuffled",
        "86 %",
        "86.9 ± 0.5 %",
        "tt_mnist",
        epoch(0),
    ),
    Known("Tensor-Train", "The same, epoch 2", "88 %", "87.9 ± 0.6 %", "tt_mnist", epoch(1)),
    Known(
        "Tensor-Train",
        "MNIST 784-625-10: dense → TT-SVD rank 16 → two epochs of fine-tuning",
        "–",
        "97.14 → 64.43 → 97.65 %, 496,885 → 21,845 parameters",
        "tt_finetune",
        lambda f: (
            f"{f['dense']['accuracy'][-1]:.2f} → {f['compressed']['accuracy']:.2f} → "
            f"{f['fine_tuned']['accuracy'][-1]:.2f} %, {f['dense']['parameters']:,} → "
            f"{f['fine_tuned']['parameters']:,} parameters"
        ),
    ),
    Known(
        "Tensor-Train",
        "Novikov et al. 2015: 32×32 MNIST, all ranks 8",
        "98.4 % (a replication: 98.2 %)",
        "–",
        "tt_hidden_layer",
        lambda f: f"{f['tensor_train']['accuracy'][-1]:.2f} % (dense {f['dense']['accuracy'][-1]:.2f} %)",
    ),
    Known(
        "Path-SGD",
        "2-2-1 network, p = 1",
        "–",
        "Φ = 57; γ(W1) rows 25, 36; γ(W2) [9, 49]",
        "known",
        vector("p=1", "0.weight", "2.weight"),
    ),
    Known(
        "Path-SGD",
        "The same, p = 2",
        "–",
        "Φ = 1025; γ(W1) rows 25, 36; γ(W2) [5, 25]",
        "known",
        vector("p=2", "0.weight", "2.weight"),
    ),
    Known(
        "Path-SGD",
        "The same, p = ∞",
        "–",
        "Φ = 24; γ(W1) rows 25, 36; γ(W2) [4, 16]",
        "known",
        vector("p=inf", "0.weight", "2.weight"),
    ),
    Known(
        "Path-SGD",
        "With biases, p = 2",
        "–",
        "Φ = 1090; γ(W2) [6, 26]; γ(b1) [25, 36], γ(b2) 1",
        "known",
        vector("p=2 with biases", "2.weight", "0.bias", "2.bias"),
    ),
    Known(
        "Path-SGD",
        "Path norm φ₂ without and with biases",
        "–",
        "32.0156; 33.0151",
        "known",
        lambda f: "{norm, p=2:.4f}; {norm, p=2 with biases:.4f}".format_map(f["path_vectors"]),
    ),
    Known(
        "Path-SGD",
        "φ_p = min over rescalings of μ^d (Neyshabur et al. 2015), random 6-9-7-1 network, p = 1; 2",
        "equal",
        "equal",
        "known",
        lambda f: "; ".join(
            f"φ {f['path_theorem'][f'p={p}: path norm']:.9g}, "
            f"μ^d {f['path_theorem'][f'p={p}: mu^d before']:.4g} → {f['path_theorem'][f'p={p}: mu^d balanced']:.9g}"
            for p in (1, 2)
        ),
    ),
    *(
        Known(
            "Path-SGD",
            f"MNIST 784-1000-1000-10, 20 epochs, {name}: train loss / test error",
            published,
            expected,
            "path_sgd_mnist",
            path_sgd(name),
        )
        for name, published, expected in (
            ("SGD", "unbalanced collapses", "digits: .0036 / 2.0 %, unbalanced 1.76 / 48.6 %"),
            ("AdaGrad", "unbalanced collapses", "digits: .0015 / 3.3 %, unbalanced .42 / 10.8 %"),
            ("Path-SGD", "balanced = unbalanced", "digits: .0204 / 2.3 %, unbalanced .0216 / 2.3 %"),
        )
    ),
    Known(
        "Bayes",
        "MNIST 784-400-400-10, deterministic twin, test error",
        "–",
        "1.61 %",
        "bayes_mnist",
        lambda f: f"{f['deterministic']['error_percent']:.2f} %",
    ),
    Known(
        "Bayes",
        "The same, variational, Gaussian prior: mean network; 10 samples",
        "1.82 % (Blundell et al. 2015, long training)",
        "1.88 %; 2.01 %",
        "bayes_mnist",
        lambda f: f"{f['mean network']['error_percent']:.2f} %; {f['10 samples']['error_percent']:.2f} %",
    ),
    Known(
        "Bayes",
        "The same, scale mixture prior: mean network; 10 samples",
        "1.36 % (Blundell et al. 2015, long training)",
        "–",
        "bayes_mnist",
        lambda f: (
            f"{f['mean network, scale mixture']['error_percent']:.2f} %; "
            f"{f['10 samples, scale mixture']['error_percent']:.2f} %"
        ),
    ),
    Known(
        "Bayes",
        "Toy regression, documented recipe, 500 steps: runs that meet a number which is not finite",
        "–",
        "0 of 256",
        "bayes_toy",
        lambda f: f"{len(f['recipes'][f['documented']]['not_finite'])} of {f['seeds'][1] + 1}",
    ),
    Known(
        "Bayes",
        "KL(q ‖ p) where q = p",
        "0",
        "0",
        "known",
        lambda f: f"{f['kl_at_the_prior']['KL']:.3g}",
    ),
]


# What every example shows when it is run in full, beside the results above.
FULL_RUNS: dict[str, tuple[str, Callable[[Figures], str]]] = {
    "ntk_cifar2": (
        "Two-class CIFAR-10, 128 training images, accuracy over the seeds",
        lambda f: f"NNGP {percent(f['nngp'])}, NTK {percent(f['ntk'])}",
    ),
    "ntk_tutorial": (
        "The tutorial's CNN by every method: largest relative error against float64",
        lambda f: f"{max(row['relative error against float64'] for row in f['methods'].values()):.1e}",
    ),
    "ntk_dynamics": (
        "Largest difference between gradient flow on the NTK and the trained network, by width",
        lambda f: ", ".join(f"{width}: {max(found['difference']):.3g}" for width, found in f["widths"].items()),
    ),
    "tt_mnist": (
        "Two cores 784×50×10, accuracy after epochs 1 and 2",
        lambda f: f"{epoch(0)(f)}, {epoch(1)(f)}",
    ),
    "tt_finetune": (
        "784-625-10 after TT-SVD and two epochs of fine-tuning",
        lambda f: f"{f['fine_tuned']['accuracy'][-1]:.2f} % with {f['fine_tuned']['parameters']:,} parameters",
    ),
    "tt_hidden_layer": (
        "32×32 MNIST, a hidden layer of rank 8 trained from scratch, against the dense one",
        lambda f: (
            f"{f['tensor_train']['accuracy'][-1]:.2f} % with {f['tensor_train']['hidden_parameters']:,} parameters, "
            f"{f['dense']['accuracy'][-1]:.2f} % with {f['dense']['hidden_parameters']:,}"
        ),
    ),
    "path_sgd_mnist": (
        "784-1000-1000-10, Path-SGD from a balanced and an unbalanced start: train loss / test error",
        path_sgd("Path-SGD"),
    ),
    "path_sgd_loop": (
        "One loop four ways: largest difference of the loss curves that must agree",
        lambda f: f"SGD by hand, autograd, torch.optim: {f['spread']:.1e}; PathSGD from two starts: {f['gap']:.1e}",
    ),
    "bayes_regression": (
        "Toy regression: error to the truth on the data; predictive deviation on the data and in the gap",
        lambda f: "{rmse_to_truth_on_the_data:.3f}; {std_on_the_data:.3f}, {std_in_the_gap:.3f}".format_map(f),
    ),
    "bayes_mnist": (
        "784-400-400-10: test error of the mean network and of 10 samples",
        lambda f: f"{f['mean network']['error_percent']:.2f} %, {f['10 samples']['error_percent']:.2f} %",
    ),
    "dcgan_mnist": (
        "A DCGAN with two dense layers as Tensor-Train layers: parameters of the two, step time against dense",
        lambda f: (
            f"{f['dataset']}, {f['epochs']} epoch{'s' * (f['epochs'] > 1)}: "
            f"{f['dense']['parameters of the two layers']:,} → {f['tt']['parameters of the two layers']:,}; a step "
            f"{f['tt']['median step in ms'] / f['dense']['median step in ms']:.2f} of the dense one's, the two layers "
            f"alone {1 / f['two layers, time of dense over tt']:.2f}"
        ),
    ),
    "boids": (
        "A flock's rule learned: relative error of the NTK and of the Bayesian network; truth within two deviations",
        lambda f: (
            f"{f['relative error']['NTK']:.3f}, {f['relative error']['Bayesian']:.3f}; "
            f"{100 * f['within two predictive deviations']:.1f} %"
        ),
    ),
}


def full_runs() -> list[str]:
    """The full run of every example as a Markdown table."""
    lines = ["## The examples in full", "", "| example | what | figures | seed | processor seconds |"]
    lines.append("| --- | --- | --- | --- | ---: |")
    for run, (what, read) in FULL_RUNS.items():
        figures = recorded(run)
        cells = [f"`examples/{run}.py`", what, "not run" if figures is None else read(figures), seeds(figures)]
        lines.append("| " + " | ".join([*cells, processor_seconds(figures)]) + " |")
    return lines


def recorded(run: str) -> Figures | None:
    file = RESULTS / f"{run}.json"
    return json.loads(file.read_text()) if file.exists() else None


def text(known: Known, figures: Figures | None) -> str:
    """What a run's figures say about a result; "not run" where there is no such run."""
    return "not run" if known.read is None or figures is None else known.read(figures)


def variational_mnist() -> list[str]:
    """Priors chosen on held-out data, and test error, calibration and likelihood of each network, as Markdown."""
    figures = recorded("bayes_mnist")
    if figures is None:
        return ["Not run."]
    kinds = {name: found for name, found in figures.items() if name.startswith("variational")}
    lines = []
    for name, found in kinds.items():
        errors = ", ".join(f"{error:.2f} % `{prior}`" for prior, error in found["held_out_error_percent"].items())
        lines.append(f"- {name}: chosen `{found['prior']}`; held-out errors of the mean network: {errors}")
    lines += ["", "| test set | error | ECE | NLL |", "| --- | --- | --- | --- |"]
    for name, found in figures.items():
        if isinstance(found, dict) and "error_percent" in found:
            lines.append(f"| {name} | {found['error_percent']:.2f} % | {found['ece']:.4f} | {found['nll']:.3f} |")
    turned = figures["rotation"]
    at = turned["degrees"].index(60)
    entropy, twin = turned["entropy"][at], turned["deterministic_entropy"][at]
    return [*lines, "", f"Predictive entropy on digits turned by 60°: {entropy:.2f} nats, the twin's {twin:.2f}."]


def path_sgd_mnist() -> list[str]:
    """Training loss and test error after the last epoch, means over the seeds, by optimizer and start, as Markdown."""
    figures = recorded("path_sgd_mnist")
    if figures is None:
        return ["Not run."]
    lines = ["| | balanced: training loss / test error | unbalanced | step size, balanced and unbalanced |"]
    lines.append("| --- | --- | --- | --- |")
    for name in dict.fromkeys(run["optimizer"] for run in figures["runs"]):
        cells, rates = [], []
        for start in ("balanced", "unbalanced"):
            runs = [run for run in figures["runs"] if (run["optimizer"], run["start"]) == (name, start)]
            loss, error = (sum(run[key][-1] for run in runs) / len(runs) for key in ("train_loss", "test_error"))
            cells.append(f"{loss:.4f} / {error:.2f} %")
            rates.append(f"{figures['rates'][f'{name} {start}']:g}")
        lines.append("| " + " | ".join([name, *cells, "; ".join(rates)]) + " |")
    return lines


def seeds(figures: Figures | None) -> str:
    """The seeds of a run, as its JSON gives them."""
    if figures is None:
        return "–"
    found = figures.get("seeds", figures.get("seed"))
    if isinstance(found, list) and len(found) > 1:
        return f"{found[0]}–{found[-1]}"
    if isinstance(found, list):
        found = found[0]
    return "–" if found is None else str(found)


def processor_seconds(figures: dict[str, Any] | None) -> str:
    """Of a whole run: of all cores together, which other work on the machine hardly changes."""
    if figures is None:
        return "–"
    seconds = figures.get("processor seconds")
    if seconds is None and "recipes" in figures:
        seconds = sum(recipe["processor seconds"] for recipe in figures["recipes"].values())
    return "–" if seconds is None else f"{seconds:.0f}"


def tables() -> list[str]:
    """All known results as Markdown, a table for each wing."""
    lines: list[str] = []
    for wing in dict.fromkeys(known.wing for known in KNOWN):
        lines += ["", f"## {wing}", "", "| result | published | expected | ours | seed | processor seconds | run |"]
        lines.append("| --- | --- | --- | --- | --- | ---: | --- |")
        lines += [row(known) for known in KNOWN if known.wing == wing]
    return [*lines[1:], "", *full_runs()]


def row(known: Known) -> str:
    figures = recorded(known.run) if known.read else None
    cells = [known.what, known.published, known.expected, text(known, figures), seeds(figures)]
    cells.append(processor_seconds(figures))
    scripts = {"known": "docs/measure_known.py", "bayes_toy": "docs/measure_toy.py"}
    command = f"`{scripts.get(known.run, f'examples/{known.run}.py')}`"
    return "| " + " | ".join([*cells, command]) + " |"
