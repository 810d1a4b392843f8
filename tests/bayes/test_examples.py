"""The examples of this wing run with --quick and write what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def run(name: str, out: Path, *options: str) -> dict[str, Any]:
    pytest.importorskip("matplotlib")
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (out / f"{name}.png").stat().st_size > 10_000
    figures: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return figures


def test_regression(tmp_path: Path) -> None:
    figures = run("bayes_regression", tmp_path)
    assert figures["all_finite"]
    assert figures["rmse_to_truth_on_the_data"] < 0.15
    assert figures["std_in_the_gap"] > 2 * figures["std_on_the_data"]


def test_digits(tmp_path: Path) -> None:
    figures = run("bayes_mnist", tmp_path, "--prior-std", "0.1", "0.2", "--narrow-std", "0.0025")
    for kind, candidates in (("variational", 2), ("variational, scale mixture", 1)):
        held_out = figures[kind]["held_out_error_percent"]
        assert len(held_out) == candidates
        assert held_out[figures[kind]["prior"]] == min(held_out.values())
    names = ("mean network", "10 samples")
    for name in ("deterministic", *names, *(f"{name}, scale mixture" for name in names)):
        assert figures[name]["error_percent"] < 15
        # Confidences that say nothing, 0.1 for each of ten digits, would be 0.75 or more away from this accuracy.
        assert 0 < figures[name]["ece"] < 0.4
