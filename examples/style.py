"""One look for the examples' pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

# Okabe and Ito's colours, which colour-blind readers can tell apart.
BLUE, ORANGE, GREEN, RED, GREY = "#0072B2", "#E69F00", "#009E73", "#D55E00", "#6E6E6E"

plt.rcParams.update(
    {
        "figure.dpi": 130,
        "figure.constrained_layout.use": True,
        "font.size": 10,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.color": "#E4E4E4",
        "grid.linewidth": 0.8,
        "axes.axisbelow": True,
        "legend.frameon": False,
        "lines.linewidth": 2.0,
    }
)


def figure(width: float, height: float, columns: int = 1, **options: Any) -> Any:
    """(figure, axes) of a row of panels."""
    return plt.subplots(1, columns, figsize=(width, height), **options)


def save(drawn: Any, path: Path) -> Path:
    """Write the picture and free it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    plt.close(drawn)
    return path


def strips(axes: Any, groups: dict[str, tuple[list[float], str]], label: str) -> None:
    """One column of dots per group, with its mean and standard deviation beside."""
    for place, (values, colour) in enumerate(groups.values()):
        count = len(values)
        mean = sum(values) / count
        deviation = (sum((value - mean) ** 2 for value in values) / max(count - 1, 1)) ** 0.5
        spread = [place + 0.16 * ((index * 0.618034) % 1 - 0.5) for index in range(count)]
        axes.scatter(spread, values, s=26, color=colour, alpha=0.55, linewidths=0, zorder=3)
        axes.errorbar(place + 0.22, mean, deviation, fmt="o", color=colour, capsize=4, markersize=6, zorder=4)
        axes.annotate(f"{mean:.1f} ± {deviation:.1f}", (place + 0.28, mean), va="center", fontsize=9, color=colour)
    axes.set_xticks(range(len(groups)), list(groups))
    axes.set_xlim(-0.4, len(groups) - 0.25)
    axes.set_ylabel(label)
    axes.grid(axis="x", visible=False)
