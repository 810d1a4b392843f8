"""The NTK's examples run from the command line, and leave their pictures and figures."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = {
    "demo": ["kernel_digits.png", "spectrum.png", "accuracies.png"],
    "ntk_cifar2": ["accuracies.png"],
    "ntk_tutorial": ["methods.png"],
    "ntk_dynamics": ["dynamics.png"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_quick_run(name, tmp_path):
    environment = os.environ | {"PYTHONPATH": str(ROOT / "python")}
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for picture in EXAMPLES[name]:
        assert (tmp_path / name / picture).stat().st_size > 5000
    assert "machine" in json.loads((tmp_path / name / "figures.json").read_text())
