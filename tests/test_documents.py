"""The code in README.md and in the tour runs; tables made from results are current; links lead somewhere."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
README = PYTHON.findall((ROOT / "README.md").read_text())


def run(code: str, where: str) -> None:
    namespace: dict[str, Any] = {"__name__": where}
    exec(compile(code, where, "exec"), namespace)


@pytest.mark.parametrize("index", range(len(README)))
def test_readme_block(index: int) -> None:
    assert len(README) == 4
    assert README[index].count("\n") <= 20
    run(README[index], f"README.md, block {index}")


def test_tour() -> None:
    blocks = PYTHON.findall((ROOT / "docs" / "tour.md").read_text())
    assert len(blocks) >= 5
    run("\n".join(blocks), "docs/tour.md")


def test_install_page() -> None:
    for block in PYTHON.findall((ROOT / "docs" / "install.md").read_text()):
        run(block, "docs/install.md")


def test_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_links_of_the_root_pages(page: str) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / page).read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), f"{page} links to {target}"
