"""Builds the compiled module finite_width._C (CPU, and CUDA where asked), or a pure-Python package without it.

Environment:
  FINITE_WIDTH_REQUIRE_EXT=1     a failed build of the compiled module is an error, not a warning; so are spills
  FINITE_WIDTH_SKIP_EXT=1        no compiled module
  FINITE_WIDTH_CUDA=0|1|auto     compile the .cu files; auto (default): where nvcc is found and torch has CUDA
  FINITE_WIDTH_CUDA_ARCHITECTURES  default "80;90a+PTX"
  FINITE_WIDTH_SANITIZE=address,undefined | thread   build the CPU kernels with these sanitizers (make sanitize)
"""

import ast
import hashlib
import json
import os
import shutil
import warnings
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent.resolve()
VERSION = next(
    line.split('"')[1] for line in (ROOT / "pyproject.toml").read_text().splitlines() if line.startswith("version")
)
REQUIRED = os.environ.get("FINITE_WIDTH_REQUIRE_EXT") == "1"
# The stable ABI of torch 2.11: the module runs on that version and every later one.
TORCH_TARGET = "0x020b000000000000"
# As on the CPU, multiply and add fuse only where the source says so. A kernel that spills registers is a warning; an
# error where the module is required, since nothing that is published should spill, but another compiler's code may.
NVCC_FLAGS = ["-O3", "-std=c++20", "--fmad=false", "-Xptxas=-warn-spills", *(["-Xptxas=-Werror"] if REQUIRED else [])]


def write_schema_header():
    """A header with the fingerprint of the ops' schemas: the package refuses a module that was built for others.

    A kernel called with arguments of another schema would crash the process. Written only where it changed, so that
    ninja rebuilds nothing else.
    """
    tree = ast.parse((ROOT / "python" / "finite_width" / "_library.py").read_text())
    schemas = next(
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.AnnAssign) and getattr(node.target, "id", "") == "SCHEMAS"
    )
    fingerprint = hashlib.sha256(json.dumps(schemas, sort_keys=True).encode()).hexdigest()[:16]
    text = f'// Written by setup.py.\n#define FINITE_WIDTH_SCHEMAS "{fingerprint}"\n'
    header = ROOT / "build" / "generated" / "schemas.h"
    if not header.exists() or header.read_text() != text:
        header.parent.mkdir(parents=True, exist_ok=True)
        header.write_text(text)
    return header.parent


