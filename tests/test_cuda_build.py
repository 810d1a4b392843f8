"""What the build promises of CUDA kernels, where nvcc is: no spilled registers, none registered unasked. No GPU."""

from __future__ import annotations

import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import finite_width as fw

ROOT = Path(__file__).parent.parent
SOURCES = sorted(ROOT.glob("csrc/**/*_cuda.cu"))
SPILLS = """
__global__ void kernel(float* out, const float* in) {
  float value[24];
#pragma unroll
  for (int i = 0; i < 24; ++i) value[i] = in[i * threadIdx.x];
#pragma unroll
  for (int j = 0; j < 24; ++j) {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 24; ++i) sum += value[i] * value[(7 * i + j) % 24];
    out[24 * j + threadIdx.x] = sum;
  }
}
"""


@pytest.mark.parametrize("required", [False, True])
def test_where_the_module_is_required_no_kernel_may_spill(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, required: bool
) -> None:
    """The build compiles every kernel for every architecture; its flags turn a spill into a warning or an error."""
    if shutil.which("nvcc") is None:
        pytest.skip("nvcc is not on the PATH")
    monkeypatch.setenv("FINITE_WIDTH_REQUIRE_EXT", "1" if required else "0")
    flags = runpy.run_path(str(ROOT / "setup.py"))["NVCC_FLAGS"]
    source = tmp_path / "spills.cu"
    source.write_text(SPILLS)
    command = [
        "nvcc",
        *flags,
        "-maxrregcount=24",
        "-arch=sm_90",
        "-cubin",
        str(source),
        "-o",
        str(tmp_path / "spills.o"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert "Registers are spilled" in done.stderr
    assert (done.returncode != 0) is required


def test_kernels_include_no_torch_and_no_other_cuda_headers() -> None:
    """A .cu file compiles in seconds only as long as it stays with these."""
    allowed = {
        "cuda_runtime.h",
        "cuda_bf16.h",
        "mma.h",
        "algorithm",
        "cmath",
        "cstdint",
        "cstring",
        "stdexcept",
        "string",
    }
    for source in (*SOURCES, ROOT / "csrc/common/launch.cuh"):
        assert set(re.findall(r"#include <([^>]+)>", source.read_text())) <= allowed, source


REGISTERED = """
import torch, finite_width as fw
has = torch._C._dispatch_has_kernel_for_dispatch_key
ops = ("bayes_sample", "path_sweep", "ntk_gram_accumulate", "tt_linear")
found = [has(f"finite_width::{name}", "CUDA") for name in ops]
print(found, fw.build_info()["cuda_kernels"])
"""


def test_untried_kernels_are_registered_only_where_asked_for() -> None:
    if not fw.has_kernels() or not fw.build_info()["cuda_architectures"]:
        pytest.skip("the compiled module was built without CUDA (FINITE_WIDTH_CUDA=1 builds it)")
    for asked in (False, True):
        environment = {key: value for key, value in os.environ.items() if key != "FINITE_WIDTH_UNTRIED_CUDA"}
        environment |= {"FINITE_WIDTH_UNTRIED_CUDA": "1"} if asked else {}
        said = subprocess.run([sys.executable, "-c", REGISTERED], env=environment, capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert said.stdout.startswith(str([asked] * 4)), said.stdout
        assert ("registered by" in said.stdout) is asked


def test_the_sources_keep_to_what_torch_2_11_has() -> None:
    """The oldest torch that the package takes, which is not the one that is tested."""
    for source in [path for path in ROOT.glob("csrc/**/*") if path.is_file()]:
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in source.read_text(), source
