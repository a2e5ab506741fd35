"""The charts of the report as Plotly figures in plain JSON values; colours are names of the page's style sheet."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.run.intervals import wilson
from archsmith.space.pareto import non_dominated

Figure = dict[str, Any]
Epochs = Sequence[Mapping[str, Any]]

_FIRST, _SECOND, _THIRD = "var(--k0)", "var(--k1)", "var(--k2)"


def over_time(epochs: Epochs, *, largest: float, limit: float | None) -> Figure:
    """Return accuracies above MACs, both over epochs, with every cut marked and the budget's limit.

    Args:
        epochs: Figures of the epochs.
        largest: MACs of the largest network.
        limit: Limit on the MACs, or None.
    """
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    data: list[dict[str, Any]] = []
    shown = [
        ("train_accuracy", "training batches", _SECOND, 1.5),
        ("valid_accuracy", "validation", _FIRST, 2.5),
    ]
    for key, name, colour, width in shown:
        if values := [_percent(epoch.get(key)) for epoch in epochs]:
            data.append(
                {
                    **line(numbers, values, name, colour, width),
                    "hovertemplate": f"epoch %{{x}}: %{{y:.2f}} % {name}<extra></extra>",
                }
            )
    share = [100 * epoch["macs"] / largest for epoch in epochs]
    data.append(
        {
            **line(numbers, share, "MACs", "var(--ink)", 2),
            "yaxis": "y2",
            "line": {"color": "var(--ink)", "width": 2, "shape": "hv"},
            "customdata": [f"{epoch['macs']:,}" for epoch in epochs],
            "hovertemplate": "epoch %{x}: %{customdata} MACs (%{y:.1f} %)<extra></extra>",
        }
    )
    for forced, name, symbol in ((False, "cut of dead atoms", "triangle-down"), (True, "cut by the budget", "x")):
        cut = [i for i, epoch in enumerate(epochs) if epoch.get("cut") and bool(epoch["cut"].get("forced")) == forced]
        if cut:
            data.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "name": name,
                    "yaxis": "y2",
                    "x": [numbers[i] for i in cut],
                    "y": [share[i] for i in cut],
                    "customdata": [epochs[i]["cut"]["removed"] for i in cut],
                    "hovertemplate": f"epoch %{{x}}: {name}, %{{customdata:,}} atoms<extra></extra>",
                    "marker": {"color": _THIRD, "size": 9, "symbol": symbol},
                }
            )
    layout = plain_layout(460, x="epoch", y="accuracy in %")
    layout["yaxis"].update({"domain": [0.47, 1.0], "range": _accuracy_range(epochs)})
    layout["yaxis2"] = {
        **axis("MACs in %"),
        "domain": [0.0, 0.38],
        "anchor": "x",
        "range": [0, 106],
    }
    layout["xaxis"]["anchor"] = "y2"
    layout["xaxis"]["range"] = [0.5, max(numbers) + 0.5]
    if limit is not None:
        level = 100 * limit / largest
        layout["shapes"] = [_rule(y0=level, y1=level, xref="paper", x0=0, x1=1, yref="y2")]
        layout["annotations"] = [_label("budget", x=0.004, y=level, xref="paper", yref="y2", xanchor="left")]
    return {"data": data, "layout": layout}


def alive_over_time(epochs: Epochs, *, before: Mapping[str, int]) -> Figure:
    """Return a map of the share of atoms alive: one row for each block and kernel, one column for each epoch.

    Args:
        epochs: Figures of the epochs with ``kernels``, atoms by group.
        before: Atoms of each group in the largest network.
    """
    rows = list(before)
    values = [[epoch["kernels"].get(row, 0) / before[row] * 100 for epoch in epochs] for row in rows]
    counts = [[f"{epoch['kernels'].get(row, 0):,} of {before[row]:,}" for epoch in epochs] for row in rows]
    figure = {
        "type": "heatmap",
        "x": [epoch["epoch"] + 1 for epoch in epochs],
        "y": [_group_title(row) for row in rows],
        "z": values,
        "text": counts,
        "hovertemplate": "%{y}, epoch %{x}: %{text} alive<extra></extra>",
        "zmin": 0,
        "zmax": 100,
        "xgap": 1,
        "ygap": 1,
        "colorscale": [[0, "rgba(120,130,150,0.10)"], [1, "var(--k0)"]],
        "colorbar": {"title": {"text": "% alive", "side": "right"}, "thickness": 12, "outlinewidth": 0},
    }
    layout = plain_layout(90 + 21 * len(rows), x="epoch", y="")
    layout["yaxis"].update({"autorange": "reversed", "showgrid": False, "tickfont": {"size": 12.5}, "dtick": 1})
    layout["xaxis"].update({"showgrid": False})
    layout["margin"].update({"l": 112, "t": 10})
    return {"data": [figure], "layout": layout}


def accuracy_against_macs(epochs: Epochs, *, largest: float, limit: float | None, final: tuple[float, float]) -> Figure:
    """Return every epoch's network as a point, the front of those that are not beaten, and the delivered one.

    Args:
        epochs: Figures of the epochs.
        largest: MACs of the largest network.
        limit: Limit on the MACs, or None.
        final: MACs and validation accuracy of the delivered network.
    """
    macs = [epoch["macs"] / 1e6 for epoch in epochs]
    accuracy = [_percent(epoch["valid_accuracy"]) for epoch in epochs]
    front = non_dominated(np.column_stack([macs, [-value for value in accuracy]]))
    order = sorted((i for i in range(len(epochs)) if front[i]), key=macs.__getitem__)
    hover = "epoch %{customdata}: %{y:.2f} % at %{x:.3g} M<extra></extra>"
    numbers = [epoch["epoch"] + 1 for epoch in epochs]
    data = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "end of an epoch",
            "x": macs,
            "y": accuracy,
            "customdata": numbers,
            "hovertemplate": hover,
            "marker": {"color": _FIRST, "size": 8, "opacity": 0.45},
        },
        {
            "type": "scatter",
            "mode": "lines+markers",
            "name": "not beaten by any other",
            "x": [macs[i] for i in order],
            "y": [accuracy[i] for i in order],
            "customdata": [numbers[i] for i in order],
            "hovertemplate": hover,
            "line": {"color": _SECOND, "width": 2, "shape": "hv"},
            "marker": {"color": _SECOND, "size": 9},
        },
        {
            "type": "scatter",
            "mode": "markers",
            "name": "delivered",
            "x": [final[0] / 1e6],
            "y": [_percent(final[1])],
            "hovertemplate": "delivered: %{y:.2f} % at %{x:.3g} M<extra></extra>",
            "marker": {"color": _THIRD, "size": 15, "symbol": "star"},
        },
    ]
    layout = plain_layout(360, x="million MACs", y="validation accuracy in %")
    layout["yaxis"]["range"] = _accuracy_range(epochs, "valid_accuracy")
    layout["xaxis"]["range"] = [0, 1.05 * largest / 1e6]
    if limit is not None:
        level = limit / 1e6
        layout["shapes"] = [_rule(x0=level, x1=level, yref="paper", y0=0, y1=1)]
        layout["annotations"] = [_label("budget", x=level, y=0.01, yref="paper", xanchor="right")]
    return {"data": data, "layout": layout}


def comparison(rows: Sequence[tuple[str, str, float, int]]) -> Figure:
    """Return the accuracies of several networks as dots with 95 % intervals, one row each, in the order given.

    Args:
        rows: Label, kind ("searched", "uniform" or "random"), accuracy in [0, 1] and examples it was counted on.
    """
    colours = {"searched": _THIRD, "uniform": _SECOND, "random": _FIRST}
    data = []
    for kind in ("searched", "uniform", "random"):
        own = [row for row in rows if row[1] == kind]
        bounds = [wilson(accuracy, examples) for _, _, accuracy, examples in own]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": kind,
                "showlegend": False,
                "x": [_percent(row[2]) for row in own],
                "y": [row[0] for row in own],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_percent(high - row[2]) for row, (_, high) in zip(own, bounds, strict=True)],
                    "arrayminus": [_percent(row[2] - low) for row, (low, _) in zip(own, bounds, strict=True)],
                    "color": colours[kind],
                    "thickness": 1.6,
                    "width": 5,
                },
                "marker": {"color": colours[kind], "size": 13 if kind == "searched" else 10},
                "hovertemplate": "%{y}: %{x:.2f} %<extra></extra>",
            }
        )
    layout = plain_layout(
        86 + 34 * len(rows), x="accuracy in %, with 95 % intervals for the choice of test images", y=""
    )
    labels = [row[0] for row in rows]
    layout["yaxis"].update(
        {"categoryorder": "array", "categoryarray": labels, "range": [len(rows) - 0.5, -0.5], "tickfont": {"size": 14}}
    )
    layout["margin"].update({"l": 112, "t": 10})
    return {"data": data, "layout": layout}


def anytime_curves(arena: Mapping[str, Any]) -> Figure:
    """Return what each strategy of a bench would have returned after so many evaluations: means with 95 % bands.

    Args:
        arena: An arena of a bench's results, with ``contenders`` that have ``anytime`` rows of evaluations, mean and
            interval, ``best_of_table`` and ``random_architectures``.
    """
    data: list[dict[str, Any]] = []
    values: list[float] = []
    names = sorted(row["contender"] for row in arena["contenders"] if row["contender"] != "random")
    for row in arena["contenders"]:  # the same strategy has the same colour in every arena
        points = [point for point in row["anytime"] if point[1] is not None]
        steps, means, lows, highs = ([point[i] for point in points] for i in range(4))
        values += [*lows[len(lows) // 4 :], *highs]
        number = names.index(row["contender"]) if row["contender"] in names else 0
        colour, dash = f"var(--k{number % 5})", ("solid", "dash", "dot", "dashdot")[number // 5 % 4]
        if row["contender"] == "random":
            colour, dash = "var(--ink)", "dash"
        band = {
            "type": "scatter",
            "mode": "lines",
            "x": [*steps, *reversed(steps)],
            "y": [*highs, *reversed(lows)],
            "fill": "toself",
            "fillcolor": colour,
            "opacity": 0.10,
            "line": {"width": 0},
            "hoverinfo": "skip",
            "showlegend": False,
            "legendgroup": row["contender"],
        }
        curve = line(steps, means, row["contender"], colour, 2)
        curve["line"]["dash"] = dash
        hover = "%{x} evaluations: %{y:.2f}"
        data += [
            band,
            {**curve, "legendgroup": row["contender"], "hovertemplate": f"{row['contender']}, {hover}<extra></extra>"},
        ]
    layout = plain_layout(440, x="evaluations", y="judged figure")
    layout["xaxis"]["type"] = "log"
    best = arena["best_of_table"]
    low = min(values)
    layout["yaxis"]["range"] = [low - 0.05 * (best - low), best + 0.08 * (best - low)]
    layout["shapes"] = [_rule(y0=best, y1=best, xref="paper", x0=0, x1=1)]
    layout["annotations"] = [_label("best of the table", x=0.004, y=best, xref="paper", xanchor="left")]
    layout["legend"] = {"orientation": "h", "x": 0, "y": -0.18, "yanchor": "top", "font": {"size": 13}}
    layout["margin"].update({"t": 16, "b": 120})
    return {"data": data, "layout": layout}


def every_network(table: Mapping[str, Any]) -> Figure:
    """Return one dot for each trained network of a comparison of methods: searched, random, uniformly scaled.

    Args:
        table: A task's table of ``archsmith.run.bench_training``.
    """
    data = []
    kinds = (("searched", _FIRST, "circle"), ("random", _SECOND, "x"), ("uniform", _THIRD, "diamond"))
    for kind, colour, symbol in kinds:
        x, y = [], []
        for row in table["methods"]:
            values = row["each"] if kind == "searched" else row[kind]["each"]
            x += [row["method"]] * len(values)
            y += values
        marker = {"color": colour, "size": 10, "symbol": symbol}
        name = {"searched": "searched", "random": "random", "uniform": "uniformly scaled"}[kind]
        data.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": name,
                "x": x,
                "y": y,
                "marker": marker,
                "hovertemplate": f"{name}: %{{y:.2f}} %<extra></extra>",
            }
        )
    layout = plain_layout(360, x="", y="test accuracy in %")
    return {"data": data, "layout": layout}


def line(x: Sequence[float], y: Sequence[float | None], name: str, colour: str, width: float) -> dict[str, Any]:
    """Return a trace."""
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": {"color": colour, "width": width}}


def axis(title: str) -> dict[str, Any]:
    """Return an axis of the page's style."""
    return {
        "title": {"text": title, "font": {"size": 13}, "standoff": 10},
        "gridcolor": "var(--grid)",
        "linecolor": "var(--line)",
        "zeroline": False,
        "automargin": True,
        "tickfont": {"size": 13},
    }


