"""compute-sanitizer over one small case of every CUDA kernel, where there is a GPU and the tool runs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from op_battery import need

HERE = Path(__file__).parent


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_no_bad_access_and_no_race(tool: str) -> None:
    need("cuda")
    found = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(found, os.X_OK):
        pytest.skip("compute-sanitizer is not on the PATH")
    path = os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "FINITE_WIDTH_UNTRIED_CUDA": "1", "PYTHONPATH": path}
    command = [found, "--tool", tool, "--error-exitcode", "9", sys.executable, str(HERE / "cuda_small_cases.py")]
    done = subprocess.run(command, env=environment, cwd=HERE.parent, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if "ran " not in said and done.returncode != 9:
        pytest.skip(f"compute-sanitizer does not run here: {said[-500:]}")
    assert done.returncode == 0, said[-5000:]
    assert "path_step" in said
    assert "bayes_local" in said
