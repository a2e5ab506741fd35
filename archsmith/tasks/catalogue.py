"""Tasks by name: listed without importing any of them, opened by importing only the one that is asked for.

Each file of this folder that offers tasks has a literal ``TASKS`` (per task a dictionary: name, title, data, metric)
and a function ``make(name, *, data, options)``. Outside packages join by entry points of the group ``archsmith.tasks``
that name such a function.
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from archsmith.core.errors import UserError

if TYPE_CHECKING:
    from archsmith.tasks.base import Task

_FIELDS = ("name", "title", "data", "metric")
_GROUP = "archsmith.tasks"


def task_table(folder: str | Path | None = None) -> list[dict[str, str]]:
    """Return one row per task, sorted by name, without importing the tasks (nor torch).

    Args:
        folder: Where to look for files with ``TASKS``; this package, and the entry points of others, when None.

    Returns:
        Rows with ``name``, ``title``, ``data`` (what ``data=`` must be), ``metric`` and ``module``.
    """
    rows = []
    for path in sorted(Path(folder or Path(__file__).parent).glob("*.py")):
        for row in _declared(path):
            rows.append({**{field: row[field] for field in _FIELDS}, "module": path.stem})
    if folder is None:
        for entry in _outside():
            rows.append(
                {"name": entry.name, "title": "from another package", "data": "", "metric": "", "module": entry.value}
            )
    return sorted(rows, key=lambda row: row["name"])


def open_task(name: str, *, data: str | Path | None = None, **options: Any) -> Task:
    """Return a task by its name.

    Args:
        name: One of ``task_table()``: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``images``, ``arrays``,
            ``spoken-digits``, ``sst2``, ``ag-news``, ``text``, ``phrases``.
        data: File or folder that the task reads; nothing is ever downloaded.
        options: Settings of the task; for images those of ``archsmith.tasks.options.ImageOptions``, for
            speech those of ``archsmith.tasks.spoken_digits.SpeechOptions``, for texts those of
            ``archsmith.tasks.text_tasks.TextOptions``.

    Raises:
        UserError: Unknown name or option (the known ones are listed), a value out of bounds, missing or damaged data.

    Example:
        >>> open_task("digits").input_shape
        (1, 8, 8)
    """
    outside = {entry.name: entry for entry in _outside()}
    homes = {row["name"]: row["module"] for row in task_table()}
    if name not in homes:
        raise UserError("task", name, allowed=", ".join(homes))
    make: Callable[..., Task]
    make = outside[name].load() if name in outside else import_module(f"archsmith.tasks.{homes[name]}").make
    return make(name, data=data, options=options)


def _declared(path: Path) -> tuple[dict[str, str], ...]:
    """Return the literal ``TASKS`` of a source file, empty when it has none."""
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == "TASKS" for t in node.targets):
            value: tuple[dict[str, str], ...] = ast.literal_eval(node.value)
            return value
    return ()


def _outside() -> list[EntryPoint]:
    """Return the entry points of other packages, sorted; names of our own tasks are not theirs to take."""
    own = {row["name"] for row in task_table(Path(__file__).parent)}
    return sorted((e for e in entry_points(group=_GROUP) if e.name not in own), key=lambda e: e.name)
