"""The facts of sharpDARTS; their deterministic recipe is that of the DARTS facts, see ``darts_recipe``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

GOLDEN = json.loads((Path(__file__).parent / "golden" / "sharpdarts.json").read_text())


def cases(prefix: str) -> list[dict[str, Any]]:
    """Return the facts whose name starts so."""
    return [case for case in GOLDEN["cases"] if case["name"].startswith(prefix)]


def case(name: str) -> dict[str, Any]:
    """Return the fact of this name."""
    (found,) = (fact for fact in GOLDEN["cases"] if fact["name"] == name)
    return found
