"""The report: complete, equal to ``result.json``, escaped, and loading nothing from anywhere."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_runs import run_cli, uninterrupted

import archsmith
from archsmith.core.errors import UserError
from archsmith.run import charts
from archsmith.run.baselines import Baseline
from archsmith.run.page import Html, chart, element, escaped, table
from archsmith.run.picture import network_picture, widths_of
from archsmith.run.report import Facts, render

SECTIONS = (
    *("summary", "diagnosis", "network", "training", "pareto", "baselines", "costs"),
    *("test-reads", "reproduce"),
)
VOID = {"meta"}
EVIL = '<img src=x onerror=alert(1)>&"quoted"'


class Page(HTMLParser):
    """Reads a page strictly: every element is closed in its order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.scripts: dict[str, str] = {}
        self.texts: list[str] = []
        self._script: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "script":
            given_ = dict(attrs)
            self._script = given_.get("data-chart") or given_.get("id") or "code"

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        self._script = None

    def handle_data(self, data: str) -> None:
        if self._script is not None:
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif "style" not in self.open:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    @property
    def identifiers(self) -> list[str]:
        return [value for _, name, value in self.attributes if name == "id"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return uninterrupted(tmp_path_factory)


@pytest.fixture(scope="module")
def facts(finished: Path) -> Facts:
    """The facts of the small run, and two made-up baselines."""
    from archsmith.run.report import _layers

    result = json.loads((finished / "result.json").read_text())
    events = [json.loads(line) for line in (finished / "journal.jsonl").read_text().splitlines() if line]
    folder = finished / "networks" / "final"
    architecture = json.loads((folder / "architecture.json").read_text())
    return Facts(
        run="runs/demo",
        config=events[0]["config"],
        result=result,
        epochs=[event for event in events if event["kind"] == "epoch"],
        events=events,
        architecture=architecture,
        layers=_layers(architecture, folder / "weights.safetensors", timed=False),
        baselines=[Baseline(name, result) for name in ("uniform", "random-1", "random-2")],
    )


def changed(facts: Facts, **changes: Any) -> Facts:
    return Facts(**{**{name: getattr(facts, name) for name in Facts.__dataclass_fields__}, **changes})


def page(facts: Facts) -> Page:
    return Page(render(facts, plotly="/* plotly */"))


def test_a_run_ends_with_a_report_that_loads_nothing(finished: Path) -> None:
    text = (finished / "report.html").read_text()
    read = Page(text)
    assert text.count("plotly.js v") >= 1 and len(read.scripts["plotly"]) > 1_000_000  # once, inside
    assert sum(name == "id" and value == "plotly" for _, name, value in read.attributes) == 1
    assert not [item for item in read.attributes if item[1] in ("src", "href", "srcset", "data", "action")]
    own = text.replace(read.scripts["plotly"], "")
    assert not re.search(r"https?://|@import|url\(|<link|<iframe|fetch\(|XMLHttpRequest", own)
    assert not {tag for tag, _, _ in read.attributes} & {"link", "iframe", "object", "img"}


def test_every_section_and_chart_is_there(facts: Facts) -> None:
    read = page(facts)
    assert set(SECTIONS) <= set(read.identifiers) and len(set(read.identifiers)) == len(read.identifiers)
    drawn = {"chart-training", "chart-alive", "chart-pareto", "chart-baselines"}
    assert drawn <= set(read.scripts) and drawn <= set(read.identifiers)
    for name in drawn:
        figure = json.loads(read.scripts[name])
        assert figure["data"] and figure["layout"]["height"] > 0
        assert all(len(trace["x"]) == len(trace["y"]) for trace in figure["data"] if trace["type"] == "scatter")


def test_the_numbers_are_those_of_the_result(facts: Facts) -> None:
    text = page(facts).text
    result, best = facts.result, facts.result["outcomes"][0]
    for split in ("test", "valid"):
        assert f"{100 * best['metrics'][f'{split}_accuracy']:.2f} %" in text
        assert f"{result['examples'][split]:,} images" in text
    for cost in ("macs", "params"):
        assert f"{best['costs'][cost]:,}, " in text and f"{result['reference'][cost]:,}" in text
    assert f"{best['costs']['memory_bytes']:,} bytes" in text
    assert f"{best['costs']['latency']['median_ms']:.3g} ms" in text
    assert f"kept macs {best['costs']['macs']:,} of {math.floor(result['limits']['macs']):,} allowed" in text
    for digest in (*best["files"].values(), facts.architecture["digest"], result["task_digest"]):
        assert digest in text
    assert "read 1 time;" in text and "final evaluation" in text
    assert f"all {best['costs']['macs']:,} 100.0% {best['costs']['params']:,}" in text  # the layers sum to the whole
    assert "archsmith search --config runs/demo/config.yaml --out runs/demo-again" in text


def test_the_diagnosis_is_that_of_the_result(facts: Facts, finished: Path) -> None:
    text = page(changed(facts, run=str(finished))).text
    assert facts.result["diagnosis"]  # the small run has something to doubt
    for finding in facts.result["diagnosis"]:
        assert finding["title"] in text and " ".join(finding["text"].split()) in text
    quiet = {**facts.result, "outcomes": [{**facts.best, "metrics": {"valid_accuracy": 0.9}}], "examples": {}}
    quiet["outcomes"][0]["costs"] = {
        **facts.best["costs"],
        "latency": {**facts.best["costs"]["latency"], "noisy": False},
    }
    assert "No check of the run raised a doubt" in page(changed(facts, result=quiet, epochs=[], baselines=[])).text


def test_the_curves_are_those_of_the_journal(facts: Facts) -> None:
    figure = json.loads(page(facts).scripts["chart-training"])
    traces = {trace["name"]: trace for trace in figure["data"]}
    assert traces["validation"]["y"] == [100 * epoch["valid_accuracy"] for epoch in facts.epochs]
    assert traces["MACs"]["customdata"] == [f"{epoch['macs']:,}" for epoch in facts.epochs]
    cuts = [epoch["epoch"] + 1 for epoch in facts.epochs if epoch["cut"]]
    assert sorted(x for name in traces if name.startswith("cut") for x in traces[name]["x"]) == cuts
    alive = json.loads(page(facts).scripts["chart-alive"])["data"][0]
    assert alive["y"] == [f"block {block} · {k}×{k}" for block in (1, 2) for k in (3, 5)]
    left = [facts.epochs[-1]["kernels"].get(f"blocks.{b}.branches.k{k}", 0) for b in (1, 2) for k in (3, 5)]
    assert [row[-1] for row in alive["z"]] == [count / 32 * 100 for count in left]


def test_the_picture_shows_before_and_after(facts: Facts) -> None:
    widths = widths_of(facts.architecture)
    decisions = facts.architecture["decisions"]
    assert widths == {
        f"blocks.{block}": {branch: (decisions[f"blocks/{block}/{branch}"], 32) for branch in ("k3", "k5")}
        for block in (1, 2)
    }
    text = page(facts).text
    assert f"{decisions['blocks/1/k3']} / 32" in text and f"{sum(decisions.values())} of 128 atoms" in text


def test_a_dead_block_says_so() -> None:
    drawn = network_picture({"blocks.2": {"k3": (0, 8), "k5": (0, 4)}, "blocks.3": {"k3": (8, 8)}}, {})
    assert drawn.count('class="block dead"') == 1 and ">dead<" in drawn and ">100%<" in drawn
    assert "width:50.00%" in drawn  # a lane is as long as its branch was


def test_names_are_escaped(facts: Facts) -> None:
    result = {**facts.result, "task": EVIL, "family": EVIL, "budget": EVIL, "method": EVIL}
    result["outcomes"] = [{**facts.best, "files": {EVIL: EVIL}}]
    config = {**facts.config, "task": {"name": "</pre><script>alert(2)</script>"}}
    events = [*facts.events, {"kind": "test_read", "time": "now", "why": EVIL}]
    baselines = [Baseline(f"random-{EVIL}", result)]
    made = changed(facts, run=EVIL, result=result, config=config, events=events, baselines=baselines)
    read = page(made)
    assert "img" not in {tag for tag, _, _ in read.attributes}
    assert not any(name.startswith("on") for _, name, _ in read.attributes)
    assert list(read.scripts)[-2:] == ["plotly", "code"] and "alert" not in read.scripts["code"]
    assert EVIL in " ".join(read.texts)


@given(st.text())
def test_text_becomes_html_only_escaped(text: str) -> None:
    made = element("p", text, title=text)
    assert "<" not in made[2:-4].replace(">", "", 1).split(">", 1)[-1]
    assert html.unescape(escaped(text)) == text and escaped(Html(text)) == text
    read = Page(chart("c", {"data": [text], "layout": {"height": 1}}, text))
    assert json.loads(read.scripts["c"])["data"] == [text]


def test_tables_keep_their_cells_apart() -> None:
    read = Page(table(("a", "b"), [("x", 1), ("y", "<2>")]))
    assert read.texts == ["a", "b", "x", "1", "y", "<2>"]


def test_what_is_missing_is_said(facts: Facts) -> None:
    made = changed(facts, baselines=[], epochs=[], architecture={**facts.architecture, "space": None})
    text = page(made).text
    assert "archsmith report runs/demo --baselines 4" in text
    assert text.count("No epoch was finished") == 2 and "no searched widths" in text
    no_budget = {**facts.result, "budget": None, "limits": {}}
    assert "the penalty alone decided" in page(changed(facts, result=no_budget)).text
    broken = {**facts.result, "limits": {"macs": 1.0}}
    assert "broken macs" in page(changed(facts, result=broken)).text


def result_with(result: Any, accuracy: float) -> Any:
    outcome = result["outcomes"][0]
    return {**result, "outcomes": [{**outcome, "metrics": {**outcome["metrics"], "test_accuracy": accuracy}}]}


def test_the_comparison_is_honest_about_few_baselines(facts: Facts) -> None:
    accuracies = {"uniform": 0.5, "random-1": 0.4, "random-2": 0.6, "random-3": 0.7}
    baselines = [Baseline(name, result_with(facts.result, value)) for name, value in accuracies.items()]
    made = changed(facts, result=result_with(facts.result, 0.6), baselines=baselines)
    text = page(made).text
    assert "better than 1 of 3 random ones and equals 1" in text
    assert "among 4 with a probability of 75%" in text  # (1 + two at least as good) / (1 + 3)
    assert "56.67 % on average, 95 % interval 18.72 to 94.61" in text  # t(0.975, 2) = 4.303, s = 15.28
    assert "It is 10.00 points above the uniformly scaled one" in text and "no evidence" in text
    figure = json.loads(page(made).scripts["chart-baselines"])
    dots = {label: x for trace in figure["data"] for label, x in zip(trace["y"], trace["x"], strict=True)}
    assert dots == {"searched": 60.0, "uniform": 50.0, "random 1": 40.0, "random 2": 60.0, "random 3": 70.0}


def test_a_front_holds_what_no_other_epoch_beats() -> None:
    points = [(4e6, 0.9), (3e6, 0.95), (2e6, 0.8), (2e6, 0.85), (1e6, 0.7)]
    epochs = [{"epoch": i, "macs": macs, "valid_accuracy": value} for i, (macs, value) in enumerate(points)]
    figure = charts.accuracy_against_macs(epochs, largest=4e6, limit=2e6, final=(1e6, 0.7))
    front = figure["data"][1]
    assert list(zip(front["x"], front["y"], strict=True)) == [(1.0, 70.0), (2.0, 85.0), (3.0, 95.0)]


@pytest.mark.slow
def test_a_report_is_written_again_with_times(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    (run / "report.html").unlink()
    done = run_cli("report", run)
    assert done.returncode == 0 and done.stdout.strip() == str(run / "report.html")
    read = Page((run / "report.html").read_text())
    assert "Times are of each layer alone" in read.text and "read 1 time;" in read.text


def test_a_run_without_result_has_no_report(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    first = (finished / "journal.jsonl").read_bytes().split(b"\n")[0]
    (run / "journal.jsonl").write_bytes(first + b"\n")
    with pytest.raises(
        UserError, match=r"run: got .*; allowed: a run that is finished or was stopped. archsmith resume"
    ):
        archsmith.report(run)
    with pytest.raises(UserError, match="where no run is"):
        archsmith.report(tmp_path / "nothing")


@pytest.mark.slow
def test_a_stopped_run_has_a_report_and_no_baselines(finished: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    outcome = archsmith.search_file(
        finished / "config.yaml", out=run, seed=1, time_limit=0.001, baselines=1, quiet=True
    )
    assert outcome.status == "stopped" and outcome.result["seed"] == 1
    assert "stopped early" in Page((run / "report.html").read_text()).text and not (run / "baselines").exists()
    with pytest.raises(UserError, match=r"--baselines: got 1; allowed: a finished run\. archsmith resume"):
        archsmith.report(run, baselines=1)


def test_a_search_over_choices_shows_them(facts: Facts) -> None:
    choice = {
        "probabilities": {"cell": [[0.3, 0.7], [0.6, 0.4]]},
        "entropy": {"cell": 0.6},
        "expected_macs": 2e5,
        "edges": {"cell": [{"name": name, "options": ["skip", "conv"]} for name in ("0 to 1", "1 to 2")]},
        "chosen": {"cell": [["0 to 1", "conv"], ["1 to 2", "skip"]]},
    }
    figures = {**facts.result.get("figures", {}), "supernet_accuracy": 0.9, "selected_path_accuracy": 0.25}
    searched = changed(
        facts, epochs=[{**facts.epochs[0], **choice}, *facts.epochs[1:]], result={**facts.result, "figures": figures}
    )
    drawn = render(searched, plotly="")
    assert drawn.count("<path") == 2 and 'id="chart-entropy"' in drawn and 'id="chart-edges-0"' in drawn
    assert "90.00 % on validation images with all operations mixed, and 25.00 %" in drawn
    assert 'id="choices"' not in render(facts, plotly="")
