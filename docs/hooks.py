"""Hooks of mkdocs: the wings' pages join the navigation; formulas become MathML, so that no page needs a script."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert

FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

WINGS = ("ntk", "tt", "pathsgd", "bayes")


def on_config(config: Any) -> Any:
    """A section "The wings" after the tour: every page of docs/ that the navigation does not name, wing by wing."""
    text = str(config["nav"])
    pages = [page.name for page in Path(config["docs_dir"]).glob("*.md") if f"'{page.name}'" not in text]
    rank = {wing: place for place, wing in enumerate(WINGS)}
    pages.sort(key=lambda name: (rank.get(re.split(r"[._]", name)[0], len(WINGS)), name))
    if pages:
        config["nav"].insert(3, {"The wings": pages})
    return config


def on_page_content(content: str, **_: Any) -> str:
    """Replace every formula that the arithmatex extension marked."""

    def mathml(match: re.Match[str]) -> str:
        return convert(html.unescape(match[3]), display="block" if match[2] == "[" else "inline")

    return FORMULA.sub(mathml, content)
