"""One file for each published system: it composes the parts of the other rooms and reads like the paper's abstract.

A file begins with a literal ``SYSTEM = dict(...)`` that can be read without importing it, holds a pydantic ``Settings``
and, for ``kind="search"``, a ``Searcher`` (the contract is ``archsmith.run.drive.Searcher``).
"""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from archsmith.core.errors import UserError

_GROUP = "archsmith.methods"


def method_table() -> list[dict[str, Any]]:
    """Return one row for each system, sorted by slug, without importing any (nor torch).

    Returns:
        The fields of ``SYSTEM`` (slug, title, year, arxiv, kind, aliases) and ``file``, ``tests`` and ``docs``,
        relative to the repository. Methods of other packages (entry points ``archsmith.methods``) have their module as
        ``file``.
    """
    rows = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        if path.name == "__init__.py":
            continue
        system = _declared(path)
        own = {"file": f"archsmith/methods/{path.name}", "tests": f"tests/methods/test_{path.name}"}
        rows.append({**system, **own, "docs": f"docs/systems/{system['slug']}.md"})
    known = {row["slug"] for row in rows}
    for entry in _outside():
        if entry.name not in known:
            rows.append({"slug": entry.name, "title": "from another package", "kind": "search", "file": entry.value})
    return sorted(rows, key=lambda row: str(row["slug"]))


def load_method(name: str, *, kind: str = "search") -> tuple[dict[str, Any], ModuleType]:
    """Return a method's row and its module.

    Args:
        name: Slug or alias.
        kind: The kind that is needed.

    Raises:
        UserError: No method of that kind has this name.
    """
    rows = [row for row in method_table() if row["kind"] == kind]
    for row in rows:
        if name == row["slug"] or name in row.get("aliases", ()):
            outside = {entry.name: entry for entry in _outside()}
            file = str(row["file"])
            module = import_module(file.removesuffix(".py").replace("/", ".")) if "/" in file else outside[name].load()
            return row, module
    raise UserError(
        "method", name, allowed=", ".join(str(row["slug"]) for row in rows), hint="archsmith methods lists them."
    )


def _declared(path: Path) -> dict[str, Any]:
    """Return the literal ``SYSTEM`` of a method file."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "SYSTEM" for t in node.targets):
            value: dict[str, Any] = ast.literal_eval(node.value)
            return value
    raise ValueError(f"{path} is in the room of methods but has no literal SYSTEM")


def _outside() -> list[EntryPoint]:
    return sorted(entry_points(group=_GROUP), key=lambda entry: entry.name)
