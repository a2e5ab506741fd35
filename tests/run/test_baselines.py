"""Architectures of equal cost, and baselines as runs of their own: same recipe, no search, resumable."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as settings_of
from hypothesis import strategies as st
from mobile_samples import random_family, small_family
from small_runs import arguments, digest, events, run_cli, snapshot

import archsmith
from archsmith.config import RunConfig, read_config
from archsmith.core.errors import UserError
from archsmith.families.mobile import MobileFamily
from archsmith.families.widths import random_within, uniform_within
from archsmith.methods.atomnas import Searcher, Settings
from archsmith.run.baselines import baseline_budget, baseline_configs, read_baselines
from archsmith.run.costs import CostModel
from archsmith.run.intervals import mean_interval, wilson
from archsmith.space import Architecture, Budget
from archsmith.tasks import open_task


class NoJournal:
    def record(self, kind: str, **fields: Any) -> None: ...

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        return []


def macs_of(family: MobileFamily) -> Callable[[Architecture], int]:
    """Return the MACs of the atoms of an architecture; counting each network would take minutes."""
    with torch.device("meta"):
        groups = list(family.atoms(family.build(family.largest())))
    cost = {group.name.replace("branches.", "").replace(".", "/"): group.cost["macs"] for group in groups}
    return lambda architecture: sum(cost[path] * architecture[path] for path in family.space.paths)


@settings_of(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), share=st.floats(0.05, 0.95))
def test_random_architectures_are_just_within_the_cost(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    family = small_family() if seed % 2 else random_family(rng)
    macs = macs_of(family)
    limit = max(share * macs(family.largest()), macs(family.scaled(0.0)), macs(family.smallest()))

    def fits(architecture: Architecture) -> bool:
        return macs(architecture) <= limit

    found = random_within(family, rng, fits)
    assert family.space.contains(found) and fits(found)
    uniform = uniform_within(family, fits)
    assert family.space.contains(uniform) and fits(uniform)
    if not family.space.paths:
        return
    # Just within: the next wider uniformly scaled network is above. Two branches may widen at the same factor, so the
    # gap is a step of the scale, not an atom.
    wider = next((s for s in np.linspace(0, 1, 101) if macs(family.scaled(float(s))) > limit), None)
    if wider is not None:
        assert macs(uniform) >= macs(family.scaled(max(0.0, float(wider) - 1 / 50)))


def test_random_architectures_differ_and_repeat() -> None:
    family = small_family()
    macs = macs_of(family)
    limit = 0.5 * macs(family.largest())
    drawn = [random_within(family, np.random.default_rng(seed), lambda a: macs(a) <= limit) for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]
    shares = [[drawn[i][path] / family.largest()[path] for path in family.space.paths] for i in (0, 1)]
    assert all(max(share) - min(share) > 0.2 for share in shares)  # not the uniform one
    assert all(macs(architecture) > 0.9 * limit for architecture in drawn)


def test_what_no_scaled_network_reaches_is_refused() -> None:
    with pytest.raises(UserError, match=r"budget: .* narrowest scaled network"):
        uniform_within(small_family(), lambda architecture: False)


def test_uniform_scaling_touches_every_branch_alike() -> None:
    family = small_family()
    half = family.scaled(0.5)
    assert all(abs(half[path] - family.largest()[path] / 2) <= 0.5 for path in family.space.paths)
    some = family.scaled(1.0, dict.fromkeys(family.space.paths, 0.0))
    assert family.space.contains(some)  # a block without a residual keeps an atom
    assert sum(some.values()) < len(family.plan)


def config(**changes: Any) -> RunConfig:
    settings = {"epochs": 2, "batch_size": 40, "recalibration_batch_size": 20, "rho": 0.5, "threshold": 0.5}
    values = {
        "method": "atomnas",
        "task": {"name": "digits", "limit": 20},
        "family": {"name": "mobile"},
        "budget": "macs<=0.5x",
        "seed": 5,
        "settings": settings,
        "runtime": {"threads": 1},
    }
    return RunConfig.model_validate({**values, **changes})


RESULT = {"reference": {"macs": 1000}, "outcomes": [{"costs": {"macs": 400}}]}


@pytest.mark.parametrize(
    ("budget", "held_to"),
    [
        ("macs<=0.5x", "macs<=0.5x"),
        ("params<=9k, memory<=1MiB", "params<=9k, memory<=1MiB"),
        ("latency<=4ms", "macs<=400"),  # measured: not the same for all
        (None, "macs<=400"),
    ],
)
def test_baselines_are_held_to_exact_costs(budget: str | None, held_to: str) -> None:
    assert baseline_budget(config(budget=budget), RESULT) == held_to


def test_a_run_that_removed_nothing_has_no_baselines() -> None:
    with pytest.raises(UserError, match="found the whole supernet"):
        baseline_budget(config(budget=None), {**RESULT, "outcomes": [{"costs": {"macs": 1000}}]})


@pytest.mark.slow
def test_more_baselines_keep_the_first_ones() -> None:
    family = small_family()
    costs = CostModel(family, Budget.parse("macs<=0.5x"), NoJournal())
    two, three = (baseline_configs(config(), family, costs, "macs<=0.5x", count) for count in (2, 3))
    assert list(three) == ["uniform", "random-1", "random-2", "random-3"]
    assert {name: three[name] for name in two} == two
    for own in three.values():
        assert (
            own.architecture is not None
            and costs.of(family.space.validate(own.architecture))["macs"] <= 0.5 * (costs.largest["macs"])
        )
        assert own.model_copy(update={"architecture": None}) == config()
    with pytest.raises(UserError, match="--baselines: got 0"):
        baseline_configs(config(), family, costs, "macs<=0.5x", 0)


def test_a_given_architecture_is_trained_without_penalty_or_cut() -> None:
    family = small_family(num_classes=10)
    costs = CostModel(family, Budget.parse("macs<=0.6x"), NoJournal())
    given_ = family.scaled(0.5)
    settings = Settings(**{**config().settings, "warmup_epochs": 0, "shrink_fraction": 0.0})
    common: dict[str, Any] = {"family": family, "task": open_task("digits", limit=20), "costs": costs, "seed": 0}
    searcher = Searcher(settings=settings, architecture=given_, **common)

    class Quiet:
        def step(self, total: int, **figures: float) -> None:
            assert searcher.rho(total) == 0.0

        def should_stop(self) -> bool:
            return False

    figures = [searcher.advance(Quiet()) for _ in range(2)]
    assert all(f is not None and f["cut"] is None and f["rho"] == 0.0 and f["within_budget"] for f in figures)
    assert searcher.deliver().architecture == given_
    with pytest.raises(UserError, match=r"architecture: .* within the budget macs<=0.6x"):
        Searcher(settings=settings, architecture=family.largest(), **common)


def test_a_configuration_without_architecture_does_not_mention_it() -> None:
    assert "architecture" not in config().to_json()
    assert config(architecture={"blocks/1/k3": 2}).to_json()["architecture"] == {"blocks/1/k3": 2}


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with one random baseline and the uniform one, by the command line."""
    run = tmp_path_factory.mktemp("compared") / "run"
    done = run_cli(*arguments(run, "--baselines", "1", epochs=3, warmup_epochs=0.5))
    assert done.returncode == 0, done.stdout
    assert "Baseline 2 of 2: random-1, trained by the same recipe" in done.stdout
    return run


