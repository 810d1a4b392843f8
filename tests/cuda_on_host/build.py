"""Builds csrc's CUDA kernels and their bindings with g++ for the processor: one library that torch.ops can load.

The kernels are registered for the CPU's tensors then, so that a process without the compiled module
(FINITE_WIDTH_DISABLE_EXT=1) runs the op battery on them: tests/test_cuda_on_host.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

ROOT = Path(__file__).parent.parent.parent
HERE = Path(__file__).parent
TORCH_TARGET = "0x020b000000000000"
RULES = """
rule compile
  command = $compiler $flags -MMD -MF $out.d -x c++ -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = $compiler $in $link -o $out
"""


def build(folder: Path, sanitize: str = "") -> Path:
    """The library, in `folder`; ninja compiles what has changed. Several processes may ask for it at once.

    Args:
        folder: for objects and the library.
        sanitize: for -fsanitize=, such as "address".
    """
    import torch
    from torch.utils import cpp_extension

    folder.mkdir(parents=True, exist_ok=True)
    sources = [*sorted(ROOT.glob("csrc/**/*_cuda.cu")), *sorted(ROOT.glob("csrc/**/bind_cuda.cpp"))]
    flags = ["-std=c++20", "-O1", "-g1", "-march=native", "-fPIC", "-ffp-contract=off", "-fno-strict-aliasing"]
    flags += ["-Wall", "-Wextra", "-Werror", "-Wno-unused-parameter", "-Wno-unknown-pragmas", "-Wno-sign-compare"]
    flags += [f"-DTORCH_TARGET_VERSION={TORCH_TARGET}", f"-I{HERE}", f"-I{ROOT / 'csrc'}"]
    flags += [f"-isystem {path}" for path in cpp_extension.include_paths()]
    torch_libraries = Path(torch.__file__).parent / "lib"
    link = ["-shared", f"-L{torch_libraries}", "-ltorch", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{torch_libraries}"]
    if sanitize:
        flags += [f"-fsanitize={sanitize}", "-fno-omit-frame-pointer"]
        link += [f"-fsanitize={sanitize}"]
    objects = {"_".join(source.relative_to(ROOT).parts) + ".o": source for source in sources}
    lines = [
        f"compiler = {os.environ.get('CXX', 'g++')}",
        f"flags = {' '.join(flags)}",
        f"link = {' '.join(link)}",
        RULES,
    ]
    lines += [f"build {target}: compile {source}" for target, source in objects.items()]
    lines += [f"build cuda_on_host.so: link {' '.join(objects)}", ""]
    with FileLock(folder / "lock"):
        (folder / "build.ninja").write_text("\n".join(lines))
        done = subprocess.run(
            [sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise RuntimeError(done.stdout[-5000:] + done.stderr[-1000:])
    return folder / "cuda_on_host.so"


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), *sys.argv[2:]))
