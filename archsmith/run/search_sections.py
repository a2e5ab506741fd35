"""The sections of the report that a search among the children of a supernet has.

The one training, the selection, what predictors knew, and where the exported networks spend their time.
Everything is read from the figures of the epochs and from ``result.json``.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from archsmith.run import set_charts
from archsmith.run.page import Html, bar, chart, element, joined, section, table

Epochs = Sequence[Mapping[str, Any]]
Outcome = Mapping[str, Any]

NAMED = {"valid_accuracy": ("accuracy", "%", 100.0), "latency": ("latency", "ms", 1.0), "size": ("size", "bytes", 1.0)}
"""What predictors predict: words, unit and factor."""

ALLOWED_ERROR = 0.1
"""Median relative error of a latency predictor that is allowed, or 1.5 times the repeat error where that is more."""


def sections_of_search(epochs: Epochs, result: Mapping[str, Any], run: str) -> list[Html]:
    """Return the sections, those without content left out.

    Args:
        epochs: Figures of the epochs: of the training, then of every part of the selection.
        result: Content of ``result.json``.
        run: Folder of the run, as typed.
    """
    return [_training(epochs), _selection(epochs, result, run), _predictors(epochs), _layers(result["outcomes"])]


def genotypes(decisions: Mapping[str, Mapping[str, Any]], title: str) -> Html:
    """Return the decisions of delivered networks: a row for each part (stage, block), a column for each kind.

    Args:
        decisions: Decisions by path, by the network's label; the first is shown, the others can be opened.
        title: Of the section.
    """
    (label, first), *others = decisions.items()
    more = [
        element("details", element("summary", f"{name}"), _genotype(each)) for name, each in others if len(others) <= 24
    ]
    lead = f"Every decision of {label}: the rows are parts of the network in their order."
    return section("network", title, _genotype(first), *more, lead=lead)


def _genotype(decisions: Mapping[str, Any]) -> Html:
    rows: dict[str, dict[str, Any]] = {}
    for path, value in decisions.items():
        part, _, kind = path.rpartition("/")
        rows.setdefault(part or "whole network", {})[kind] = value
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    return table(("part", *kinds), [(part, *(row.get(kind, "") for kind in kinds)) for part, row in rows.items()])


def _training(epochs: Epochs) -> Html:
    training = [epoch for epoch in epochs if "smallest_accuracy" in epoch]
    if not training:
        return Html()
    last = training[-1]
    lead = (
        f"{len(training)} epochs trained all children at once. At their end the smallest child has "
        f"{100 * last['smallest_accuracy']:.1f} % and the largest {100 * last['largest_accuracy']:.1f} % on validation "
        "images, with the same weights and statistics of their own."
    )
    drawn = chart("chart-training", set_charts.training(training), "Accuracy of both ends over the training")
    return section("training", "The one training", drawn, lead=lead)


def _selection(epochs: Epochs, result: Mapping[str, Any], run: str) -> Html:
    selected = [epoch for epoch in epochs if "evaluated" in epoch]
    if not selected:
        return Html()
    outcomes = result["outcomes"]
    axis = selected[-1].get("axis", "macs")
    title = set_charts.AXES[axis][0]
    points = [point for epoch in selected for point in epoch["evaluated"]]
    delivered = [(each["label"], _cost(each, axis), _accuracy(each)) for each in outcomes]
    reference = result["reference"]
    drawn: Html | str = ""
    if points:
        most = max([cost for cost, _ in points] + [cost for _, cost, _ in delivered])
        figure = set_charts.selection(
            {epoch["phase"]: epoch["evaluated"] for epoch in selected},
            selected[-1]["front"],
            delivered,
            largest=reference[axis] if axis in ("macs", "params") else most,
            limit=result["limits"].get(axis),
            axis=axis,
            intervals=[each["costs"]["latency"]["interval_ms"] for each in outcomes] if axis == "latency" else (),
        )
        drawn = chart("chart-pareto", figure, f"Validation accuracy against {title} of every child that was evaluated")
    phases = [
        (
            epoch["phase"],
            len(epoch["evaluated"]),
            len(epoch.get("refused", [])),
            f"{100 * max((accuracy for _, accuracy in epoch['evaluated']), default=0):.2f}",
        )
        for epoch in selected
    ]
    commands = (
        element("p", "Every point of the measured set can be exported, also those without files yet:"),
        element("pre", shlex.join(["archsmith", "export", run, "--point", "all"])),
    )
    quantised = any("further" in each for each in outcomes)
    lead = (
        "Every candidate as a quantised file, run by ONNX Runtime on validation images."
        if quantised
        else "Every child that the selection evaluated with the shared weights, on validation images."
    )
    lead += (
        " The best of many was chosen on these images, so its accuracy is optimistic there; that on test images is not."
    )
    if axis == "latency":
        lead += f" Latency was measured on each network taken out by itself: {_where(outcomes[0])}."
    head = f"Accuracy against {'latency' if axis == 'latency' else 'size' if axis == 'size' else 'MACs'}"
    content = [
        drawn,
        table(("part of the selection", "evaluated", "refused: over a limit", "best validation in %"), phases),
        element("h3", "The networks that were delivered"),
        _quantised(outcomes) if quantised else _delivered(outcomes),
        *commands,
    ]
    return section("pareto", head, *content, lead=lead)


def _cost(outcome: Outcome, axis: str) -> float:
    """Return a cost of a delivered network, as its chart has it."""
    if axis == "latency":
        return float(outcome["costs"]["latency"]["median_ms"])
    if axis == "size":
        return float(outcome["further"]["costs"]["size_bytes"])
    return float(outcome["costs"][axis])


def _accuracy(outcome: Outcome) -> float:
    """Return the validation accuracy of a delivered network as it runs."""
    for place in ("further", "deployed"):
        if "valid_accuracy" in outcome.get(place, {}).get("metrics", {}):
            return float(outcome[place]["metrics"]["valid_accuracy"])
    return float(outcome["metrics"]["valid_accuracy"])


def _where(outcome: Outcome) -> str:
    """Return where a latency was measured, in words."""
    where = outcome["costs"]["latency"]["provenance"]
    version = f"onnxruntime {where['onnxruntime']}" if where["onnxruntime"] else f"torch {where['torch']}"
    device = where["cpu"] if where["device"] == "cpu" else where["device"]
    return f"{version} on {device}, {_precision(where['precision'])}, {where['threads']} thread, batch 1"


def _precision(text: str) -> str:
    return "fp32" if text == "as stored" else text.removeprefix("as stored: ")


def _interval(latency: Mapping[str, Any]) -> str:
    low, high = latency["interval_ms"]
    return f"{low:.3g} to {high:.3g}" + (" (noisy)" if latency["noisy"] else "")


def _delivered(outcomes: Sequence[Outcome]) -> Html:
    split = "test" if "test_accuracy" in outcomes[0]["metrics"] else "valid"
    narrow = any("metrics" in each.get("deployed", {}) for each in outcomes)
    rows = [
        (
            each["label"],
            f"{100 * each['metrics'][f'{split}_accuracy']:.2f}",
            f"{100 * each['metrics']['valid_accuracy']:.2f}",
            *((f"{100 * _accuracy(each):.2f}",) if narrow else ()),
            f"{each['costs']['macs']:,}",
            f"{each['costs']['params']:,}",
            f"{each['costs']['latency']['median_ms']:.3g}",
            _interval(each["costs"]["latency"]),
        )
        for each in outcomes
    ]
    as_it_runs = (f"as it runs ({outcomes[0]['deployed']['precision']})",) if narrow else ()
    columns = ("network", f"{split} accuracy in %", "validation in %", *as_it_runs, "MACs", "parameters")
    return table((*columns, "latency in ms", "95 % interval"), rows)


def _quantised(outcomes: Sequence[Outcome]) -> Html:
    rows = []
    for each in outcomes:
        if (one := each.get("further")) is None:
            continue
        narrow = sum(layer["precision"] == "int8" for layer in one["policy"].values())
        rows.append(
            (
                each["label"],
                f"{100 * one['metrics']['valid_accuracy']:.2f}",
                f"{one['costs']['size_bytes'] / 1e3:.1f}",
                f"{one['costs']['file_bytes'] / 1e3:.1f}",
                f"{narrow} of {len(one['policy'])}",
                f"{each['costs']['latency']['median_ms']:.3g}",
                _interval(each["costs"]["latency"]),
            )
        )
    columns = ("network", "validation in %", "size in kB", "file in kB", "int8 layers", "latency in ms")
    note = element("p", "Sizes are computed from the bits of every layer.")
    return joined(table((*columns, "95 % interval"), rows), note)


# ---------------------------------------------------------------------- what was predicted


def _predictors(epochs: Epochs) -> Html:
    pairs: dict[str, list[list[float]]] = {}
    for epoch in epochs:
        for name, found in epoch.get("predictions", {}).items():
            pairs.setdefault(name, []).extend(found)
    repeats = [pair for epoch in epochs for pair in epoch.get("repeats", [])]
    repeat = float(np.median([abs(second / first - 1) for first, second in repeats])) if repeats else None
    title = "How well the predictors knew"
    if not pairs:
        if repeat is None:
            return Html()
        text = f"Nothing was predicted: every latency was measured. {_repeated(repeat, len(repeats))}"
        return section("predictors", title, element("p", text))
    content: list[object] = []
    rows = []
    for name, found in pairs.items():
        words, unit, factor = NAMED.get(name, (name, "", 1.0))
        figure = set_charts.calibration(found, name=words, unit=unit, factor=factor)
        drawn = chart(f"chart-calibration-{words}", figure, f"Measured against predicted {words}")
        content += [element("h3", words.capitalize()), drawn]
        rows.append((words, len(found), *_errors(name, found, repeat)))
    columns = ("predicted", "networks", "median error", "allowed", "repeat error", "rank correlation")
    lead = "Every network was predicted before it was measured, by predictors that had learned from those before it."
    if repeat is not None:
        lead += f" {_repeated(repeat, len(repeats))}"
    return section("predictors", title, table(columns, rows), *content, lead=lead)


def _repeated(error: float, count: int) -> str:
    return f"Measured a second time, {count} networks differed by {100 * error:.1f} % in the median: the repeat error."


def _errors(name: str, pairs: Sequence[Sequence[float]], repeat: float | None) -> tuple[str, str, str, str]:
    """Return median error, what is allowed, the repeat error, and the rank correlation, as texts."""
    predicted, measured = np.array(pairs, dtype=np.float64).T
    ranks = "" if len(pairs) < 3 else f"{_rank_correlation(predicted, measured):.2f}"
    if name != "latency":
        factor = NAMED.get(name, (name, "", 1.0))[2]
        unit = "points" if name == "valid_accuracy" else NAMED.get(name, (name, "", 1.0))[1]
        return f"{factor * float(np.median(abs(predicted - measured))):.2f} {unit}", "", "0 (computed)", ranks
    error = float(np.median(abs(predicted / measured - 1)))
    allowed = max(ALLOWED_ERROR, 1.5 * (repeat or 0.0))
    verdict = "kept" if error <= allowed else "above"
    shown = "not measured" if repeat is None else f"{100 * repeat:.1f} %"
    return f"{100 * error:.1f} % ({verdict})", f"{100 * allowed:.0f} %", shown, ranks


def _rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    from scipy.stats import spearmanr

    if len(set(first.tolist())) < 2 or len(set(second.tolist())) < 2:
        return 0.0
    return float(spearmanr(first, second).statistic)


# ---------------------------------------------------------------------- where the time goes


def _layers(outcomes: Sequence[Outcome]) -> Html:
    found = [(each["label"], *_layers_of(each)) for each in outcomes if _layers_of(each)[1]]
    if not found:
        return Html()
    (label, file, first), *others = found
    more = [element("details", element("summary", f"{name}, {each}"), _times(rows)) for name, each, rows in others]
    lead = (
        f"{label}, {file}: sums over the kernels of ONNX Runtime's own profile, one image. Conversions are kernels "
        "that only change precision or layout."
    )
    return section("layer-times", "Latency per layer of the exported network", _times(first), *more, lead=lead)


def _layers_of(outcome: Outcome) -> tuple[str, Sequence[Mapping[str, Any]]]:
    """Return the file and the time of its layers."""
    if "layers" in outcome.get("further", {}):
        return str(outcome["deployed"]["file"]), outcome["further"]["layers"]
    deployed = outcome.get("deployed", {})
    return str(deployed.get("layers_of", "")), deployed.get("layers", [])


def _times(rows: Sequence[Mapping[str, Any]]) -> Html:
    total = sum(row["latency_ms"] for row in rows) or 1.0
    cells = [
        (
            row["layer"],
            bar(row["latency_ms"] / total),
            ", ".join(row["kernels"]),
            "int8" if row["integer"] else "fp32",
            f"{row['latency_ms']:.4f}",
            f"{row['latency_ms'] / total:.1%}",
        )
        for row in rows
    ]
    return table(("layer", "", "kernels", "products", "ms", "share"), cells, text_columns=4)
