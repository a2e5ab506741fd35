from __future__ import annotations

import doctest
import importlib
import subprocess
import sys

import pytest


def test_the_room_is_light() -> None:
    heavy = ("torch", "scipy", "sklearn", "pydantic", "PIL")
    code = f"import archsmith.space, sys; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_exists() -> None:
    import archsmith.space as space

    assert all(hasattr(space, name) for name in space.__all__)
    assert sorted(space.__all__, key=lambda name: (not name.isupper(), name)) == list(space.__all__)


@pytest.mark.parametrize("name", ["", ".architecture", ".budget", ".constraints", ".product"])
def test_examples_run(name: str) -> None:
    outcome = doctest.testmod(importlib.import_module(f"archsmith.space{name}"))
    assert outcome.attempted > 0
    assert outcome.failed == 0
