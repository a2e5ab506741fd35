from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark_tables import table_folder

from archsmith.core.errors import UserError
from archsmith.evaluate.tables import Reading, Table
from archsmith.run import bench
from archsmith.run.bench import Arena, BenchConfig, Cell, Contender, arena_of, bench_budget, contender_of, run_bench
from archsmith.run.bench_report import bench_command, bench_rows, render_bench
from archsmith.space import Architecture, Categorical, ProductSpace

SPACE = ProductSpace("tiny", {f"x{i}": Categorical(range(4)) for i in range(4)})


class TinyIndex:
    """Rows in the order of the enumeration."""

    def row(self, architecture: Architecture) -> int:
        return int(sum(4 ** (3 - i) * int(architecture[f"x{i}"]) for i in range(4)))  # type: ignore[arg-type]

    def architecture(self, row: int) -> Architecture:
        return SPACE.validate({f"x{i}": row // 4 ** (3 - i) % 4 for i in range(4)})


def tiny_table() -> Table:
    """256 networks: valid accuracy 80 and one for each unit of the sum; test accuracy one more; 10 s a query."""
    rows = np.arange(256)
    total = sum(rows // 4**i % 4 for i in range(4)).astype(float)
    full = Reading({"valid_accuracy": 80 + total, "test_accuracy": 81 + total}, seconds=np.full(256, 10.0))
    short = Reading({"valid_accuracy": 40 + total / 2}, seconds=np.full(256, 1.0))
    return Table(
        "nas-bench-201",
        SPACE,
        TinyIndex(),
        rows=256,
        readings={"cifar10": {200.0: full, 12.0: short}, "cifar100": {200.0: full}},
        costs={},
        columns={},
    )


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = tiny_table()
    monkeypatch.setattr(bench, "_table", lambda data, name: opened)


def config(**changes: Any) -> BenchConfig:
    values: dict[str, Any] = {
        "contenders": [contender_of("regularized-evolution:population=8;tournament=4"), contender_of("mcts")],
        "arenas": [arena_of("nas-bench-201/cifar10")],
        "seeds": 12,
        "budget": bench_budget("evaluations<=40"),
        "data": "anywhere",
    }
    return BenchConfig(**{**values, **changes})


@pytest.mark.usefixtures("tiny")
def test_a_bench_finds_what_is_known_of_the_landscape(tmp_path: Path) -> None:
    result = run_bench(config(), tmp_path / "bench")
    (arena,) = result["arenas"]
    assert (arena["arena"], arena["seen"], arena["judged"]) == (
        "nas-bench-201/cifar10",
        "valid_accuracy",
        "test_accuracy",
    )
    assert arena["best_of_table"] == 93.0
    assert arena["random_architectures"]["n"] == 100
    rows = {row["contender"]: row for row in arena["contenders"]}
    assert set(rows) == {"random", "mcts", "regularized-evolution:population=8;tournament=4"}  # random search was added
    evolution = rows["regularized-evolution:population=8;tournament=4"]
    # E[sum] = 6, so the average random architecture has a test accuracy of 87; the best of 40 is far above it.
    assert abs(arena["random_architectures"]["mean"] - 87) < 4 * math.sqrt(4 * 1.25 / 100)
    assert evolution["mean"] > rows["random"]["mean"] + 0.5
    assert evolution["regret"] == pytest.approx(93 - evolution["mean"])
    assert evolution["against_random_search"]["n"] == 12
    assert evolution["against_random_search"]["holm_p"] >= evolution["against_random_search"]["wilcoxon_p"]
    assert rows["random"]["improvement"] > 0 and "against_random_search" not in rows["random"]
    assert all(row["evaluations"] == 40 for row in rows.values())
    means = [point[1] for point in evolution["anytime"] if point[1] is not None]
    assert means == sorted(means) and means[-1] == pytest.approx(evolution["mean"])  # the sum orders both accuracies


@pytest.mark.usefixtures("tiny")
def test_what_is_there_is_not_run_again_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_bench(config(seeds=3), tmp_path / "whole")
    run_cell, calls = bench.run_cell, []

    def stopping(*args: Any) -> Cell:
        calls.append(args[1:])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run_cell(*args)

    monkeypatch.setattr(bench, "run_cell", stopping)
    with pytest.raises(KeyboardInterrupt):
        run_bench(config(seeds=3), tmp_path / "broken")
    monkeypatch.setattr(bench, "run_cell", lambda *args: (calls.append(args[1:]), run_cell(*args))[1])
    resumed = run_bench(config(seeds=3), tmp_path / "broken")
    assert len(calls) == 4 + 1 + 5  # four kept, one lost, five left of nine
    assert resumed["arenas"] == whole["arenas"]
    assert run_bench(config(seeds=3), tmp_path / "broken") == resumed and len(calls) == 10
    with pytest.raises(UserError, match="another configuration"):
        run_bench(config(seeds=4), tmp_path / "broken")


@pytest.mark.usefixtures("tiny")
def test_budgets_in_simulated_time_and_cheap_queries(tmp_path: Path) -> None:
    cheap = config(arenas=[arena_of("nas-bench-201/cifar10@12")], budget=bench_budget("simulated<=100s"), seeds=4)
    (arena,) = run_bench(cheap, tmp_path / "cheap")["arenas"]
    assert arena["arena"] == "nas-bench-201/cifar10@12"
    assert all(row["simulated_seconds"] == 100 and row["evaluations"] == 100 for row in arena["contenders"])
    (full,) = run_bench(config(budget=bench_budget("simulated<=100s"), seeds=4), tmp_path / "full")["arenas"]
    assert all(row["evaluations"] == 10 for row in full["contenders"])


@pytest.mark.usefixtures("tiny")
def test_repeats_are_free_or_counted(tmp_path: Path) -> None:
    lazy = [Contender(strategy="random", label="random")]
    free = run_bench(config(contenders=lazy, budget=bench_budget("evaluations<=200"), seeds=3), tmp_path / "free")
    counted = run_bench(
        config(contenders=lazy, budget=bench_budget("evaluations<=200"), seeds=3, free_repeats=False),
        tmp_path / "counted",
    )
    (first,), (second,) = free["arenas"][0]["contenders"], counted["arenas"][0]["contenders"]
    assert first["evaluations"] == second["evaluations"] == 200
    assert first["repeats"] > 100 and second["repeats"] == 0
    assert first["mean"] >= second["mean"]


def test_a_cell_says_what_it_would_have_returned() -> None:
    cell = Cell("a", "b", 0, ((1, 1.0, 0.5, 60.0), (4, 4.0, 0.7, 58.0)), 9, 0, 9.0)
    assert [cell.judged_after(n) for n in (1, 3, 4, 9)] == [60.0, 60.0, 58.0, 58.0]
    assert math.isnan(cell.judged_after(0)) and cell.judged == 58.0
    assert Cell.from_json(json.loads(json.dumps({**cell.to_json(), "kind": "bench_cell", "time": "now"}))) == cell
    assert math.isnan(Cell("a", "b", 0, (), 9, 0, 9.0).judged)


def test_bad_input_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"strategy: got 'evolutoin'; allowed: one of \["):
        contender_of("evolutoin")
    with pytest.raises(UserError, match=r"--strategy: got 'mcts:0\.5'; allowed: NAME or NAME:KEY=VALUE"):
        contender_of("mcts:0.5")
    with pytest.raises(
        UserError, match=r"--arena: got 'nas-bench-301/x'; allowed: TABLE/DATASET with a table of .*201"
    ):
        arena_of("nas-bench-301/x")
    with pytest.raises(
        UserError, match=r"--arena: got 'nas-bench-201/mnist'; allowed: nas-bench-201/ and one of \['cifar10'"
    ):
        arena_of("nas-bench-201/mnist")
    with pytest.raises(UserError, match="--arena: got 'nas-bench-201/cifar10@x'; allowed: a number after @"):
        arena_of("nas-bench-201/cifar10@x")
    for text in ("evaluations<=0", "evaluations=5", "epochs<=3", "simulated<=s"):
        with pytest.raises(UserError, match="--budget: got"):
            bench_budget(text)
    assert bench_budget("evaluations<=5, simulated<=2.5s") == {"evaluations": 5, "simulated_seconds": 2.5}
    with pytest.raises(UserError, match="table"):
        run_bench(config(data=str(tmp_path / "nowhere")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_settings_that_do_not_exist_are_refused_before_anything_runs(tmp_path: Path) -> None:
    wrong = [contender_of("regularized-evolution:populaton=8")]
    with pytest.raises(UserError, match="settings of 'regularized-evolution'"):
        run_bench(config(contenders=wrong), tmp_path / "out")
    with pytest.raises(UserError, match="fidelity"):
        run_bench(config(arenas=[Arena(table="nas-bench-201", dataset="cifar10", fidelity=13)]), tmp_path / "out")
    with pytest.raises(UserError, match="each contender once"):
        run_bench(config(contenders=[contender_of("mcts"), contender_of("mcts")]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("tiny")
def test_the_report_says_everything_with_n_and_spread(tmp_path: Path) -> None:
    result = run_bench(config(seeds=4), tmp_path / "bench")
    page = render_bench("runs/bench", result, plotly="")
    rows = bench_rows(result["arenas"][0])
    assert len(rows) == 4 and rows[-1][0] == "average random architecture"
    assert all(re.fullmatch(r"\d+\.\d\d ± \d+\.\d\d", row[2]) and int(row[1]) in (4, 100) for row in rows)
    for cell in rows[0][:5]:
        assert cell in page
    command = bench_command("runs/bench", result["bench"])
    assert "--strategy 'regularized-evolution:population=8;tournament=4'" in command
    assert "--arena nas-bench-201/cifar10 --budget 'evaluations<=40' --seeds 4" in command
    assert "src=" not in page and "http" not in page.replace("http-equiv", "")


def test_on_the_real_table_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from archsmith.cli import app

    monkeypatch.setenv("COLUMNS", "160")
    words = ["bench", "--strategy", "local-search", "--arena", "nas-bench-201/cifar10@12", "--seeds", "3"]
    words += ["--budget", "simulated<=12000s", "--data", str(table_folder()), "--out", str(tmp_path / "real")]
    app(args=words, standalone_mode=False)
    printed = capsys.readouterr().out
    assert "local-search" in printed and "average random" in printed
    assert (tmp_path / "real" / "report.html").stat().st_size > 1_000_000  # with plotly inside
    (arena,) = json.loads((tmp_path / "real" / "result.json").read_text())["arenas"]
    assert 93 < arena["contenders"][0]["mean"] < 94.38
