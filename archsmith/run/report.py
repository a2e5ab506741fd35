"""``report.html``: everything about a run on one page that needs no network and no archsmith.

The page is derived from the run's folder alone and can be written again at any time. Every number on it is in
``result.json``, in the journal, or counted again from the delivered network.
"""

from __future__ import annotations

import math
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from archsmith.config import FORMAT_VERSION
from archsmith.core.files import read_json, write_atomic
from archsmith.cost import LayerProfile, count, profile
from archsmith.run import charts
from archsmith.run.baselines import Baseline, read_baselines
from archsmith.run.cell_picture import cell_picture, chain_picture
from archsmith.run.choice_charts import colours_of, entropy_and_cost, probabilities_over_time
from archsmith.run.constructor import parse_call
from archsmith.run.diagnose import diagnose
from archsmith.run.directory import Run
from archsmith.run.intervals import mean_interval, wilson
from archsmith.run.own_finish import is_own
from archsmith.run.page import Html, bar, chart, document, element, joined, section, table
from archsmith.run.picture import network_picture, widths_of
from archsmith.run.progress import format_count, format_seconds
from archsmith.run.rebuild import rebuild_network
from archsmith.run.search_sections import genotypes, sections_of_search

RECORDED = {"macs": "macs", "params": "params", "memory": "memory_bytes"}
"""Name of a limit to name of an exact cost among the recorded ones."""


@dataclass(frozen=True)
class Facts:
    """What the page is made from.

    Attributes:
        run: Folder of the run, as typed.
        config: Its configuration.
        result: Content of ``result.json``.
        epochs: Figures of the epochs.
        events: The whole journal.
        architecture: Content of ``architecture.json``.
        layers: Costs of the delivered network layer by layer; latencies only where they were measured.
        baselines: Finished baselines.
        decisions: Decisions by path of every delivered network, by its label.
    """

    run: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    epochs: Sequence[Mapping[str, Any]]
    events: Sequence[Mapping[str, Any]]
    architecture: Mapping[str, Any]
    layers: Sequence[LayerProfile]
    baselines: Sequence[Baseline]
    decisions: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def searched(self) -> bool:
        """Whether this was a search among the children of a supernet that finished an epoch."""
        return any("evaluated" in epoch or "smallest_accuracy" in epoch for epoch in self.epochs)

    @property
    def best(self) -> Mapping[str, Any]:
        """The delivered network's outcome."""
        outcome: Mapping[str, Any] = self.result["outcomes"][0]
        return outcome


def write_report(run: Run, *, timed: bool = False) -> Path:
    """Write ``report.html`` into the folder of a run that has a result, and return its path.

    Args:
        run: The open run.
        timed: Measure the latency of every layer too; takes seconds.

    Raises:
        ImportError: Plotly is not installed.
        UserError: The delivered network's files are not those of the run.
    """
    from plotly.offline import get_plotlyjs

    result = run.result()
    assert result is not None
    folder = run.path / result["outcomes"][0]["folder"]
    architecture = read_json(folder / "architecture.json")
    facts = Facts(
        run=str(run.path),
        config=run.config,
        result=result,
        epochs=run.history(),
        events=run.events(),
        architecture=architecture,
        layers=_recorded_layers(result)
        if is_own(run.config)  # its classes are the user's: nothing is built to write a page
        else _layers(architecture, folder / "weights.safetensors", timed=timed),
        baselines=read_baselines(run.path),
        decisions={} if is_own(run.config) else _decisions(run.path, result),
    )
    path = run.path / "report.html"
    write_atomic(path, render(facts, plotly=get_plotlyjs()))
    return path


def render(facts: Facts, *, plotly: str) -> str:
    """Return the page; ``plotly`` is the source of plotly.js, which becomes part of it."""
    title = f"{facts.result['method']} on {facts.result['task']}"
    body = joined(
        _header(facts, title),
        _cards(facts),
        _diagnosis(facts),
        _network(facts),
        _choices(facts),
        _over_time(facts),
        _pareto(facts),
        *(sections_of_search(facts.epochs, facts.result, facts.run) if facts.searched else ()),
        _comparison(facts),
        _costs(facts),
        _test_reads(facts),
        _reproduce(facts),
        element("footer", "Written by archsmith. This page loads nothing from anywhere."),
    )
    return document(f"{title} · archsmith", body, plotly=plotly)


