from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from archsmith.cli import main
from archsmith.core.errors import UserError
from archsmith.core.files import read_json
from archsmith.run.advise import CHECKPOINTS, FILE, advise, measured_where, summarised, write_advice
from archsmith.run.advise_devices import MEASURED, device_advice, sliced_families
from archsmith.strategies import strategy_table


def bench_result(arena: str, curves: dict[str, list[list[float | None]]], best: float = 90.0) -> dict[str, Any]:
    contenders = [{"contender": name, "anytime": anytime} for name, anytime in curves.items()]
    row = {"arena": arena, "judged": "test_accuracy", "best_of_table": best, "random_architectures": {"mean": 50.0}}
    bench = {"budget": {"evaluations": 200}, "seeds": 5}
    return {"bench": bench, "arenas": [{**row, "contenders": contenders}]}


CURVES: dict[str, list[list[float | None]]] = {
    "random": [[1, None, None, None], [10, 60, 58, 62], [120, 70, 69, 71]],
    "late": [[10, 55, 50, 60], [90, 85, 80, 88]],
    "early": [[10, 80, 78, 82]],
}


def test_the_answer_depends_on_the_budget(tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    other = {name: [[1, 70.0, 69.0, 71.0]] for name in CURVES}
    write_advice([bench_result("a", CURVES), bench_result("b", other)], command="the command", file=file)
    step, found = advise(60, file=file)
    assert step == 50 and [each.strategy for each in found] == ["early", "random", "late"]
    # (90 - 80) / 40 in a, (90 - 70) / 40 in b
    assert found[0].regret == pytest.approx((0.25 + 0.5) / 2)
    assert (found[0].ahead, found[0].arenas) == (1, 2)
    step, found = advise(100_000, file=file)
    assert step == 200 and [each.strategy for each in found] == ["late", "early", "random"]
    assert found[0].figures["a"] == (85.0, 80.0, 88.0)
    assert measured_where(file) == ("a (5 seeds), b (5 seeds)", "the command")


def test_what_was_not_measured_is_not_advised(tmp_path: Path) -> None:
    file = tmp_path / "advice.json"
    write_advice([bench_result("a", CURVES)], command="", file=file)
    with pytest.raises(UserError, match=r"--evaluations: got 5; allowed: at least 25"):
        advise(5, file=file)
    wrong = bench_result("a", CURVES)
    wrong["bench"]["budget"] = {"simulated_seconds": 12.0}
    with pytest.raises(UserError, match="benches with evaluations<=N as budget"):
        summarised([wrong], command="")


def test_the_shipped_figures_have_a_baseline_and_name_what_exists() -> None:
    data = read_json(FILE)
    known = {row["name"] for row in strategy_table()}
    for arena in data["arenas"]:
        assert "random" in arena["contenders"] and arena["seeds"] >= 10
        for name, rows in arena["contenders"].items():
            assert name.partition(":")[0] in known
            assert len(rows) == len(CHECKPOINTS) and all(low <= mean <= high for mean, low, high in rows)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--evaluations", "60"], "random"),
        ([], "atomnas"),
        (["--own-model"], "archsmith shrink module:factory"),
        (["--data", "text"], "Nothing was measured for text"),
        (["--evaluations", "60", "--objectives", "2"], "strategy linas"),
        (["--latency"], "archsmith search --method linas --family bignas --device onnxruntime --objectives accuracy,l"),
        (["--devices", "3"], "One supernet for several devices"),
        (["--devices", "3", "--family", "ofa-mobile"], "--method linas --family ofa-mobile"),
        (["--latency", "--family", "darts"], "The family darts has no elastic supernet (those that have: bignas, ofa"),
        (["--data", "text", "--objectives", "2"], "strategy linas"),
    ],
)
def test_the_command(words: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["advise", *words])
    assert ended.value.code in (0, None)
    assert expected in capsys.readouterr().out


def test_devices_are_advised_what_searches_for_them() -> None:
    assert sliced_families() == {"ofa-mobile": ["hw-aware-system"], "bignas": ["hw-aware-system", "bignas", "simq-nas"]}
    lines = device_advice(objectives=2, devices=2, latency=True, family="ofa-mobile", trained=False)
    assert "ofa-mobile" in lines[0] and not any("simq-nas" in line or "--method bignas" in line for line in lines)
    assert any("--set supernet=RUN" in line for line in lines)
    every = " ".join(device_advice(objectives=2, devices=1, latency=True, family=None, trained=False))
    assert "--method simq-nas" in every and "--method bignas" in every and "supernet=RUN" not in every
    assert "latency" not in device_advice(objectives=1, devices=2, latency=False, family=None, trained=False)[0]
    with pytest.raises(UserError, match="--devices: got 0; allowed: an integer from 1"):
        device_advice(objectives=1, devices=0, latency=False, family=None, trained=False)
    with pytest.raises(UserError, match="--family: got 'none'"):
        device_advice(objectives=1, devices=2, latency=False, family="none", trained=False)


def test_the_figures_are_those_of_the_evidence() -> None:
    evidence = (Path(__file__).parents[2] / "benchmarks" / "results" / "linas_cpu_202611.md").read_text()
    table = evidence.partition("**surrogate**")[2].partition("Seeds in which")[0]
    rows = {line.split("|")[1].strip(): line.split("|") for line in table.splitlines() if line.startswith("| ")}
    for row, word in (("random", "random"), ("NSGA-II", "nsga2"), ("archsmith", "linas")):
        at_100, at_250 = (round(float(rows[row][column].split("±")[0])) for column in (3, 6))
        assert f"{word} {at_100} / {at_250}" in MEASURED
