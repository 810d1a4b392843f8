"""A 784-400-400-10 network on MNIST, variational against deterministic: error of the mean network and of the average
of sampled networks, calibration, and how the uncertainty grows on rotated digits.

    FINITE_WIDTH_DATA=... python examples/bayes_mnist.py          (a few minutes on two cores)
    python examples/bayes_mnist.py --quick                        (scikit-learn's digits, seconds)

Writes out/bayes_mnist.png and out/bayes_mnist.json. All networks train with Adam, the variational ones on the negative
ELBO, with a Gaussian prior and with a scale mixture (Blundell et al., "Weight uncertainty in neural networks", ICML
2015, section 5.1).

Of each kind of prior, the candidate is taken whose mean network errs least on held-out data: the last sixth of the
training set, while training on the rest. The networks that are reported then train on all of it; the test set is
looked at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import finite_width as fw
from command import arguments, save_figures
from data import Data, digits, mnist_or_digits

BATCH = 128


def network(inputs: int, width: int, prior: Any, init_std: float) -> nn.Sequential:
    """Variational with that prior; deterministic without one."""

    def layer(wide_in: int, wide_out: int) -> nn.Module:
        if prior is None:
            return nn.Linear(wide_in, wide_out)
        return fw.bayes.BayesLinear(wide_in, wide_out, prior=prior, init_std=init_std)

    return nn.Sequential(layer(inputs, width), nn.ReLU(), layer(width, width), nn.ReLU(), layer(width, 10))


def train(model: nn.Module, data: Data, epochs: int, rate: float, generator: torch.Generator) -> dict[str, Any]:
    """Adam with the learning rate falling to 0 along a cosine; the negative ELBO where the model is variational."""
    variational = any(isinstance(module, fw.bayes.BayesLinear) for module in model.modules())
    size = len(data.x_train)
    optimizer = torch.optim.Adam(model.parameters(), lr=rate, fused=True)
    steps = epochs * -(-size // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history = []
    started = time.perf_counter()
    for epoch in tqdm(range(epochs), desc="variational" if variational else "deterministic"):
        total = 0.0
        for rows in torch.randperm(size, generator=generator).split(BATCH):
            loss = F.cross_entropy(model(data.x_train[rows]), data.y_train[rows])
            total += float(loss.detach()) * len(rows)
            if variational:
                loss = fw.bayes.negative_elbo(loss, fw.bayes.kl(model), num_data=size, reduction="mean")
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        row = {"epoch": epoch + 1, "train_nll": total / size, "seconds": time.perf_counter() - started}
        if variational:
            with torch.no_grad():
                row["kl_per_example"] = float(fw.bayes.kl(model)) / size
        history.append(row)
        tqdm.write(str(row))
    return {"epochs": epochs, "learning_rate": rate, "batch": BATCH, "history": history}


def choose_prior(data: Data, priors: list[Any], fit: Callable[[Data, Any], nn.Module]) -> tuple[Any, dict[str, float]]:
    """The best of the priors, and for each the error in percent of its mean network on held-out data."""
    kept = len(data.x_train) - len(data.x_train) // 6
    held_out_x, held_out_y = data.x_train[kept:], data.y_train[kept:]
    rest = data._replace(x_train=data.x_train[:kept], y_train=data.y_train[:kept])
    errors = {}
    for prior in priors:
        model = fit(rest, prior)
        with fw.bayes.mean_mode(model):
            errors[str(prior)] = scores(probabilities(model, held_out_x, 0), held_out_y)["error_percent"]
        print(f"{prior}: {errors[str(prior)]:.2f} % of the held-out data wrong", flush=True)
    return min(priors, key=lambda prior: errors[str(prior)]), errors


@torch.no_grad()
def probabilities(model: nn.Module, x: Tensor, samples: int) -> Tensor:
    """[N, 10]: of the deterministic or mean network (samples=0), or averaged over sampled networks."""
    if samples:
        return torch.cat([fw.bayes.predict(model, part, samples=samples, link="softmax").mean for part in x.split(500)])
    return torch.softmax(model(x), -1)


def scores(p: Tensor, labels: Tensor) -> dict[str, float]:
    return {
        "error_percent": 100 * float((p.argmax(1) != labels).double().mean()),
        "ece": fw.bayes.ece(p, labels),
        "nll": fw.bayes.nll(p, labels),
        "brier": fw.bayes.brier(p, labels),
    }


def rotate(x: Tensor, degrees: float) -> Tensor:
    """Square images [N, side²] turned about their centre."""
    side = round(x.shape[1] ** 0.5)
    angle = torch.deg2rad(torch.tensor(degrees))
    turn = torch.tensor([[angle.cos(), -angle.sin(), 0.0], [angle.sin(), angle.cos(), 0.0]])
    grid = F.affine_grid(turn.expand(len(x), 2, 3), [len(x), 1, side, side], align_corners=False)
    return F.grid_sample(x.reshape(-1, 1, side, side), grid, align_corners=False).flatten(1)


def draw(path: Any, figures: dict[str, Any], reliability: dict[str, Any]) -> None:
    import style

    fig, (left, right) = style.figure(11, 4.2, 2)
    colours = {"deterministic": style.GREY, "mean network": style.BLUE, "10 samples": style.RED}
    left.plot([0, 1], [0, 1], color="black", linewidth=0.8, linestyle=":")
    for name, (confidence, accuracy) in reliability.items():
        label = f"{name}: {figures[name]['error_percent']:.2f} % error, ECE {figures[name]['ece']:.4f}"
        kind, _, mixture = name.partition(", ")
        line = "--" if mixture else "-"
        left.plot(confidence, accuracy, marker="o", linestyle=line, color=colours[kind], label=label)
    left.set(xlabel="confidence", ylabel="accuracy", title=f"{figures['data']}: reliability on the test set")
    left.legend()
    turned = figures["rotation"]
    right.plot(turned["degrees"], turned["deterministic_entropy"], color=style.GREY, label="entropy, deterministic")
    right.plot(turned["degrees"], turned["entropy"], color=style.RED, label="entropy, 10 samples")
    right.plot(
        turned["degrees"], turned["mutual_information"], color=style.RED, linestyle="--", label="from the weights"
    )
    right.set(xlabel="rotation of the test digits (degrees)", ylabel="nats, mean over images")
    right.set_title("Uncertainty away from the training data")
    right.legend()
    style.save(fig, path)


def reliability_curve(p: Tensor, labels: Tensor, bins: int = 10) -> tuple[list[float], list[float]]:
    """Mean confidence and accuracy in bins of equal width that hold at least ten examples."""
    confidence, choice = p.max(1)
    index = (confidence * bins).long().clamp_max(bins - 1)
    pairs = [
        (float(confidence[index == b].mean()), float((choice == labels)[index == b].double().mean()))
        for b in range(bins)
        if int((index == b).sum()) >= 10
    ]
    return [c for c, _ in pairs], [a for _, a in pairs]


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    stds, narrow = [0.1, 0.2, 0.3, 0.5, 1.0], [0.0025, 0.02]
    parser.add_argument("--prior-std", type=float, nargs="+", default=stds, help="candidates, Gaussian")
    parser.add_argument("--narrow-std", type=float, nargs="+", default=narrow, help="candidates, mixture")
    parser.add_argument("--init-std", type=float, default=0.02)
    options = parser.parse_args()
    if options.quick:
        data, width, epochs = digits(), 64, 60
    else:
        data, width, epochs = mnist_or_digits(options.data), 400, options.epochs
    data = data.flat()
    data = data._replace(**{name: getattr(data, name).to(options.device) for name in data._fields[1:]})
    inputs = data.x_train.shape[1]

    figures: dict[str, Any] = {"data": data.name, "seed": options.seed, "widths": [inputs, width, width, 10]}
    figures["init_std"] = options.init_std

    def fit(data: Data, prior: Any) -> tuple[nn.Module, dict[str, Any]]:
        torch.manual_seed(options.seed)
        model = network(inputs, width, prior, options.init_std).to(options.device)
        generator = torch.Generator().manual_seed(options.seed)
        return model, train(model, data, epochs, options.learning_rate, generator)

    deterministic, figures["deterministic_training"] = fit(data, None)
    predictions = {"deterministic": probabilities(deterministic, data.x_test, 0)}
    kinds = {
        "": [fw.bayes.GaussianPrior(std=std) for std in options.prior_std],
        ", scale mixture": [fw.bayes.ScaleMixturePrior(pi=0.5, std1=1.0, std2=std) for std in options.narrow_std],
    }
    models = {}
    for kind, priors in kinds.items():
        prior, held_out = choose_prior(data, priors, lambda rest, prior: fit(rest, prior)[0])
        model, training = fit(data, prior)
        figures[f"variational{kind}"] = {
            "prior": str(prior),
            "held_out_error_percent": held_out,
            "training": training,
        }
        with fw.bayes.mean_mode(model):
            predictions[f"mean network{kind}"] = probabilities(model, data.x_test, 0)
        predictions[f"10 samples{kind}"] = probabilities(model, data.x_test, 10)
        models[kind] = model
    reliability = {}
    for name, p in predictions.items():
        figures[name] = scores(p, data.y_test)
        reliability[name] = reliability_curve(p, data.y_test)
        print(name, figures[name])

    rotation: dict[str, list[float]] = {
        "degrees": [],
        "deterministic_entropy": [],
        "entropy": [],
        "mutual_information": [],
    }
    for degrees in range(0, 181, 15):
        turned = rotate(data.x_test[:1000], degrees)
        sampled = fw.bayes.predict(models[""], turned, samples=10, link="softmax")
        rotation["degrees"].append(degrees)
        plain = fw.bayes.predictive_entropy(probabilities(deterministic, turned, 0))
        rotation["deterministic_entropy"].append(float(plain.mean()))
        rotation["entropy"].append(float(fw.bayes.predictive_entropy(sampled.mean).mean()))
        rotation["mutual_information"].append(float(fw.bayes.mutual_information(sampled.samples).mean()))
    figures["rotation"] = rotation
    save_figures(options.out / "bayes_mnist.json", figures)
    draw(options.out / "bayes_mnist.png", figures, reliability)
    print(f"written: {options.out / 'bayes_mnist.json'}, {options.out / 'bayes_mnist.png'}")


if __name__ == "__main__":
    main()
