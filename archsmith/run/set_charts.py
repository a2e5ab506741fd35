"""The chart of a selection: every network that was evaluated, those that no other beats, and those delivered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from archsmith.run.charts import Figure, plain_layout

Point = Sequence[float]
"""MACs and validation accuracy in [0, 1]."""

_PHASES = ("var(--k0)", "var(--k3)", "var(--k4)", "var(--k5)")
_FRONT, _DELIVERED = "var(--k1)", "var(--k2)"


def selection(
    evaluated: Mapping[str, Sequence[Point]],
    front: Sequence[Point],
    delivered: Sequence[tuple[str, float, float]],
    *,
    largest: float,
    limit: float | None,
) -> Figure:
    """Return accuracy against MACs.

    Args:
        evaluated: Points of every phase of the selection, by its name.
        front: Those that no other beats, by rising MACs.
        delivered: Label, MACs and validation accuracy of each network that was exported.
        largest: MACs of the largest network.
        limit: Limit on the MACs, or None.
    """
    data = []
    for number, (phase, points) in enumerate(evaluated.items()):
        data.append(
            {
                **_markers(points, f"evaluated, {phase}", _PHASES[number % len(_PHASES)]),
                "hovertemplate": f"{phase}: %{{y:.2f}} % at %{{x:.3g}} M<extra></extra>",
            }
        )
    data.append(
        {
            **_markers(front, "not beaten by any other", _FRONT),
            "mode": "lines+markers",
            "line": {"color": _FRONT, "width": 2, "shape": "hv"},
            "hovertemplate": "front: %{y:.2f} % at %{x:.3g} M<extra></extra>",
        }
    )
    data.append(
        {
            **_markers([point for _, *point in delivered], "delivered", _DELIVERED),
            "customdata": [label for label, *_ in delivered],
            "hovertemplate": "%{customdata}: %{y:.2f} % at %{x:.3g} M<extra></extra>",
            "marker": {"color": _DELIVERED, "size": 15, "symbol": "star"},
        }
    )
    layout = plain_layout(400, x="million MACs", y="validation accuracy in %")
    layout["xaxis"]["range"] = [0, 1.05 * largest / 1e6]
    if limit is not None:
        level = limit / 1e6
        rule = {"type": "line", "x0": level, "x1": level, "yref": "paper", "y0": 0, "y1": 1}
        layout["shapes"] = [{**rule, "line": {"color": "var(--ink)", "width": 1.2, "dash": "dash"}}]
    return {"data": data, "layout": layout}


def _markers(points: Sequence[Point], name: str, colour: str) -> Figure:
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [macs / 1e6 for macs, _ in points],
        "y": [round(100 * accuracy, 4) for _, accuracy in points],
        "marker": {"color": colour, "size": 8, "opacity": 0.6},
    }