def plain_layout(height: int, *, x: str, y: str) -> dict[str, Any]:
    """Return the layout of a chart of this height, with the titles of its axes."""
    return {
        "height": height,
        "margin": {"l": 62, "r": 16, "t": 44, "b": 48},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"color": "var(--soft)", "size": 13, "family": "system-ui, sans-serif"},
        "hoverlabel": {"font": {"size": 13}},
        "legend": {"orientation": "h", "x": 0, "y": 1.0, "yanchor": "bottom", "font": {"size": 13}},
        "xaxis": axis(x),
        "yaxis": axis(y),
    }


def _rule(**place: Any) -> dict[str, Any]:
    return {"type": "line", "line": {"color": _THIRD, "width": 1.5, "dash": "dash"}, **place}


def _label(text: str, **place: Any) -> dict[str, Any]:
    font = {"color": _THIRD, "size": 13}
    return {"text": text, "showarrow": False, "yanchor": "bottom", "font": font, **place}


def _percent(share: float | None) -> Any:
    return None if share is None else 100 * share


def _accuracy_range(epochs: Epochs, *keys: str) -> list[float]:
    """Return a range that shows the later epochs well; the first ones lie below it when they would crush the rest."""
    names = keys or ("train_accuracy", "valid_accuracy")
    values = [100 * epoch[name] for epoch in epochs for name in names if epoch.get(name) is not None]
    later = [100 * epoch[name] for epoch in epochs[len(epochs) // 8 :] for name in names if epoch.get(name) is not None]
    low, high = min(later), max(values)
    if low - min(values) < (high - low) / 3:
        low = min(values)
    room = max(1.0, 0.12 * (high - low))
    return [max(-1.0, low - room), min(100.4, high + room)]


def _group_title(name: str) -> str:
    """Return "block 1 · 3x3" for the atom group ``blocks.1.branches.k3``, other names as they are."""
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blocks" and parts[3].startswith("k"):
        kernel = parts[3].removeprefix("k")
        return f"block {parts[1]} · {kernel}×{kernel}"
    return name
