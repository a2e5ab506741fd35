"""The published facts of FlexiBERT and BOSHNAS, and the tensors that their cases are written in."""

import json
from pathlib import Path

import torch

_GOLDEN = json.loads((Path(__file__).parent / "golden" / "flexibert.json").read_text(encoding="utf-8"))


def cases(prefix: str) -> list[dict]:
    """Return the cases whose name begins so; there is at least one."""
    found = [case for case in _GOLDEN["cases"] if case["name"].startswith(prefix)]
    assert found, prefix
    return found


def fill(number: float, amplitude: float, shape: tuple[int, ...]) -> torch.Tensor:
    """Return ``amplitude * sin(0.7 i + 0.013 i^2 + number)`` for the flat index i, in float64."""
    i = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (amplitude * torch.sin(0.7 * i + 0.013 * i * i + number)).reshape(shape)


def benchmark_layers(rows: list) -> list[tuple]:
    """Return rows (type, parameter, heads, size, count) of the public table as layers without their hidden size."""
    kinds = {"SA": "sa", "LT": "l", "DSC": "c"}
    return [
        (kinds[kind], parameter if isinstance(parameter, int) else parameter.lower(), heads, (size,) * count)
        for kind, parameter, heads, size, count in rows
    ]
