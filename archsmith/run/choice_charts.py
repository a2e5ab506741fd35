"""The charts of a differentiable search: probabilities of every edge, how undecided they are, what they would cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from archsmith.run.charts import Epochs, Figure, axis, line, plain_layout

PALETTE = tuple(f"var(--k{number})" for number in range(8))
DASHES = ("solid", "dot", "dash")

_COLUMNS, _ROW = 4, 172


def colours_of(operations: Sequence[str]) -> dict[str, str]:
    """Return a colour for each operation; those that do nothing are grey."""
    named = [name for name in operations if name not in ("none", "zero")]
    colours = {name: PALETTE[number % len(PALETTE)] for number, name in enumerate(named)}
    return {name: colours.get(name, "var(--soft)") for name in operations}


def probabilities_over_time(epochs: Epochs, group: str, edges: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the mixing weights of every edge over epochs, one small chart for each edge.

    Args:
        epochs: Figures of the search's epochs, with ``probabilities``.
        group: Which logits.
        edges: ``name`` and ``options`` of each edge of the group.
    """
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    every = list(dict.fromkeys(name for edge in edges for name in edge["options"]))
    colours = colours_of(every)
    dash = {name: DASHES[number // len(PALETTE) % len(DASHES)] for number, name in enumerate(every)}
    columns = min(_COLUMNS, len(edges))
    rows = -(-len(edges) // columns)
    layout = plain_layout(64 + _ROW * rows, x="", y="")
    del layout["xaxis"], layout["yaxis"]
    layout["annotations"] = []
    layout["margin"].update({"l": 40, "t": 46, "b": 34})
    layout["legend"].update({"y": 1 + 26 / (_ROW * rows)})
    data = []
    seen: set[str] = set()
    for number, edge in enumerate(edges):
        row, column = divmod(number, columns)
        left, top = column / columns, 1 - row / rows
        right, bottom = left + 0.86 / columns, top - 0.72 / rows
        suffix = "" if number == 0 else str(number + 1)
        values = [epoch["probabilities"][group][number] for epoch in epochs]
        for option, name in enumerate(edge["options"]):
            trace = line(numbers, [value[option] for value in values], name, colours[name], 1.8)
            trace["line"]["dash"] = dash[name]
            hover = f"{edge['name']}, epoch %{{x}}: %{{y:.3f}} {name}<extra></extra>"
            if len(epochs) == 1:
                trace["mode"] = "markers"
            data.append(
                {
                    **trace,
                    "xaxis": f"x{suffix}",
                    "yaxis": f"y{suffix}",
                    "legendgroup": name,
                    "showlegend": name not in seen,
                    "hovertemplate": hover,
                }
            )
            seen.add(name)
        highest = max(max(value[: len(edge["options"])]) for value in values)
        layout[f"xaxis{suffix}"] = {**axis(""), "domain": [left, right], "anchor": f"y{suffix}", "nticks": 4}
        layout[f"yaxis{suffix}"] = {
            **axis(""),
            "domain": [bottom, top - 0.1 / rows],
            "anchor": f"x{suffix}",
            "range": [0, 1.08 * highest],
            "nticks": 4,
        }
        layout["annotations"].append(
            {
                "text": edge["name"],
                "x": left,
                "y": top - 0.09 / rows,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "font": {"size": 12, "color": "var(--ink)"},
            }
        )
    return {"data": data, "layout": layout}


def entropy_and_cost(epochs: Epochs) -> Figure:
    """Return the mean entropy of the choices above their expected and their selected MACs, over epochs.

    Args:
        epochs: Figures of the search's epochs, with ``entropy``, ``expected_macs`` and ``macs``.
    """
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    data = []
    for number, group in enumerate(epochs[0]["entropy"]):
        values = [epoch["entropy"][group] for epoch in epochs]
        trace = line(numbers, values, f"entropy, {group}", PALETTE[number % len(PALETTE)], 2.2)
        data.append({**trace, "hovertemplate": f"epoch %{{x}}: %{{y:.3f}} nats, {group}<extra></extra>"})
    kinds = (
        ("expected_macs", "expected MACs of the search network", "solid"),
        ("macs", "MACs of the selection", "dash"),
    )
    for key, name, dash in kinds:
        if all(key in epoch for epoch in epochs):
            trace = line(numbers, [epoch[key] / 1e6 for epoch in epochs], name, "var(--ink)", 2)
            trace["line"]["dash"] = dash
            data.append({**trace, "yaxis": "y2", "hovertemplate": f"epoch %{{x}}: %{{y:.4g}} M, {name}<extra></extra>"})
    layout = plain_layout(380, x="epoch", y="entropy in nats")
    layout["yaxis"].update({"domain": [0.56, 1.0], "rangemode": "tozero"})
    layout["yaxis2"] = {**axis("million MACs"), "domain": [0.0, 0.44], "anchor": "x", "rangemode": "tozero"}
    layout["xaxis"]["anchor"] = "y2"
    return {"data": data, "layout": layout}
