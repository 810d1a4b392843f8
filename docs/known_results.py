"""The table of known results: what was published and expected stands here, what was measured comes from JSON."""

from __future__ import annotations


def table() -> list[str]:
    return ["| | |", "| --- | --- |"]
