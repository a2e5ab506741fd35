import json
from pathlib import Path
from typing import Any

import pytest
from study_samples import SPACE, Climber, Misbehaving, Quick

from archsmith import cli
from archsmith.core.errors import UserError
from archsmith.run.directory import Run
from archsmith.run.mirror import mirror_study
from archsmith.run.stop import StopRequest
from archsmith.run.study import JournalStore, recorded_trials, run_study
from archsmith.space import Categorical, Count, Given, Objective, ProductSpace, Real, Result, Subset, Trial, When
from archsmith.strategies import RandomSearch

optuna = pytest.importorskip("optuna")

STATES = {"ok": "COMPLETE", "failed": "FAIL", "infeasible": "PRUNED", None: "RUNNING"}


def agrees(run: Path, objectives: tuple[str, ...] = ("valid_accuracy",), name: str | None = None) -> int:
    """Check the Optuna study against the journal, trial by trial; return how many there are."""
    found = optuna.load_study(study_name=name or run.name, storage=f"sqlite:///{run / 'optuna.db'}")
    trials = list(recorded_trials(run))
    assert [t.number + 1 for t in found.trials] == [trial.id for trial, _ in trials]
    for mirrored, (trial, result) in zip(found.trials, trials, strict=True):
        status = None if result is None else result.status
        assert mirrored.state.name == STATES[status]
        assert {path: json.dumps(v) for path, v in trial.architecture.items()} == {
            path: v if isinstance(trial.architecture[path], tuple) else json.dumps(v)
            for path, v in mirrored.params.items()
        }
        if result is not None and status == "ok":
            assert mirrored.values == [Objective(metric).value(result) for metric in objectives]
            assert mirrored.datetime_complete is not None
        if result is not None:
            assert mirrored.user_attrs["result"] == result.to_json()
        assert mirrored.user_attrs["trial"]["id"] == trial.id
        assert mirrored.user_attrs["trial"]["architecture"] == trial.architecture.digest
    return len(trials)


def narrow(architecture: Any) -> Result | None:
    return Result.infeasible("too wide", costs={"params": 32.0}) if architecture["width"] == 32 else None


def test_values_params_and_states_equal_the_journal_and_follow_it(tmp_path: Path, capsys: Any) -> None:
    run, stop = tmp_path / "study", StopRequest()

    def half(trial: Trial, result: Result) -> None:
        if trial.id >= 8:
            stop.request("half")

    evaluator = Misbehaving({3: "raise", 5: "nan"})
    arguments: Any = {"budget": 12, "batch": 3, "feasible": narrow}
    first = run_study(RandomSearch(SPACE), evaluator, store=JournalStore(run), stop=stop, on_result=half, **arguments)
    assert first.pending
    with pytest.raises(SystemExit) as end:
        cli.main(["dashboard", str(run)])
    assert end.value.code == 0
    assert f"Next: optuna-dashboard sqlite:///{run / 'optuna.db'}" in capsys.readouterr().out
    before = agrees(run)
    assert mirror_study(run).written == 0
    outcome = run_study(RandomSearch(SPACE), evaluator, store=JournalStore(run), **arguments)
    assert outcome.failed and outcome.infeasible
    mirror = mirror_study(run)
    assert agrees(run) == mirror.trials == outcome.told > before
    assert mirror.written < mirror.trials  # what was there and over was left alone
    found = optuna.load_study(study_name="study", storage=mirror.url)
    assert outcome.best is not None
    assert found.best_value == outcome.best[1].metrics["valid_accuracy"]
    (run / "optuna.db").unlink()
    assert mirror_study(run).written == outcome.told
    assert agrees(run) == outcome.told


MIXED = ProductSpace(
    "mixed",
    {
        "op": Categorical(["conv", None, True, 2]),
        "lr": Real(1e-4, 1.0, log=True),
        "units": Count(1, 500),
        "skips": Subset(["a", "b", "c"], 0, 2),
        "rate": Given(When("op", "conv"), Categorical([0.5, 1.0])),
    },
)


class TwoValues:
    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        return Result(metrics={"valid_accuracy": 1.0 / trial.id}, costs={"params": float(trial.id)})


def test_all_kinds_of_values_and_several_objectives(tmp_path: Path) -> None:
    objectives = [Objective("valid_accuracy"), Objective("params", "minimize")]
    strategy = RandomSearch(MIXED, objectives=objectives)
    run_study(strategy, TwoValues(), budget=50, store=JournalStore(tmp_path / "s"))
    mirror = mirror_study(tmp_path / "s")
    found = optuna.load_study(study_name="s", storage=mirror.url)
    assert [direction.name for direction in found.directions] == ["MAXIMIZE", "MINIMIZE"]
    assert [trial.values for trial in found.trials] == [[1.0 / (n + 1), n + 1.0] for n in range(50)]
    for mirrored, (trial, _) in zip(found.trials, recorded_trials(tmp_path / "s"), strict=True):
        assert mirrored.params == dict(trial.architecture) | {"skips": json.dumps(trial.architecture["skips"])}
    distributions = found.trials[0].distributions
    assert isinstance(distributions["units"], optuna.distributions.IntDistribution)
    assert isinstance(distributions["lr"], optuna.distributions.FloatDistribution)


def test_other_folders_and_other_studies_are_refused(tmp_path: Path) -> None:
    Run.create_or_open(tmp_path / "run", {"seed": 0}).close()
    for folder in ("run", "missing"):
        with pytest.raises(UserError, match=f"{folder}, where no study is recorded"):
            mirror_study(tmp_path / folder)
    run_study(Climber(), Quick(), budget=2, store=JournalStore(tmp_path / "s"))
    url = f"sqlite:///{tmp_path}/other.db"
    optuna.create_study(study_name="s", storage=url)
    with pytest.raises(UserError, match=r"study: got 's'; .*which was left as it is"):
        mirror_study(tmp_path / "s", storage=url)
    assert mirror_study(tmp_path / "s", storage=url, study="mine").trials == 2
    with pytest.raises(UserError, match=r"storage: got sqlite:////nowhere/x.db .*with --storage"):
        mirror_study(tmp_path / "s", storage="sqlite:////nowhere/x.db")
