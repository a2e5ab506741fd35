"""The chart of a selection: every network that was evaluated, those that no other beats, and those delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archsmith.run.charts import Figure, plain_layout

Point = Sequence[float]
"""A cost and validation accuracy in [0, 1]."""

AXES = {
    "macs": ("million MACs", "M", 1e6),
    "size": ("size in kB, by the bits of every layer", "kB", 1e3),
    "params": ("million parameters", "M", 1e6),
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
) -> Figure:
    """Return accuracy against MACs, or another cost of ``AXES``.

    Args:
        evaluated: Points of every phase of the selection, by its name.
        front: Those that no other beats, by rising cost.
        delivered: Label, cost and validation accuracy of each network that was exported.
        largest: Cost of the largest network.
        limit: Limit on it, or None.
        axis: Which cost.
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
    layout = plain_layout(400, x=title, y="validation accuracy in %")
    layout["xaxis"]["range"] = [0, 1.05 * largest / divisor]
    if limit is not None:
        level = limit / divisor
        rule = {"type": "line", "x0": level, "x1": level, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"] = [{**rule, "line": {"color": "var(--ink)", "width": 1.2, "dash": "dash"}}]
    return {"data": data, "layout": layout}


def _markers(points: Sequence[Point], name: str, colour: str, divisor: float) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [cost / divisor for cost, _ in points],
        "y": [round(100 * accuracy, 4) for _, accuracy in points],
        "marker": {"color": colour, "size": 8, "opacity": 0.6},
    }