def cuda_home():
    """The CUDA toolkit's folder if the .cu files are to be compiled, else None."""
    import torch

    wanted = os.environ.get("FINITE_WIDTH_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise ValueError(f"FINITE_WIDTH_CUDA must be 0, 1 or auto, got {wanted!r}")
    if wanted == "0" or (wanted == "auto" and torch.version.cuda is None):
        return None
    nvcc = shutil.which("nvcc")
    candidates = [os.environ.get("CUDA_HOME"), nvcc and Path(nvcc).resolve().parent.parent, "/usr/local/cuda"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "include" / "cuda_runtime.h").exists():
            return Path(candidate)
    if wanted == "1":
        raise RuntimeError("FINITE_WIDTH_CUDA=1, but no CUDA toolkit was found (set CUDA_HOME)")
    return None


def architecture_flags():
    """nvcc's -gencode flags for FINITE_WIDTH_CUDA_ARCHITECTURES such as "80;90a+PTX"."""
    flags = []
    for name in os.environ.get("FINITE_WIDTH_CUDA_ARCHITECTURES", "80;90a+PTX").split(";"):
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            plain = number.rstrip("a")  # PTX for sm_90a would run on sm_90 alone; plain PTX runs on what comes later
            flags.append(f"-gencode=arch=compute_{plain},code=compute_{plain}")
    return flags


def extension():
    """The one extension module, with every source under csrc/."""
    import pybind11
    import torch
    from torch.utils import cpp_extension

    found = sorted(path.relative_to(ROOT) for path in ROOT.glob("csrc/**/*.cpp"))
    sources = [str(path) for path in found if path.name != "bind_cuda.cpp"]
    macros = [
        ("TORCH_TARGET_VERSION", TORCH_TARGET),
        ("FINITE_WIDTH_VERSION", VERSION),
        ("FINITE_WIDTH_BUILT_FOR_TORCH", torch.__version__),
    ]
    # Multiply and add fuse only where the source says so (csrc/common/foreach_isa.h).
    optimise = ["-O3", "-std=c++20", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]
    warn = [
        "-Wall",
        "-Wextra",
        "-Wno-unused-parameter",
        "-Wno-psabi",
        "-Wno-ignored-attributes",
        "-Wno-unknown-pragmas",
    ]
    compile_flags = {"cxx": [*optimise, "-fvisibility=hidden", *warn], "nvcc": []}
    link = {"extra_link_args": ["-Wl,-s"]}
    if sanitizers := os.environ.get("FINITE_WIDTH_SANITIZE"):
        compile_flags["cxx"] += [f"-fsanitize={sanitizers}", "-fno-omit-frame-pointer", "-g", "-O1"]
        compile_flags["cxx"] += ["-fno-sanitize-recover=undefined"]
        # Checks as calls, no tracking of variables for the debugger: in unrolled tiles either takes minutes a file.
        compile_flags["cxx"] += ["--param=asan-instrumentation-with-call-threshold=0", "-fno-var-tracking"]
        link["extra_link_args"] = [f"-fsanitize={sanitizers}"]
    include = [str(ROOT / "csrc"), str(write_schema_header()), pybind11.get_include()]
    home = cuda_home()
    if home:
        cpp_extension.CUDA_HOME = str(home)  # None on a CPU build of torch, even with the variable set
        sources += [str(path) for path in found if path.name == "bind_cuda.cpp"]
        sources += sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/**/*_cuda.cu"))
        # Not by commas, at which nvcc would split the macro.
        architectures = os.environ.get("FINITE_WIDTH_CUDA_ARCHITECTURES", "80;90a+PTX").replace(";", "/")
        macros += [("FINITE_WIDTH_CUDA", "1"), ("FINITE_WIDTH_CUDA_ARCHITECTURES", architectures)]
        compile_flags["nvcc"] = [*NVCC_FLAGS, "-Xcompiler=-fvisibility=hidden", *architecture_flags()]
        # The runtime is linked statically, so that the module also loads where there is no CUDA.
        library = home / "lib64" if (home / "lib64").exists() else home / "lib"
        link["extra_link_args"] += [f"-L{library}", "-lcudart_static", "-lrt", "-ldl", "-lpthread"]
        include.append(str(home / "include"))
    return cpp_extension.CppExtension(
        "finite_width._C",
        sources,
        include_dirs=include,
        define_macros=macros,
        extra_compile_args=compile_flags,
        **link,
    )


def build_command():
    """torch's BuildExtension, which turns into a warning where the compiler fails and nobody required it."""
    from torch.utils.cpp_extension import BuildExtension

    class OptionalBuildExtension(BuildExtension):
        def run(self):
            try:
                super().run()
            except Exception as error:
                if REQUIRED:
                    raise
                self.extensions = []
                explain_loss(error)

    return OptionalBuildExtension


def explain_loss(error):
    warnings.warn(
        f"finite-width: the compiled module was not built ({error}). The package works without it, in plain torch: "
        "same results, but slower and with more memory. Install g++ (and ninja) and reinstall to get the kernels; "
        "FINITE_WIDTH_REQUIRE_EXT=1 makes this an error.",
        stacklevel=2,
    )


def main():
    options = {}
    if os.environ.get("FINITE_WIDTH_SKIP_EXT") != "1":
        try:
            if shutil.which(os.environ.get("CXX", "g++")) is None:
                raise RuntimeError("no C++ compiler found")
            options = {"ext_modules": [extension()], "cmdclass": {"build_ext": build_command()}}
        except (ImportError, RuntimeError) as error:
            if REQUIRED:
                raise
            explain_loss(error)
    setup(**options)


if __name__ == "__main__":
    main()