@pytest.mark.slow
def test_baselines_are_runs_of_their_own(compared: Path) -> None:
    searched = json.loads((compared / "result.json").read_text())
    found = read_baselines(compared)
    assert [baseline.name for baseline in found] == ["uniform", "random-1"]
    own = read_config(compared / "config.yaml")
    for baseline in found:
        path = compared / "baselines" / baseline.name
        assert baseline.result["test_reads"] == 1 and "test_accuracy" in baseline.result["outcomes"][0]["metrics"]
        assert baseline.result["limits"] == searched["limits"]
        costs = baseline.result["outcomes"][0]["costs"]
        assert 0.8 * searched["limits"]["macs"] < costs["macs"] <= searched["limits"]["macs"]
        written = read_config(path / "config.yaml")
        assert written.model_copy(update={"architecture": None}) == own
        assert all(event["cut"] is None and event["rho"] == 0 for event in events(path, "epoch"))
        assert len(events(path, "epoch")) == 3
        assert baseline.result["diagnosis"] is not None and not (path / "report.html").exists()
    assert archsmith.verify(compared / "baselines" / "uniform").ok
    assert searched["test_reads"] == 1


@pytest.mark.slow
def test_interrupted_baselines_go_on_and_finished_ones_are_kept(
    compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(compared, run)
    shutil.rmtree(run / "baselines" / "random-1")
    (run / "report.html").unlink()
    kept = snapshot(run / "baselines" / "uniform")
    archsmith.report(run, baselines=1, time_limit=0.001, quiet=True)
    assert f"archsmith report {run} --baselines 1 goes on" in capsys.readouterr().out.replace("\n", "")
    assert [baseline.name for baseline in read_baselines(run)] == ["uniform"] and (run / "report.html").exists()
    assert archsmith.report(run, baselines=1, quiet=True) == run / "report.html"
    assert [baseline.name for baseline in read_baselines(run)] == ["uniform", "random-1"]
    assert snapshot(run / "baselines" / "uniform") == kept
    weights = "baselines/random-1/networks/final/weights.safetensors"
    assert digest(run / weights) == digest(compared / weights)  # the same architecture, the same bits


@pytest.mark.slow
def test_baselines_of_a_baseline_are_refused(compared: Path) -> None:
    with pytest.raises(UserError, match="--baselines: got 2; allowed: a run that searches"):
        archsmith.report(compared / "baselines" / "uniform", baselines=2)
    with pytest.raises(UserError, match="--baselines: got -1; allowed: 0 or more"):
        archsmith.report(compared, baselines=-1)


def test_a_wilson_interval_is_the_textbook_one() -> None:
    low, high = wilson(0.8, 10)  # Wilson 1927: 8 of 10
    assert (round(low, 4), round(high, 4)) == (0.4902, 0.9433)
    assert wilson(0.0, 10)[0] == 0.0 and wilson(1.0, 10)[1] == 1.0


@given(correct=st.integers(0, 300), examples=st.integers(1, 300))
def test_a_wilson_interval_holds_its_accuracy(correct: int, examples: int) -> None:
    accuracy = min(correct, examples) / examples
    low, high = wilson(accuracy, examples)
    assert 0 <= low <= accuracy <= high <= 1


def test_the_interval_of_a_mean_is_students() -> None:
    found = mean_interval([1.0, 2.0, 3.0])
    assert found is not None
    assert [round(value, 3) for value in found] == [2.0, -0.484, 4.484]  # t(0.975, 2) = 4.303
    assert mean_interval([1.0]) is None
