from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from archsmith.core.errors import UserError
from archsmith.run.bench_report import write_training_report
from archsmith.run.bench_training import TrainingBench, method_of, run_training_bench, task_of, training_rows

ACCURACY = {"good": 0.90, "bad": 0.80}


def finished(folder: Path, accuracy: float | None) -> None:
    """Write what a finished run leaves, as far as a comparison reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {"valid_accuracy": 0.5} if accuracy is None else {"test_accuracy": accuracy}
    outcome = {"metrics": metrics, "costs": {"macs": 1000 + round(1000 * (accuracy or 0))}}
    (folder / "result.json").write_text(json.dumps({"status": "finished", "outcomes": [outcome], "seconds": 2.0}))


class Searches:
    """Stands for ``archsmith.search``: remembers its calls and leaves finished runs."""

    def __init__(self, *, fail_at: int | None = None, test: bool = True) -> None:
        self.calls: list[dict[str, Any]] = []
        self.fail_at, self.test = fail_at, test

    def __call__(self, task: str, **given: Any) -> None:
        self.calls.append({"task": task, **given})
        if len(self.calls) == self.fail_at:
            raise KeyboardInterrupt
        base = ACCURACY[given["settings"]["kind"]] + 0.001 * given["seed"]
        folder = Path(given["out"])
        finished(folder, base if self.test else None)
        finished(folder / "baselines" / "uniform", 0.75)
        for number in range(1, given["baselines"] + 1):
            finished(folder / "baselines" / f"random-{number}", 0.70 + 0.001 * number + 0.002 * given["seed"])


def config(**changes: Any) -> TrainingBench:
    values: dict[str, Any] = {
        "methods": [method_of("atomnas:kind=bad"), method_of("atomnas:kind=good;epochs=2")],
        "tasks": [task_of("digits"), task_of("cifar10=somewhere.npz")],
        "seeds": 4,
        "cost": "macs<=0.4x",
        "random": 2,
    }
    return TrainingBench(**{**values, **changes})


def test_every_method_has_random_networks_of_its_own(tmp_path: Path) -> None:
    searches = Searches()
    result = run_training_bench(config(), tmp_path, searches)
    assert len(searches.calls) == 2 * 2 * 4
    assert len({call["out"] for call in searches.calls}) == 16
    assert {call["data"] for call in searches.calls if call["task"] == "digits"} == {None}
    assert searches.calls[-1]["data"].endswith("somewhere.npz") and searches.calls[-1]["settings"]["epochs"] == 2
    first, second = result["tables"][0]["methods"]
    assert (first["n"], first["random"]["n"], first["uniform"]["n"]) == (4, 8, 4)
    assert first["mean"] == pytest.approx(80.15) and second["mean"] == pytest.approx(90.15)
    random = first["random"]["mean"]
    assert first["improvement"] == pytest.approx(100 * (80.15 - random) / random)
    paired = second["against_first"]
    assert paired["difference"] == pytest.approx(10) and paired["wins"] == 4
    assert paired["wilcoxon_p"] == pytest.approx(2 / 2**4)
    assert "against_first" not in first
    assert training_rows(result["tables"][0])[0][2] == "80.15 ± 0.13"


def test_a_broken_comparison_goes_on(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_training_bench(config(), tmp_path, Searches(fail_at=3))
    again = Searches()
    result = run_training_bench(config(), tmp_path, again)
    assert len(again.calls) == 16 and again.calls[0]["threads"] == 1  # each search goes on or is read by itself
    finished_already = Searches()
    assert run_training_bench(config(), tmp_path, finished_already) == result and not finished_already.calls
    with pytest.raises(UserError, match="another configuration"):
        run_training_bench(config(seeds=3), tmp_path, Searches())


def test_the_page_stands_alone(tmp_path: Path) -> None:
    result = run_training_bench(config(), tmp_path, Searches())
    page = write_training_report(tmp_path, result).read_text()
    assert "atomnas:kind=good;epochs=2" in page and "80.15 ± 0.13" in page and "src=" not in page.split("<script id")[0]


def test_bad_input(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--method: got 'atomnas:epochs'; allowed: NAME or"):
        method_of("atomnas:epochs")
    with pytest.raises(UserError, match="each method once"):
        run_training_bench(config(methods=[method_of("a:kind=bad")] * 2), tmp_path / "twice", Searches())
    with pytest.raises(UserError, match="tasks with a test split"):
        run_training_bench(config(), tmp_path / "no-test", Searches(test=False))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_real_searches_on_the_digits(tmp_path: Path) -> None:
    from archsmith.api import bench_methods

    methods = ["atomnas:epochs=2", "atomnas:epochs=2;penalty=equal"]
    result = bench_methods(methods, ["digits"], out=tmp_path / "bench", seeds=2, quiet=True)
    assert [row["n"] for row in result["tables"][0]["methods"]] == [2, 2]
    assert all(row["mean"] > 50 and row["random"]["n"] == 2 for row in result["tables"][0]["methods"])
    assert (tmp_path / "bench" / "report.html").exists()
    assert bench_methods(methods, ["digits"], out=tmp_path / "bench", seeds=2, quiet=True) == result
