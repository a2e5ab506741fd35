"""Families: how points of a space become networks. One file for each searchable family.

A file that offers families has a literal ``FAMILIES = (dict(name=..., title=..., task=...), ...)`` that can be read
without importing it, and an ``open_family(name, **settings)``.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any


def family_table() -> list[dict[str, Any]]:
    """Return one row for each family (name, title, task, file) without importing any (nor torch)."""
    rows: list[dict[str, Any]] = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            named = isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "FAMILIES" for target in node.targets
            )
            if named and isinstance(node, ast.Assign):
                rows += [{**row, "file": f"archsmith/families/{path.name}"} for row in ast.literal_eval(node.value)]
    return sorted(rows, key=lambda row: str(row["name"]))


def relaxable_families() -> list[str]:
    """Return the names of families with a supernet that can be relaxed (rows of ``FAMILIES`` with ``relaxed=True``)."""
    return [str(row["name"]) for row in family_table() if row.get("relaxed")]
