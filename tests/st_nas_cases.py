"""The published facts of ST-NAS, and the tensors that its cases are written in."""

import json
from pathlib import Path

import torch

_GOLDEN = json.loads((Path(__file__).parent / "golden" / "st-nas.json").read_text(encoding="utf-8"))


def cases(prefix: str) -> list[dict]:
    """Return the cases whose name begins so; there is at least one."""
    found = [case for case in _GOLDEN["cases"] if case["name"].startswith(prefix)]
    assert found, prefix
    return found


def fill(amplitude: float, number: int, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``amplitude * sin(1.7 (i + 1) + 0.5 number)`` for the flat index i, in float64."""
    count = torch.Size(shape).numel()
    return (amplitude * torch.sin(1.7 * (torch.arange(count, dtype=torch.float64) + 1) + 0.5 * number)).reshape(shape)
