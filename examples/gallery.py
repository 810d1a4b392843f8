"""Runs every example, quick, and puts all pictures and figures on one page beside the expected ones.

    python examples/gallery.py [--only NAME ...] [--out out/gallery]

The page, index.html, needs no other file. A quick run is small and mostly on scikit-learn's digits, so its figures
stand beside, not against, the published ones; the full runs are recorded under docs/results and shown in a column of
their own.
"""

from __future__ import annotations

import argparse
import ast
import base64
import html
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "docs"))
from known_results import KNOWN, Known, recorded  # noqa: E402

# In the order of the page; an example that is not here yet is skipped, one that is not listed comes last.
ORDER = [
    *("demo", "ntk_cifar2", "ntk_tutorial", "ntk_dynamics"),
    *("tt_mnist", "tt_hidden_layer", "tt_finetune", "dcgan_mnist"),
    *("path_sgd_loop", "path_sgd_mnist"),
    *("bayes_regression", "bayes_mnist", "boids"),
]
NOT_EXAMPLES = {"command", "data", "style", "gallery"}
LIMIT = 300  # seconds for one example; a quick run takes less than a minute on two quiet cores


@dataclass
class Run:
    """One example's run."""

    name: str
    seconds: float
    failed: bool
    output: str
    pictures: list[Path] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)


def examples() -> list[str]:
    found = {path.stem for path in (ROOT / "examples").glob("*.py")} - NOT_EXAMPLES
    found = {name for name in found if "arguments(" in (ROOT / "examples" / f"{name}.py").read_text()}
    return [name for name in ORDER if name in found] + sorted(found - set(ORDER))


def run(name: str, out: Path) -> Run:
    """Run one example in a process of its own; whatever it writes below its folder is its result."""
    folder = out / name
    if folder.exists():
        for old in sorted(folder.rglob("*"), reverse=True):
            old.rmdir() if old.is_dir() else old.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--quick", "--out", str(folder)]
    before = time.perf_counter()
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, env=os.environ | {"MPLBACKEND": "Agg"}, check=False
        )
        output, failed = done.stdout, done.returncode != 0
        if failed:
            output += "\n" + done.stderr[-3000:]
    except subprocess.TimeoutExpired:
        output, failed = f"stopped after {LIMIT} s", True
    result = Run(name, time.perf_counter() - before, failed, output)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    result.pictures = [path for path in files if path.suffix in {".png", ".gif", ".svg"}]
    # The figures of a run; single runs that an example stores on its way have names of their own, and are not shown.
    for path in files:
        if path.suffix == ".json" and not path.name.startswith(("run_", "grid_")):
            found = json.loads(path.read_text())
            if isinstance(found, dict):
                result.figures |= found
    return result


def description(name: str) -> tuple[str, str]:
    """Title and text of an example, from the first two paragraphs of its docstring."""
    text = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text())) or name
    first, _, rest = text.partition("\n\n")
    return " ".join(first.split()), rest.partition("\n\n")[0]


def flat(value: Any, name: str = "") -> list[tuple[str, str]]:
    """Every number and short text of the figures, with its path as its name; long lists by their length."""
    if isinstance(value, dict):
        return [pair for key, each in value.items() for pair in flat(each, f"{name} / {key}" if name else str(key))]
    if isinstance(value, list):
        simple = all(not isinstance(each, (dict, list)) for each in value)
        if simple and len(value) <= 6:
            return [(name, ", ".join(map(number, value)))]
        return [(name, f"{len(value)} values")]
    return [(name, number(value))]


