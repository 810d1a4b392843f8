"""The library of ops: what is loaded, what is checked, and the switch to the references."""

from __future__ import annotations

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import finite_width as fw
import op_battery
from finite_width import _library, _selfcheck
from finite_width._gemm import gemm

TESTS = Path(__file__).parent


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )


def test_every_op_has_a_reference_an_example_and_a_battery_case() -> None:
    cases: set[str] = set()
    for path in sorted(TESTS.glob("*/test_ops*.py")):
        sys.path.insert(0, str(path.parent))
        try:
            spec = importlib.util.spec_from_file_location(f"{path.parent.name}_{path.stem}", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        finally:
            sys.path.pop(0)
        cases |= {case.name for case in module.CASES}
    assert set(_library.SCHEMAS) == set(_library.REFERENCES)
    assert set(_library.SCHEMAS) == cases
    assert set(_library.SCHEMAS) == set(_selfcheck.EXAMPLES)


def test_every_op_has_a_cpu_kernel() -> None:
    if not fw.has_kernels():
        pytest.skip("no compiled module in this process")
    for name in _library.SCHEMAS:
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"finite_width::{name}", "CPU"), name


def test_an_import_is_hardly_longer_than_torch_s() -> None:
    """It loads neither torch's compiler nor scikit-learn, either of which takes as long as torch itself."""
    said = python("import sys, torch; known = set(sys.modules); import finite_width; print(*set(sys.modules) - known)")
    assert said.returncode == 0, said.stderr
    assert not {"torch._dynamo", "torch._inductor", "sklearn", "scipy", "matplotlib"} & set(said.stdout.split())


def test_a_constant_function_is_marked_as_torch_marks_it() -> None:
    ours, theirs = _library.constant_while_tracing(lambda: 0), torch.compiler.assume_constant_result(lambda: 0)
    assert vars(ours) == vars(theirs) != {}


def test_schemas_have_no_defaults() -> None:
    assert not [name for name, schema in _library.SCHEMAS.items() if "=" in schema]


def test_self_check_finds_a_wrong_kernel() -> None:
    assert all(difference <= bound for _, difference, bound in _selfcheck.self_check())
    right = [torch.ones(3)]
    assert not _selfcheck._difference([torch.tensor([1.0, 1.0, 1.1])], right) <= 1e-4
    assert not _selfcheck._difference([torch.tensor([1.0, 1.0, float("nan")])], right) <= 1e-4


def test_reference_only_runs_the_reference() -> None:
    seen = []
    original = _library.REFERENCES["gemm"]
    _library.REFERENCES["gemm"] = lambda *args: seen.append(1) or original(*args)
    try:
        with fw.reference_only():
            assert not fw.has_kernels()
            assert fw.build_info()["kernels"] == "reference_only()"
            gemm(torch.ones(2, 3), torch.ones(3, 2))
            torch.func.vmap(gemm)(torch.ones(4, 2, 3), torch.ones(4, 3, 2))
            assert seen
            count = len(seen)
        gemm(torch.ones(2, 3), torch.ones(3, 2))
        assert len(seen) == count
    finally:
        _library.REFERENCES["gemm"] = original


def test_reference_only_refuses_compile() -> None:
    def inside(x: torch.Tensor) -> torch.Tensor:
        with fw.reference_only():
            return gemm(x, x)

    with pytest.raises(Exception, match="FINITE_WIDTH_DISABLE_EXT=1"):
        torch.compile(inside, backend="eager", fullgraph=True)(torch.ones(2, 2))


def test_a_process_without_kernels_says_so() -> None:
    done = python(
        "import finite_width as fw; print(fw.has_kernels(), fw.build_info()['kernels'])", FINITE_WIDTH_DISABLE_EXT="1"
    )
    assert done.stdout.strip() == "False switched off by FINITE_WIDTH_DISABLE_EXT=1", done.stderr


@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_the_instruction_set_can_be_forced_down(isa: str) -> None:
    if not fw.has_kernels():
        pytest.skip("no compiled module in this process")
    done = python("import finite_width as fw; print(fw.build_info()['isa'])", FINITE_WIDTH_ISA=isa)
    assert done.stdout.strip() in (isa, "generic"), done.stderr


def test_a_wrong_instruction_set_is_an_error() -> None:
    if not fw.has_kernels():
        pytest.skip("no compiled module in this process")
    done = python("import finite_width", FINITE_WIDTH_ISA="sse9")
    assert done.returncode != 0
    assert "FINITE_WIDTH_ISA must be generic, avx2 or avx512, got 'sse9'" in done.stderr


def test_main_prints_the_self_check() -> None:
    done = subprocess.run([sys.executable, "-m", "finite_width"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in _library.SCHEMAS:
        assert name in done.stdout


def test_relative_error_lets_no_nan_pass() -> None:
    assert not op_battery.relative_error(torch.tensor([float("nan")]), torch.ones(1)) <= 1e9


@pytest.mark.skipif(not fw.has_kernels(), reason="no compiled module to refuse")
def test_a_module_built_for_other_schemas_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_library.SCHEMAS, "gemm", "(Tensor a, Tensor b) -> Tensor")
    with pytest.raises(ImportError, match=r"built for other schemas.*rebuild"):
        _library._load_compiled_module()
