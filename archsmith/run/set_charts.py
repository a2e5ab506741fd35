"""The charts of a search in a supernet: its training, what the selection evaluated, and what was predicted of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.run.charts import Figure, line, plain_layout

Point = Sequence[float]
"""A cost and validation accuracy in [0, 1]."""

AXES = {
    "macs": ("million MACs", "M", 1e6),
    "params": ("million parameters", "M", 1e6),
    "size": ("size in kB, by the bits of every layer", "kB", 1e3),
    "latency": ("latency in ms, measured", "ms", 1.0),
}
"""Title, unit and divisor by cost."""

_PHASES = ("var(--k0)", "var(--k3)", "var(--k4)", "var(--k5)")
_FRONT, _DELIVERED = "var(--k1)", "var(--k2)"


def selection(
    evaluated: Mapping[str, Sequence[Point]],
    front: Sequence[Point],
    delivered: Sequence[tuple[str, float, float]],
    *,
    largest: float,
    limit: float | None,
    axis: str = "macs",
    intervals: Sequence[tuple[float, float]] = (),
) -> Figure:
    """Return accuracy against MACs, or another cost of ``AXES``.

    Args:
        evaluated: Points of every phase of the selection, by its name.
        front: Those that no other beats, by rising cost.
        delivered: Label, cost and validation accuracy of each network that was exported.
        largest: Cost of the largest network.
        limit: Limit on it, or None.
        axis: Which cost.
        intervals: 95 % intervals of the delivered networks' cost, in their order; none for exact costs.
    """
    title, unit, divisor = AXES[axis]
    data = []
    for number, (phase, points) in enumerate(evaluated.items()):
        data.append(
            {
                **_markers(points, f"evaluated, {phase}", _PHASES[number % len(_PHASES)], divisor),
                "hovertemplate": f"{phase}: %{{y:.2f}} % at %{{x:.3g}} {unit}<extra></extra>",
            }
        )
    data.append(
        {
            **_markers(front, "not beaten by any other", _FRONT, divisor),
            "mode": "lines+markers",
            "line": {"color": _FRONT, "width": 2, "shape": "hv"},
            "hovertemplate": f"front: %{{y:.2f}} % at %{{x:.3g}} {unit}<extra></extra>",
        }
    )
    data.append(
        {
            **_markers([point for _, *point in delivered], "delivered", _DELIVERED, divisor),
            "customdata": [label for label, *_ in delivered],
            "hovertemplate": f"%{{customdata}}: %{{y:.2f}} % at %{{x:.3g}} {unit}<extra></extra>",
            "marker": {"color": _DELIVERED, "size": 15, "symbol": "star"},
        }
    )
    if intervals:
        costs = [cost for _, cost, _ in delivered]
        data[-1]["error_x"] = {
            "type": "data",
            "symmetric": False,
            "array": [(high - cost) / divisor for cost, (_, high) in zip(costs, intervals, strict=True)],
            "arrayminus": [(cost - low) / divisor for cost, (low, _) in zip(costs, intervals, strict=True)],
            "color": _DELIVERED,
            "thickness": 1.5,
        }
    layout = plain_layout(400, x=title, y="validation accuracy in %")
    layout["xaxis"]["range"] = [0, 1.05 * largest / divisor]
    if limit is not None:
        level = limit / divisor
        rule = {"type": "line", "x0": level, "x1": level, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"] = [{**rule, "line": {"color": "var(--ink)", "width": 1.2, "dash": "dash"}}]
    return {"data": data, "layout": layout}


def training(epochs: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the accuracies of the one training: of the largest child while it learns, and of both ends afterwards."""
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    names = (
        ("train_accuracy", "largest child, training batches", _FRONT, 1.5),
        ("largest_accuracy", "largest child, validation", _PHASES[0], 2.5),
        ("smallest_accuracy", "smallest child, validation", _PHASES[1], 2.5),
    )
    data = [
        {**line(numbers, [_percent(epoch.get(key)) for epoch in epochs], name, colour, width), "mode": "lines+markers"}
        for key, name, colour, width in names
    ]
    layout = plain_layout(340, x="epoch", y="accuracy in %")
    layout["xaxis"]["range"] = [0.5, max(numbers) + 0.5]
    return {"data": data, "layout": layout}


def calibration(pairs: Sequence[Sequence[float]], *, name: str, unit: str, factor: float = 1.0) -> Figure:
    """Return what was measured against what was predicted before, with the line on which both are equal.

    Args:
        pairs: Predicted and measured.
        name: What of.
        unit: Its unit.
        factor: By which both are multiplied first.
    """
    predicted, measured = ([factor * pair[i] for pair in pairs] for i in (0, 1))
    low, high = min(*predicted, *measured), max(*predicted, *measured)
    room = 0.05 * (high - low) or 1.0
    ends = [low - room, high + room]
    equal = {**line(ends, list(ends), "predicted = measured", "var(--ink)", 1), "hoverinfo": "skip"}
    equal["line"]["dash"] = "dash"
    points = {
        "type": "scatter",
        "mode": "markers",
        "name": f"{len(pairs)} networks",
        "x": predicted,
        "y": measured,
        "hovertemplate": f"predicted %{{x:.4g}}, measured %{{y:.4g}} {unit}<extra></extra>",
        "marker": {"color": _PHASES[0], "size": 8, "opacity": 0.7},
    }
    layout = plain_layout(380, x=f"predicted {name} in {unit}", y=f"measured in {unit}")
    layout["xaxis"]["range"], layout["yaxis"]["range"] = ends, ends
    return {"data": [equal, points], "layout": layout}


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _markers(points: Sequence[Point], name: str, colour: str, divisor: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [cost / divisor for cost, _ in points],
        "y": [round(100 * accuracy, 4) for _, accuracy in points],
        "marker": {"color": colour, "size": 8, "opacity": 0.6},
    }
