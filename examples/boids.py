"""A flock of boids whose rule is learned from its trajectories: by an NTK regressor and by a Bayesian network.

Each boid sees its six nearest neighbours (as starlings do: Ballerini et al. 2008) and accelerates by Reynolds' three
rules: away from those too near (separation), towards their mean velocity (alignment), towards their centre (cohesion);
a last term holds its speed. The learners see only what a boid sees, the relative positions and velocities of the six
in its own frame, and noisy accelerations. The network is permutation invariant: one small network for each neighbour,
a mean, a second small network.

Writes boids.png (error, the learned force against distance, predictive bands, order of the flocks), boids.gif (the true
and the learned flocks from the same start) and boids.json.

    python examples/boids.py --quick
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from matplotlib.animation import FuncAnimation, PillowWriter
from matplotlib.colors import LinearSegmentedColormap
from torch import Tensor, nn
from tqdm import tqdm

import finite_width as fw
import style
from command import arguments, save_figures

BOX, NEIGHBOURS, STEP = 12.0, 6, 0.1  # side of the periodic box, neighbours seen, time step
NOISE = 0.05  # standard deviation of the observed accelerations
COLORS = {"true rule": "#222222", "NTK": style.BLUE, "Bayesian": style.RED}
Rule = Callable[[Tensor], Tensor]


def view(x: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What each boid sees, [n, 6, 8], and its frame [n, 2, 2], whose first row is the boid's heading.

    Of each neighbour, in that frame: position (2), relative velocity (2), own speed (1), direction (2), distance (1).
    x, v: positions and velocities [n, 2].
    """
    away = x[None] - x[:, None]
    away = away - BOX * torch.round(away / BOX)
    distance = away.norm(dim=-1) + torch.diag(torch.full((len(x),), math.inf))
    near = distance.topk(NEIGHBOURS, largest=False).indices
    heading = v / v.norm(dim=-1, keepdim=True)
    frame = torch.stack([heading, torch.stack([-heading[:, 1], heading[:, 0]], -1)], 1)
    position = torch.take_along_dim(away, near[..., None], 1) @ frame.mT
    velocity = (v[near] - v[:, None]) @ frame.mT
    speed = v.norm(dim=-1)[:, None, None].expand(-1, NEIGHBOURS, 1)
    return complete(torch.cat([position, velocity, speed], -1)), frame


def complete(seen: Tensor) -> Tensor:
    """Append direction and distance to position, velocity, speed: [n, 6, 5] -> [n, 6, 8]."""
    distance = seen[..., :2].norm(dim=-1, keepdim=True)
    return torch.cat([seen, seen[..., :2] / (distance + 0.05), distance], -1)


def true_rule(seen: Tensor) -> Tensor:
    """Separation, alignment, cohesion, and a cruising speed of 1: acceleration in the boid's frame, [n, 2]."""
    position, velocity, speed = seen[..., :2], seen[..., 2:4], seen[:, 0, 4]
    distance = position.norm(dim=-1, keepdim=True)
    separation = -(position * torch.exp(-2 * distance**2)).sum(1)
    cruise = torch.stack([speed * (1 - speed**2), torch.zeros_like(speed)], -1)
    return 3.0 * separation + 0.5 * velocity.mean(1) + 0.5 * position.mean(1) + 0.5 * cruise


def fly(rule: Rule, x: Tensor, v: Tensor, steps: int, name: str = "") -> tuple[Tensor, Tensor, Tensor]:
    """Trajectories under a rule: positions and velocities [steps + 1, n, 2], and what was seen [steps, n, 6, 8]."""
    xs, vs, views = [x], [v], []
    for _ in tqdm(range(steps), desc=f"flock by {name}", unit="step", leave=False, disable=not name):
        seen, frame = view(x, v)
        v = v + STEP * (rule(seen)[:, None] @ frame)[:, 0]
        x = (x + STEP * v) % BOX
        xs.append(x)
        vs.append(v)
        views.append(seen)
    return torch.stack(xs), torch.stack(vs), torch.stack(views)


