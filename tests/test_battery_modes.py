"""The op battery again, in a process of its own for each: without kernels, and with the instruction set forced down."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import finite_width as fw

ROOT = Path(__file__).parent.parent
MODES = {
    "reference": {"FINITE_WIDTH_DISABLE_EXT": "1"},
    "avx2": {"FINITE_WIDTH_ISA": "avx2"},
    "generic": {"FINITE_WIDTH_ISA": "generic"},
}
# torch.compile sees an op's schema, fake tensors and autograd, which opcheck tells of in every mode.
CHECKS = "not compile"


@pytest.mark.first
@pytest.mark.parametrize("mode", MODES)
def test_battery(mode: str) -> None:
    if not fw.has_kernels():
        pytest.skip("the tests beside this one run the battery without kernels already")
    if mode == fw.build_info()["detected_isa"]:
        pytest.skip(f"{mode} is this processor's own instruction set: the tests beside this one show it")
    kept = {key: value for key, value in os.environ.items() if not key.startswith("FINITE_WIDTH_")}
    files = [str(path.relative_to(ROOT)) for path in sorted(ROOT.glob("tests/*/test_ops.py"))]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "battery", "-k", CHECKS, "-p", "no:cacheprovider", *files],
        env={**kept, **MODES[mode]},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    assert " passed" in done.stdout