def _layers(architecture: Mapping[str, Any], weights: Path, *, timed: bool) -> tuple[LayerProfile, ...]:
    """Return the costs of the delivered network, rebuilt from its files."""
    network = rebuild_network(parse_call(architecture["class"], architecture["arguments"]), weights)
    example = torch.zeros(1, *architecture["input"]["shape"])
    if timed:
        return profile(network, example).layers
    rows = count(network, example).layers
    return tuple(LayerProfile(row.name, row.kind, row.params, row.macs, row.output_shape, None) for row in rows)


def _decisions(path: Path, result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Return the decisions of every delivered network that has some, by label."""
    found = {}
    for outcome in result["outcomes"]:
        file = path / outcome["folder"] / "architecture.json"
        if file.exists() and (decisions := read_json(file).get("decisions")):
            found[outcome["label"]] = decisions
    return found


def _recorded_layers(result: Mapping[str, Any]) -> tuple[LayerProfile, ...]:
    """Return the costs of a network of the user's own as they were counted when the run ended."""
    return tuple(
        LayerProfile(row["name"], row["kind"], row["params"], row["macs"], _shape(row["output_shape"]), None)
        for row in result["layers"]
    )


def _shape(sizes: Sequence[int] | None) -> tuple[int, ...] | None:
    return None if sizes is None else tuple(sizes)


def _header(facts: Facts, title: str) -> Html:
    started = facts.events[0]["time"].replace("T", " ").replace("Z", " UTC") if facts.events else ""
    stopped = "" if facts.result["status"] == "finished" else ", stopped early"
    details = (
        f"{facts.run} · family {facts.result['family']} · seed {facts.result['seed']} · started {started}{stopped}"
    )
    return element("header", element("h1", title), element("p", details))


# ---------------------------------------------------------------------- the numbers


def _cards(facts: Facts) -> Html:
    metrics, costs, reference = facts.best["metrics"], facts.best["costs"], facts.result["reference"]
    latency = costs["latency"]
    where = latency["provenance"]
    cards = [
        _accuracy_card(facts, split, metrics[f"{split}_accuracy"])
        for split in ("test", "valid")
        if f"{split}_accuracy" in metrics
    ]
    cards += [
        _card("MACs", format_count(costs["macs"]), _share_of_largest(costs["macs"], reference["macs"])),
        _card("Parameters", format_count(costs["params"]), _share_of_largest(costs["params"], reference["params"])),
        _card(
            "Memory",
            _bytes(costs["memory_bytes"]),
            f"{costs['memory_bytes']:,} bytes, weights and peak activations at batch 1",
        ),
        _card(
            "Latency",
            f"{latency['median_ms']:.3g} ms",
            joined(
                element("span", "too noisy to claim", class_="badge warning") if latency["noisy"] else "",
                f" IQR {latency['iqr_ms']:.2g} ms, 95 % interval {latency['interval_ms'][0]:.3g} to "
                f"{latency['interval_ms'][1]:.3g}; {where['backend']}, {where['precision']}, "
                f"{where['threads']} thread, {where['cpu']}",
            ),
        ),
        _budget_card(facts),
        _card(
            "Time",
            format_seconds(facts.result["seconds"]),
            f"{len(facts.epochs)} epochs, {'cuts' if is_own(facts.config) else 'search'} and training in one",
        ),
    ]
    return element("section", *cards, class_="cards", id="summary")


def _card(name: str, value: object, detail: object) -> Html:
    parts = (("name", name), ("value", value), ("detail", detail))
    return element("div", *(element("div", content, class_=kind) for kind, content in parts), class_="card")


def _accuracy_card(facts: Facts, split: str, accuracy: float) -> Html:
    examples = facts.result.get("examples", {}).get(split)
    detail: object = "no interval: the number of images was not recorded"
    if examples:
        low, high = wilson(accuracy, examples)
        detail = f"95 % interval {100 * low:.1f} to {100 * high:.1f} %, {examples:,} images"
    return _card("Test accuracy" if split == "test" else "Validation accuracy", f"{100 * accuracy:.2f} %", detail)


def _share_of_largest(cost: int, largest: int) -> str:
    return f"{cost:,}, {cost / largest:.1%} of the largest network's {largest:,}"


def _bytes(count: int) -> str:
    text = format_count(count)
    return f"{text[:-1]} {text[-1]}B" if text[-1].isalpha() else f"{text} bytes"


def _budget_card(facts: Facts) -> Html:
    if not facts.result["budget"]:
        return _card("Budget", "none", "no cost was limited" if facts.searched else "the penalty alone decided")
    rows = []
    kept = True
    for name, limit in facts.result["limits"].items():
        cost = facts.best["costs"]["latency"]["median_ms"] if name == "latency" else facts.best["costs"][RECORDED[name]]
        kept = kept and cost <= limit
        most = math.floor(limit) if isinstance(cost, int) else limit  # 0.4x of a count is seldom whole
        rows.append(f"{name} {cost:,.10g} of {most:,.10g} allowed")
    verdict = element("span", "kept" if kept else "broken", class_=f"badge {'good' if kept else 'warning'}")
    return _card("Budget", facts.result["budget"], joined(verdict, " ", "; ".join(rows)))


def _diagnosis(facts: Facts) -> Html:
    found = diagnose(facts.epochs, facts.result, facts.config, run=facts.run)
    if not found:
        good = element(
            "p", element("span", "nothing found", class_="badge good"), " No check of the run raised a doubt."
        )
        return section("diagnosis", "Diagnosis", good)
    return section(
        "diagnosis",
        "Diagnosis",
        *(
            element(
                "div",
                element("span", finding.level, class_=f"badge {finding.level}"),
                " ",
                element("b", finding.title),
                element("p", finding.text),
                element("pre", finding.next_command),
                class_=f"finding {finding.level}",
            )
            for finding in found
        ),
        lead="What to doubt about this run, each with the next command to try.",
    )


# ---------------------------------------------------------------------- the network and its training


def _network(facts: Facts) -> Html:
    title = "The network that was found"
    widths = widths_of(facts.architecture)
    if not widths and facts.result.get("widths"):
        return _own_network(facts, title)
    if not widths and any("chosen" in epoch for epoch in facts.epochs):
        return Html()  # its choices have a section of their own
    if not widths and facts.decisions:
        return genotypes(facts.decisions, title)
    if not widths:
        return section("network", title, element("p", "This network has no searched widths to show."))
    about = {}
    total = facts.best["costs"]["macs"]
    for name, rows in _by_block(facts.layers).items():
        shape = next((row.output_shape for row in reversed(rows) if row.output_shape), None)
        size = f"{shape[1]} channels, {'×'.join(map(str, shape[2:]))}" if shape and len(shape) == 4 else ""
        about[name] = [size, f"{sum(row.macs for row in rows) / total:.1%} of the MACs"]
    left, before = (sum(pair[i] for lanes in widths.values() for pair in lanes.values()) for i in (0, 1))
    lead = (
        f"{left:,} of {before:,} atoms (hidden channels with a kernel size of their own) are left. A lane is as long "
        "as its branch was in the largest network, and filled as far as it is alive."
    )
    return section("network", title, network_picture(widths, about), lead=lead)


def _choices(facts: Facts) -> Html:
    """Return the derived cells and how their logits came there; nothing for methods without logits."""
    searching = [epoch for epoch in facts.epochs if "probabilities" in epoch and "chosen" in epoch]
    if not searching or "edges" not in searching[0]:
        return Html()
    edges, chosen = searching[0]["edges"], searching[-1]["chosen"]
    content = []
    for group, of_group in edges.items():
        colours = colours_of(list(dict.fromkeys(name for edge in of_group for name in edge["options"])))
        arcs = [(*label.split(" to ", 1), name) for label, name in chosen[group] if " to " in label]
        taken = [arc for arc in arcs if arc[2] != "none"]
        picture = cell_picture(taken, colours) if taken else chain_picture([(a, b) for a, b in chosen[group]], colours)
        content += [element("h3", f"Selected: {group}"), picture]
    content += [
        element("h3", "How undecided the choices are, and what they cost"),
        chart("chart-entropy", entropy_and_cost(searching), "Entropy of the choices and MACs over the search"),
    ]
    for number, (group, of_group) in enumerate(edges.items()):
        figure = probabilities_over_time(searching, group, of_group)
        content += [
            element("h3", f"Weight of every operation, edge by edge: {group}"),
            chart(f"chart-edges-{number}", figure, f"Mixing weights of the edges of {group} over the search"),
        ]
    figures = facts.result.get("figures", {})
    gap = ""
    if "supernet_accuracy" in figures:
        gap = (
            f" The search network had {100 * figures['supernet_accuracy']:.2f} % on validation images with all "
            f"operations mixed, and {100 * figures['selected_path_accuracy']:.2f} % along the selection alone, "
            "with the same weights."
        )
    lead = f"What the search made of every choice in {len(searching)} epochs.{gap}"
    return section("choices", "The choices", *content, lead=lead)


def _own_network(facts: Facts, title: str) -> Html:
    """Return what is left of a network of the user's own, tensor by tensor, and what the cut did to its accuracy."""
    rows = []
    for name, (before, after) in facts.result["widths"].items():
        if len(before) > 1:
            share = math.prod(after) / max(1, math.prod(before))
            rows.append((name, bar(share), "×".join(map(str, before)), "×".join(map(str, after)), f"{share:.0%}"))
    steps = (
        ("before", "accuracy_before"),
        ("after the cut", "accuracy_after_cut"),
        ("after training on", "accuracy_final"),
    )
    figures = facts.result["figures"]
    accuracies = [(label, f"{100 * figures[key]:.2f} %") for label, key in steps if key in figures]
    lead = f"Made by {facts.result['target']}; record.json says which positions of its tensors were kept."
    return section(
        "network",
        title,
        table(("validation accuracy", ""), accuracies, text_columns=1),
        table(("weight", "", "before", "after", "left"), rows, text_columns=2),
        lead=lead,
    )


def _over_time(facts: Facts) -> Html:
    title = "Accuracy and MACs over time"
    if facts.searched:
        return Html()
    if not facts.epochs or "macs" not in facts.epochs[0]:
        return section("training", title, element("p", "No epoch was finished."))
    largest = facts.result["reference"]["macs"]
    figure = charts.over_time(facts.epochs, largest=largest, limit=facts.result["limits"].get("macs"))
    cuts = [epoch["cut"] for epoch in facts.epochs if epoch.get("cut")]
    removed = sum(cut["removed"] for cut in cuts)
    content = [chart("chart-training", figure, "Accuracy and MACs after every epoch")]
    before = {
        f"{block}.branches.{branch}": pair[1]
        for block, lanes in widths_of(facts.architecture).items()
        for branch, pair in lanes.items()
    }
    if before and before.keys() >= facts.epochs[0].get("kernels", {"": 0}).keys():
        alive = charts.alive_over_time(facts.epochs, before=before)
        content += [
            element("h3", "Atoms alive per block and kernel size"),
            chart("chart-alive", alive, "Share of atoms alive in every branch after every epoch"),
        ]
    what = "weights" if is_own(facts.config) else "averaged weights"
    lead = f"Validation of the {what} after every epoch. {len(cuts)} cuts removed {removed:,} atoms."
    return section("training", title, *content, lead=lead)


def _pareto(facts: Facts) -> Html:
    title = "Accuracy against MACs"
    if not facts.epochs or "macs" not in facts.epochs[0]:
        return section("pareto", title, element("p", "No epoch was finished."))
    if any("evaluated" in epoch for epoch in facts.epochs):
        return Html()  # a search in a supernet has sections of its own
    final = (facts.best["costs"]["macs"], facts.best["metrics"]["valid_accuracy"])
    figure = charts.accuracy_against_macs(
        facts.epochs,
        largest=facts.result["reference"]["macs"],
        limit=facts.result["limits"].get("macs"),
        final=final,
    )
    lead = (
        "The network at the end of every epoch, on validation images. Networks of early epochs were trained less, so "
        "the front shows what this run passed through, not the best that each size could reach."
    )
    return section("pareto", title, chart("chart-pareto", figure, "Validation accuracy against MACs"), lead=lead)


# ---------------------------------------------------------------------- the comparison


def _comparison(facts: Facts) -> Html:
    title = "Against random and uniformly scaled networks"
    if is_own(facts.config):
        text = "A run on a network of your own has none: compare with another --score, --score random above all."
        return section("baselines", title, element("p", text))
    if not facts.baselines:
        command = shlex.join(["archsmith", "report", facts.run, "--baselines", "4"])
        return section(
            "baselines",
            title,
            element("p", "Not trained yet. Without them nothing says that the search was worth it:"),
            element("pre", command),
        )
    split = "test" if "test_accuracy" in facts.best["metrics"] else "valid"
    key = f"{split}_accuracy"
    rows = [("searched", "searched", facts.result)]
    rows += [(b.name.replace("-", " "), b.name.partition("-")[0], b.result) for b in facts.baselines]
    dots, lines = [], []
    for label, kind, result in rows:
        outcome = result["outcomes"][0]
        accuracy, examples = outcome["metrics"][key], result.get("examples", {}).get(split)
        text = "not recorded"
        if examples:
            low, high = wilson(accuracy, examples)
            text = f"{100 * low:.2f} to {100 * high:.2f}"
            dots.append((label, kind, accuracy, examples))
        costs = outcome["costs"]
        latency = f"{costs['latency']['median_ms']:.3g}"
        cells = (label, f"{100 * accuracy:.2f}", text, f"{100 * outcome['metrics']['valid_accuracy']:.2f}")
        lines.append((*cells, f"{costs['macs']:,}", f"{costs['params']:,}", latency, format_seconds(result["seconds"])))
    columns = (
        "network",
        f"{split} %",
        "95 % interval",
        "valid %",
        "MACs",
        "params",
        "latency ms",
        "training",
    )
    content: list[object] = [element("p", _verdict(facts, key))]
    if dots:
        figure = charts.comparison(dots)
        content.append(chart("chart-baselines", figure, "Accuracy of the searched network and of the baselines"))
    reads = sum(baseline.result["test_reads"] for baseline in facts.baselines)
    note = f"Same budget, epochs, optimiser, averaging and seed, no search. Their {reads} test reads are their own."
    return section("baselines", title, *content, table(columns, lines), lead=note)


def _verdict(facts: Facts, key: str) -> str:
    """Say how the searched network compares, and how little a few baselines can say."""
    split = key.partition("_")[0]
    searched = facts.best["metrics"][key]
    drawn = [b.result["outcomes"][0]["metrics"][key] for b in facts.baselines if b.name.startswith("random")]
    uniform = [b.result["outcomes"][0]["metrics"][key] for b in facts.baselines if b.name == "uniform"]
    parts = []
    if drawn:
        beaten = sum(searched > value for value in drawn)
        equal = sum(searched == value for value in drawn)
        chance = (1 + len(drawn) - beaten) / (1 + len(drawn))
        ties = f" and equals {equal}" if equal else ""
        parts.append(
            f"On {split} images the searched network ({100 * searched:.2f} %) is better than {beaten} of {len(drawn)} "
            f"random ones{ties}."
        )
        parts.append(
            f"If it were itself a random one, it would come out at least that high among {len(drawn) + 1} with a "
            f"probability of {chance:.0%}."
        )
        if interval := mean_interval(drawn):
            mean, low, high = (100 * min(1.0, max(0.0, value)) for value in interval)
            parts.append(f"The random ones have {mean:.2f} % on average, 95 % interval {low:.2f} to {high:.2f} (t).")
    if uniform:
        points = 100 * (searched - uniform[0])
        where = "above" if points > 0 else "below"
        parts.append(
            f"It is {abs(points):.2f} points {where} the uniformly scaled one."
            if round(points, 2)
            else "It equals the uniformly scaled one."
        )
    parts.append("One seed each: differences within the intervals are no evidence.")
    return " ".join(parts)


# ---------------------------------------------------------------------- costs, honesty, repetition


def _by_block(layers: Sequence[LayerProfile]) -> dict[str, list[LayerProfile]]:
    """Group layers by their block: ``blocks.1``, or the first part of the name."""
    groups: dict[str, list[LayerProfile]] = {}
    for layer in layers:
        name = re.match(r"[^.]*(\.\d+)?", layer.name)
        groups.setdefault(name[0] if name and name[0] else "(network)", []).append(layer)
    return groups


def _costs(facts: Facts) -> Html:
    timed = any(layer.latency_ms for layer in facts.layers)
    total = sum(layer.macs for layer in facts.layers)
    columns = ["block", "", "MACs", "share", "params", *(["ms"] if timed else [])]
    rows = []
    for name, layers in _by_block(facts.layers).items():
        macs, params = sum(layer.macs for layer in layers), sum(layer.params for layer in layers)
        time = [f"{sum(layer.latency_ms or 0 for layer in layers):.3f}"] if timed else []
        if macs or params:
            rows.append((name, bar(macs / total), f"{macs:,}", f"{macs / total:.1%}", f"{params:,}", *time))
    params = sum(layer.params for layer in facts.layers)
    sums = [f"{sum(layer.latency_ms or 0 for layer in facts.layers):.3f}"] if timed else []
    rows.append(("all", "", f"{total:,}", "100.0%", f"{params:,}", *sums))
    details = [
        (
            layer.name,
            layer.kind,
            "×".join(map(str, layer.output_shape[1:])) if layer.output_shape else "",
            f"{layer.macs:,}",
            f"{layer.params:,}",
            *([f"{layer.latency_ms:.3f}" if layer.latency_ms else ""] if timed else []),
        )
        for layer in facts.layers
        if layer.macs or layer.params
    ]
    full = table(["layer", "kind", "output", "MACs", "params", *(["ms"] if timed else [])], details, text_columns=2)
    lead = "Counted again from the delivered network: convolutions and matrix products, one image. " + (
        "Times are of each layer alone, with hooks, when this page was written."
        if timed
        else f"archsmith report {facts.run} adds the time of each layer."
    )
    return section(
        "costs",
        "Costs per layer",
        table(columns, rows, text_columns=2),
        element("details", element("summary", f"All {len(details)} layers"), full),
        lead=lead,
    )


def _test_reads(facts: Facts) -> Html:
    reads = [event for event in facts.events if event["kind"] == "test_read"]
    recorded = facts.result["test_reads"]
    lead = (
        f"When the run ended, the test images had been read {recorded} {'time' if recorded == 1 else 'times'}; "
        "searches never see them. The journal lists every read:"
    )
    rows = [(event["time"].replace("T", " ").replace("Z", " UTC"), event["why"]) for event in reads]
    content = table(("time", "why"), rows, text_columns=2) if rows else element("p", "No read is recorded.")
    return section("test-reads", "Reads of the test images", content, lead=lead)


def _reproduce(facts: Facts) -> Html:
    config = yaml.safe_dump({"format_version": FORMAT_VERSION, **facts.config}, sort_keys=False, width=100)
    command = shlex.join(["archsmith", "search", "--config", f"{facts.run}/config.yaml", "--out", f"{facts.run}-again"])
    environment = next((event for event in facts.events if event["kind"] == "environment"), {})
    provenance = facts.best["costs"]["latency"]["provenance"]
    versions = {
        name: environment.get(name, provenance.get(name, "not recorded"))
        for name in ("archsmith", "torch", "python", "cpu_capability")
    }
    rows = [
        ("seed", facts.result["seed"]),
        ("threads, memory format", f"{facts.config['runtime']['threads']}, {facts.config['runtime']['memory_format']}"),
        *((name.replace("_", " "), value) for name, value in versions.items()),
        ("processor", f"{provenance['cpu']}, {provenance['cores']} cores"),
    ]
    started = facts.events[0] if facts.events else {}
    digests = [
        ("configuration", started.get("config_digest", "")),
        ("data and split", facts.result.get("task_digest", "")),
        ("architecture", facts.architecture.get("digest", "")),
        ("network", facts.architecture.get("network_digest", "")),
        *((name, digest) for name, digest in facts.best["files"].items()),
    ]
    shown = [(name, element("code", digest, class_="digest")) for name, digest in digests if digest]
    return section(
        "reproduce",
        "How to repeat it",
        element("pre", command),
        table(("", ""), rows, text_columns=2),
        element("h3", "SHA-256 digests"),
        table(("of", "digest"), shown, text_columns=2),
        element("details", element("summary", "config.yaml"), element("pre", config)),
        element("p", "archsmith verify checks all of this from the files: "),
        element("pre", shlex.join(["archsmith", "verify", facts.run])),
        lead="Same configuration, versions, threads and kind of processor: the same bits.",
    )