def start(boids: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random positions, random headings at speeds around 1."""
    angle = 2 * math.pi * torch.rand(boids, generator=generator)
    speed = 0.7 + 0.6 * torch.rand(boids, 1, generator=generator)
    return BOX * torch.rand(boids, 2, generator=generator), speed * torch.stack([angle.cos(), angle.sin()], -1)


class Boid(nn.Module):
    """seen [n, 6, 8] -> acceleration [n, 2], whatever the order of the neighbours."""

    def __init__(self, width: int, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("deviation", deviation)
        self.each = nn.Sequential(nn.Linear(8, width), nn.Tanh(), nn.Linear(width, width), nn.Tanh())
        self.all = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))

    def forward(self, seen: Tensor) -> Tensor:
        return self.all(self.each((seen - self.mean) / self.deviation).mean(1))


def train_bayes(model: Boid, seen: Tensor, target: Tensor, steps: int) -> Rule:
    """Fit the variational network by Adam on the negative ELBO with Gaussian noise; returns its predictive mean."""
    fw.bayes.convert(model, prior=fw.bayes.GaussianPrior(std=1.0))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    bar = tqdm(range(steps), desc="Bayesian network", unit="step", leave=False)
    for step in bar:
        rows = torch.randint(len(seen), (128,))
        nll = ((model(seen[rows]) - target[rows]) ** 2).sum() / (2 * NOISE**2)
        kl = fw.bayes.kl(model)
        loss = fw.bayes.negative_elbo(nll, kl, num_data=len(seen), batch_size=len(rows), reduction="sum")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(nll=f"{nll.item() / len(rows):.2f}", kl=f"{kl.item():.0f}")

    def mean(x: Tensor) -> Tensor:
        with torch.no_grad(), fw.bayes.mean_mode(model):
            return model(x)

    return mean


def order(v: Tensor) -> Tensor:
    """|mean heading| of a flock over time, 0 (disorder) to 1 (all one way): [T, n, 2] -> [T]."""
    return (v / v.norm(dim=-1, keepdim=True)).mean(1).norm(dim=-1)


def relative_error(prediction: Tensor, truth: Tensor) -> float:
    return float((prediction - truth).norm() / truth.norm())


def draw(path: Path, learned: dict[str, Any]) -> None:
    """The picture: error, force against distance, bands along a flight, order of the flocks."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.4))
    truth = learned["truth"]
    for name in ("NTK", "Bayesian"):
        error = learned["errors"][name]
        label = f"{name}: relative error {100 * error:.1f} %"
        axes[0, 0].plot(truth.flatten(), learned["predictions"][name].flatten(), ".", ms=2.5, alpha=0.5, label=label)
        axes[0, 0].lines[-1].set_color(COLORS[name])
    limit = 1.05 * truth.abs().max().item()
    axes[0, 0].plot([-limit, limit], [-limit, limit], color=COLORS["true rule"], lw=1)
    axes[0, 0].set(xlabel="true acceleration", ylabel="learned acceleration", title="a flock never seen in training")
    axes[0, 0].legend(markerscale=4)

    def band(axis: Any, where: Tensor, at: str) -> None:
        curves = learned[at]
        for width, alpha in ((2, 0.15), (1, 0.3)):
            low, high = curves["mean"] - width * curves["std"], curves["mean"] + width * curves["std"]
            axis.fill_between(where, low, high, color=COLORS["Bayesian"], alpha=alpha, lw=0)
        axis.plot(where, curves["mean"], color=COLORS["Bayesian"], label="Bayesian: mean, 1 and 2 deviations")
        axis.plot(where, curves["NTK"], color=COLORS["NTK"], ls="--", label="NTK")
        axis.plot(where, curves["truth"], color=COLORS["true rule"], lw=1.2, label="true rule")

    band(axes[0, 1], learned["distance"], "force")
    axes[0, 1].set(xlabel="distance of the nearest neighbour, put straight ahead", ylabel="forward acceleration")
    axes[0, 1].set_title("the learned force, near and far from the data")
    below = axes[0, 1].twinx()
    below.hist(learned["seen distances"], bins=60, range=(0, float(learned["distance"][-1])), color="#999", alpha=0.35)
    below.set_yticks([])
    below.set_ylim(0, 4 * below.get_ylim()[1])
    below.set_ylabel("distances in training (grey)", fontsize=9, color="#777", loc="bottom")
    axes[0, 1].legend(loc="upper left")
    times = STEP * torch.arange(len(learned["flight"]["truth"]))
    band(axes[1, 0], times, "flight")
    axes[1, 0].set(xlabel="time", ylabel="sideways acceleration", title="one boid of that flock")
    for name, flock in learned["flocks"].items():
        axes[1, 1].plot(STEP * torch.arange(len(flock)), order(flock), color=COLORS[name], label=name)
    axes[1, 1].set(xlabel="time", ylabel="|mean heading|", ylim=(0, 1.03), title="order of the flocks, from one start")
    axes[1, 1].legend(loc="lower right")
    below.grid(visible=False)
    below.spines[:].set_visible(False)
    style.save(figure, path)


def animate(path: Path, flocks: dict[str, tuple[Tensor, Tensor]], stride: int) -> None:
    """The flocks side by side, each boid coloured by its heading."""
    figure, axes = plt.subplots(1, len(flocks), figsize=(3.4 * len(flocks), 3.7))
    hues = LinearSegmentedColormap.from_list("headings", ["#ff8a80", "#ffe082", "#80cbc4", "#82b1ff", "#ff8a80"])
    arrows, trails = [], []
    for axis, (name, (x, v)) in zip(axes, flocks.items(), strict=True):
        axis.set(xlim=(0, BOX), ylim=(0, BOX), xticks=[], yticks=[], aspect="equal", facecolor="#10131a")
        axis.set_title(name, color=COLORS[name], fontsize=13, loc="center")
        axis.grid(visible=False)
        style = {"cmap": hues, "pivot": "tip", "scale": 22, "width": 0.014, "headwidth": 3, "headaxislength": 4}
        color = torch.atan2(v[0, :, 1], v[0, :, 0]).numpy()
        trails.append(axis.plot([], [], ".", ms=1.6, color="#9fa8da", alpha=0.35)[0])
        arrows.append(axis.quiver(x[0, :, 0], x[0, :, 1], v[0, :, 0], v[0, :, 1], color, **style))
        arrows[-1].set_clim(-math.pi, math.pi)
    frames = range(0, len(next(iter(flocks.values()))[0]), stride)
    bar = tqdm(total=len(frames), desc="animation", unit="frame", leave=False)

    def frame(time_step: int) -> list[Any]:
        bar.update()
        for arrow, trail, (x, v) in zip(arrows, trails, flocks.values(), strict=True):
            trail.set_data(x[max(0, time_step - 12) : time_step + 1].flatten(0, 1).T)
            arrow.set_offsets(x[time_step])
            heading = v[time_step]
            color = torch.atan2(heading[:, 1], heading[:, 0]).numpy()
            arrow.set_UVC(heading[:, 0].numpy(), heading[:, 1].numpy(), color)
        return [*trails, *arrows]

    FuncAnimation(figure, frame, frames=frames, init_func=lambda: arrows).save(path, PillowWriter(fps=15), dpi=64)
    bar.close()
    plt.close(figure)


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--boids", type=int, help="in a flock (default 48; quick 32)")
    parser.add_argument("--samples", type=int, help="training samples (default 1500; quick 500)")
    parser.add_argument("--width", type=int, help="of the network (default 128; quick 64)")
    parser.add_argument(
        "--ridge", type=float, default=1e-4, help="of the NTK regression, on the kernel's mean diagonal"
    )
    options = parser.parse_args()
    quick = options.quick
    boids, samples, width = (
        options.boids or (32 if quick else 48),
        options.samples or (500 if quick else 1500),
        options.width,
    )
    width = width or (64 if quick else 128)
    steps, training_steps = (160, 2000) if quick else (320, 8000)
    torch.manual_seed(options.seed)
    generator = torch.Generator().manual_seed(options.seed)

    # What is observed: six flights of other flocks, every boid at every step, with noise; a random part of it is kept.
    flights = [fly(true_rule, *start(boids, generator), 80)[2] for _ in range(6)]
    seen = torch.cat([flight.flatten(0, 1) for flight in flights])
    seen = seen[torch.randperm(len(seen), generator=generator)[:samples]]
    target = true_rule(seen) + NOISE * torch.randn(samples, 2, generator=generator)
    mean, deviation = seen.mean((0, 1)), seen.std((0, 1))

    learners: dict[str, Rule] = {"true rule": true_rule}
    seconds = {}
    before = time.perf_counter()
    network = Boid(width, mean, deviation).to(options.device)
    scale = float(fw.ntk.empirical_ntk(network, seen[:64].to(options.device), compute="trace").diagonal().mean())
    regressor = fw.ntk.NTKRegressor(network, ridge=options.ridge * scale)
    regressor.fit(seen.to(options.device), target.to(options.device))
    seconds["NTK"] = time.perf_counter() - before
    learners["NTK"] = lambda x: regressor.predict(x.to(options.device)).cpu()
    before = time.perf_counter()
    bayesian = Boid(width, mean, deviation).to(options.device)
    learners["Bayesian"] = train_bayes(bayesian, seen.to(options.device), target.to(options.device), training_steps)
    seconds["Bayesian"] = time.perf_counter() - before

    # A flock from a new start: first under the true rule, then under each learned one.
    x, v = start(boids, generator)
    flocks = {name: fly(rule, x, v, steps, name)[:2] for name, rule in learners.items()}
    flight = fly(true_rule, x, v, steps)[2]
    probe = flight[::4].flatten(0, 1)[:800]
    truth = true_rule(probe)
    predictions = {name: learners[name](probe) for name in ("NTK", "Bayesian")}
    errors = {name: relative_error(prediction, truth) for name, prediction in predictions.items()}
    uncertain = fw.bayes.predict(bayesian, probe, samples=64)
    inside = ((truth - uncertain.mean).abs() <= 2 * (uncertain.std**2 + NOISE**2).sqrt()).float().mean().item()

    def curves(rows: Tensor, axis: int) -> dict[str, Tensor]:
        predicted = fw.bayes.predict(bayesian, rows, samples=256)
        return {
            "truth": true_rule(rows)[:, axis],
            "NTK": learners["NTK"](rows)[:, axis],
            "mean": predicted.mean[:, axis],
            "std": predicted.std[:, axis],
        }

    # A boid of that flock, half-way: its nearest neighbour is put straight ahead at every distance, in step with it.
    distance = torch.linspace(0.02, 4.0, 120)
    ahead = flight[steps // 2, :1, :, :5].repeat(120, 1, 1)
    ahead[:, 0, :4] = 0
    ahead[:, 0, 0] = distance
    ahead = complete(ahead)
    options.out.mkdir(parents=True, exist_ok=True)
    learned = {
        "truth": truth,
        "predictions": predictions,
        "errors": errors,
        "distance": distance,
        "force": curves(ahead, 0),
        "seen distances": seen[..., :2].norm(dim=-1).flatten(),
        "flight": curves(flight[:, 0], 1),
        "flocks": {name: flock[1] for name, flock in flocks.items()},
    }
    draw(options.out / "boids.png", learned)
    animate(options.out / "boids.gif", flocks, stride=2)
    print(f"boids: {boids} in a flock, {samples} training samples, network of width {width}")
    for name, error in errors.items():
        print(f"  {name:9} relative error of the rule {100 * error:5.1f} %   trained in {seconds[name]:.1f} s")
    print(f"  Bayesian: {100 * inside:.1f} % of the true accelerations within two predictive deviations")
    figures = {
        "example": "boids",
        "quick": quick,
        "seed": options.seed,
        "boids": boids,
        "training samples": samples,
        "width": width,
        "relative error": errors,
        "within two predictive deviations": inside,
        "training seconds": seconds,
        "final order": {name: float(order(flock[1])[-1]) for name, flock in flocks.items()},
    }
    save_figures(options.out / "boids.json", figures)
    print(f"pictures and figures: {options.out / 'boids'}.png, .gif, .json")


if __name__ == "__main__":
    main()
