"""Strategies compared by the fronts they find on tables and on the published predictor."""

from __future__ import annotations

import json

import numpy as np
import pytest
from benchmark_tables import real_table
from ofa_samples import SPACE, black_box
from shared_data import shared_data

from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.run import bench_fronts
from archsmith.run.bench import Contender, contender_of
from archsmith.run.bench_fronts import (
    PHONE,
    FrontArena,
    FrontsConfig,
    curve_marks,
    front_rows,
    open_arena,
    run_fronts,
    search_curve,
    write_fronts_report,
)
from archsmith.space import Objective, Result

pytest.importorskip("pymoo")

OBJECTIVES = (Objective("macs", "minimize", 600.0), Objective("valid_accuracy", reference=70.0))


@pytest.fixture
def arena(monkeypatch):
    """The published black box in the place of any arena."""
    box = black_box()

    def measure(architecture):
        macs, accuracy = map(float, box.values([architecture])[0])
        return Result(metrics={"valid_accuracy": accuracy}, costs={"macs": macs})

    found = FrontArena("black/box", SPACE, OBJECTIVES, measure)
    monkeypatch.setattr(bench_fronts, "open_arena", lambda text, data, names: found)
    return found


def config(**changes):
    given = {
        "contenders": (contender_of("nsga2:population=6"),),
        "arenas": ("black/box",),
        "objectives": ("macs", "accuracy"),
        "evaluations": 24,
        "seeds": 2,
        "data": "nowhere",
    }
    return FrontsConfig(**{**given, **changes})


def test_a_search_is_judged_by_all_it_has_measured(arena):
    curve = search_curve(arena, Contender(strategy="random", label="random"), evaluations=30, seed=1)
    assert [mark for mark, _ in curve] == curve_marks(30) and curve[-1][0] == 30
    values = [value for _, value in curve]
    assert values == sorted(values) and values[-1] > 0
    again = search_curve(arena, Contender(strategy="random", label="random"), evaluations=30, seed=1)
    assert curve == again != search_curve(arena, Contender(strategy="random", label="random"), evaluations=30, seed=2)


def test_linas_is_a_contender(arena):
    """One fit between two batches; ahead of its own random beginning."""
    curve = search_curve(arena, contender_of("linas:initial=14;batch=8"), evaluations=22, seed=0)
    start = next(value for mark, value in reversed(curve) if mark <= 14)
    assert curve[-1][0] == 22 and curve[-1][1] > start


def test_random_search_is_always_there_and_a_comparison_goes_on(arena, tmp_path, monkeypatch):
    result = run_fronts(config(), tmp_path / "whole")
    (table,) = result["arenas"]
    assert [row["contender"] for row in table["contenders"]] == ["random", "nsga2:population=6"]
    assert len(table["contenders"][1]["each"]) == 2 and "against_random_search" in table["contenders"][1]
    calls = []
    search = bench_fronts.search_curve

    def fails_third(*given, **settings):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(given)
        return search(*given, **settings)

    monkeypatch.setattr(bench_fronts, "search_curve", fails_third)
    with pytest.raises(KeyboardInterrupt):
        run_fronts(config(), tmp_path / "run")
    monkeypatch.setattr(bench_fronts, "search_curve", search)
    assert run_fronts(config(), tmp_path / "run")["arenas"] == result["arenas"]
    assert len(front_rows(table)) == 2 and front_rows(table)[0][3] == "baseline"
    page = write_fronts_report(tmp_path / "run", result).read_text()
    assert "black/box" in page and "front-0" in page and "macs 600, valid_accuracy 70" in page


def test_what_does_not_fit_is_refused_before_anything_runs(arena, tmp_path):
    with pytest.raises(UserError, match="--strategy: got nsga2:population=6, nsga2:population=6"):
        run_fronts(config(contenders=(contender_of("nsga2:population=6"),) * 2), tmp_path / "run")
    with pytest.raises(UserError, match="objective"):
        run_fronts(config(contenders=(contender_of("regularized-evolution"),)), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_arenas_and_objectives_that_do_not_exist_are_named(tmp_path):
    with pytest.raises(UserError, match="--arena: got 'none'; allowed: ofa-mobile/note10, ofa-resnet50/macs, or TABLE"):
        open_arena("none", tmp_path, ["accuracy", "macs"])
    with pytest.raises(UserError, match=r"latency-table-note10-ofa\.json"):
        open_arena(PHONE, tmp_path, ["accuracy", "latency"])


def test_the_published_predictor_is_an_arena():
    arena = open_arena(PHONE, shared_data("nas-benchmarks"), ["accuracy", "latency"])
    assert [(each.metric, each.reference) for each in arena.objectives] == [("valid_accuracy", 72.0), ("latency", 70.0)]
    result = arena.measure(arena.space.sample(np.random.default_rng(0)))
    assert 65 < result.metrics["valid_accuracy"] < 81 and 10 < result.costs["latency"] < 120
    with pytest.raises(UserError, match="--objectives: got 'energy'; allowed: accuracy, macs, params, latency"):
        open_arena(PHONE, shared_data("nas-benchmarks"), ["accuracy", "energy"])


def test_a_table_is_an_arena_with_the_medians_as_reference(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    real_table("nas-bench-macro")
    data = shared_data("nas-benchmarks")
    arena = open_arena("nas-bench-macro/cifar10", data, ["accuracy", "params"])
    values = [arena.measure(each) for each in arena.space.sample_many(np.random.default_rng(1), 200)]
    below = np.mean([each.costs["params"] < arena.objectives[1].reference for each in values])
    assert 0.35 < below < 0.65
    words = ["bench", "--objectives", "accuracy,params", "--arena", "nas-bench-macro/cifar10", "--data", str(data)]
    words += ["--budget", "evaluations<=30", "--seeds", "2", "--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as ended:
        main([*words, "--strategy", "nsga2:population=10"])
    assert not ended.value.code
    shown = capsys.readouterr().out
    assert "nsga2:population=10" in shown and "minus random search" in shown and "params" in shown
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["fronts"]["evaluations"] == 30