def number(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def safe(known: Known, figures: dict[str, Any] | None) -> str:
    """What figures say about a known result; a dash where they do not have it."""
    if known.read is None or not figures:
        return "–"
    try:
        return known.read(figures)
    except (KeyError, IndexError, TypeError, ZeroDivisionError, ValueError):
        return "–"


def data_uri(path: Path) -> str:
    kind = {"png": "png", "gif": "gif", "svg": "svg+xml"}[path.suffix[1:]]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def card(result: Run) -> str:
    title, text = description(result.name)
    escape = html.escape
    state = '<span class="bad">failed</span>' if result.failed else f"{result.seconds:.0f} s"
    data = result.figures.get("data") or result.figures.get("dataset")
    parts = [
        f'<section id="{result.name}"><h2>{escape(title)}</h2><p>{escape(text)}</p>',
        f"<p class=command><code>python examples/{result.name}.py --quick</code> {state}"
        + (f", on {escape(str(data))}" if isinstance(data, str) else "")
        + "</p>",
    ]
    parts += [
        f'<figure><img src="{data_uri(picture)}" alt="{escape(picture.stem)}" loading="lazy"></figure>'
        for picture in result.pictures
    ]
    known = [each for each in KNOWN if each.run == result.name]
    if known:
        full = recorded(result.name)
        parts.append(
            "<table><tr><th>known result<th>published<th>expected<th>full run, recorded<th>this quick run</tr>"
            + "".join(
                "<tr><td>"
                + "<td>".join(
                    map(
                        escape,
                        (each.what, each.published, each.expected, safe(each, full), safe(each, result.figures)),
                    )
                )
                + "</tr>"
                for each in known
            )
            + "</table>"
        )
    rows = [pair for pair in flat(result.figures) if not pair[0].startswith("machine")]
    if rows:
        parts.append("<details><summary>all figures of this run</summary><table>")
        parts += [f"<tr><td>{escape(key)}<td>{escape(value)}</tr>" for key, value in rows[:120]]
        parts.append("</table></details>")
    opened = " open" if result.failed else ""
    parts.append(f"<details{opened}><summary>what it printed</summary><pre>{escape(result.output)}</pre></details>")
    return "\n".join([*parts, "</section>"])


STYLE = """
:root { color-scheme: light dark; --text: #1d2330; --soft: #667; --line: #dde; --card: #fff; --page: #f4f5fa;
  --accent: #3949ab; }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ef; --soft: #99a; --line: #334; --card: #1a1d27;
  --page: #10131a; --accent: #9fa8da; } }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.5 system-ui, sans-serif; }
main, header { max-width: 1080px; margin: auto; padding: 0 1.2rem; }
header { padding: 2.6rem 1.2rem 1rem; } h1 { margin: 0; font-size: 2.2rem; }
nav a { display: inline-block; margin: .2rem .8rem .2rem 0; color: var(--accent); text-decoration: none; }
section { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 1.2rem 1.6rem;
  margin: 1.4rem 0; }
h2 { margin: .2rem 0 .4rem; font-size: 1.25rem; } .command, summary, .facts { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; text-align: center; } img { max-width: 100%; border-radius: 6px; background: #fff; }
table { border-collapse: collapse; font-size: .86rem; margin: .8rem 0; font-variant-numeric: tabular-nums; }
td, th { border-bottom: 1px solid var(--line); padding: .3rem .9rem .3rem 0; text-align: left; vertical-align: top; }
pre { overflow-x: auto; font-size: .8rem; } .bad { color: #d32f2f; font-weight: 600; }
"""


def page(results: list[Run], facts: dict[str, Any]) -> str:
    links = "".join(f'<a href="#{each.name}">{each.name}</a>' for each in results)
    total = sum(each.seconds for each in results)
    about = ", ".join(f"{key}: {value}" for key, value in facts.items() if isinstance(value, (str, int)))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>finite-width gallery</title>'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{STYLE}</style><header><h1>finite-width: the gallery</h1>"
        f"<p>{len(results)} examples, run quick in {total:.0f} s. Quick runs are small, mostly on scikit-learn's "
        "digits: their figures stand beside the published ones, not against them. The full runs are in the column "
        "<em>full run, recorded</em> (a dash: not run).</p>"
        f"<nav>{links}</nav><p class=facts>{html.escape(about)}</p></header><main>"
        + "\n".join(map(card, results))
        + "</main></html>\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these examples alone")
    parser.add_argument("--out", type=Path, default=Path("out") / "gallery")
    options = parser.parse_args()
    names = examples()
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"no example {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    import finite_width as fw

    results = []
    bar = tqdm([name for name in names if not options.only or name in options.only], unit="example")
    for name in bar:
        bar.set_description(name)
        results.append(run(name, options.out))
    options.out.mkdir(parents=True, exist_ok=True)
    index = options.out / "index.html"
    index.write_text(page(results, fw.build_info()))
    for each in results:
        print(
            f"{each.name:18} {'FAILED' if each.failed else 'ok':7} {each.seconds:5.0f} s, {len(each.pictures)} pictures"
        )
    print(f"written: {index}")
    if failed := [each.name for each in results if each.failed]:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
