"""The code in README.md and on the pages runs; pages made from results are current; links lead somewhere."""

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


# What stands in a page's first block without being made there.
PRELUDES = {
    "ntk_prediction": "",
    "scale": "",
    "bayes": """
import torch
import torch.nn.functional as F
from torch import nn
x, y = torch.randn(16, 784), torch.randint(10, (16,))
""",
    "tt": """
import torch
from torch import nn
import finite_width as fw
linear, model = nn.Linear(1024, 1024), nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
x, bias = torch.randn(8, 1024), torch.zeros(1024)
cores = fw.tt.TTLinear(1024, 1024, rank=8).cores
weight, tensor = torch.randn(64, 32), torch.randn(4, 5, 6)
out_modes, in_modes = (8, 8), (8, 4)
""",
}


@pytest.mark.parametrize("page", PRELUDES)
def test_first_block_of_a_page(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page == "scale":
        pytest.importorskip("zarr")
    monkeypatch.chdir(tmp_path)
    block = PYTHON.findall((ROOT / "docs" / f"{page}.md").read_text())[0]
    run(PRELUDES[page] + block, f"docs/{page}.md")


def test_tables_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


WRITTEN = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md") if path.stem != "benchmark_figures")
PAGES = ["README.md", "CONTRIBUTING.md", *WRITTEN]


@pytest.mark.parametrize("page", PAGES)
def test_links(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(), flags=re.DOTALL)
    for target, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", text):
        if target.startswith("http"):
            continue
        file = ((ROOT / page).parent / target) if target else ROOT / page
        assert file.exists(), f"{page} links to {target}"
        if anchor and file.suffix == ".md":
            assert anchor in headings(file), f"{page} links to {target}#{anchor}"


def headings(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}
