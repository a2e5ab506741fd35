from __future__ import annotations

import json
import logging

import numpy as np
import pytest

from archsmith.core.errors import MissingExtra, UserError
from archsmith.space import Count, Objective, ProductSpace, Result, Subset, Trial
from archsmith.strategies import GaussianProcessSearch, TpeSearch, bayes
from archsmith.strategies.bayes import _parameters
from archsmith.testing.strategies import EXAMPLE_SPACES, recipe_space, small_space, toy_result

optuna = pytest.importorskip("optuna")


def big_subset_space() -> ProductSpace:
    return ProductSpace(
        "subset", {"set": Subset([f"s{i}" for i in range(20)], minimum=2, maximum=6), "n": Count(2, 8, 2)}
    )


SPACES = {**EXAMPLE_SPACES, "subset": big_subset_space}


@pytest.mark.parametrize("name", SPACES)
def test_what_optuna_suggested_is_what_the_architecture_says(name: str) -> None:
    """The parameters of a study's trials are exactly those read from the architectures: the rebuilt study is equal."""
    search = TpeSearch(SPACES[name](), seed=1, startup=3)
    for trial in search.ask(8):
        number = search._number[trial.id]
        suggested = search._study.get_trials()[number]
        read = [each for d in search.space.trace(trial.architecture) for each in _parameters(search.space, d)]
        assert suggested.params == {parameter: value for parameter, _, value in read}
        assert suggested.distributions == {parameter: distribution for parameter, distribution, _ in read}
        search.tell(trial.id, toy_result(search.space, trial))


def test_decisions_become_parameters_of_their_kind() -> None:
    space = recipe_space()
    architecture = space.validate({"optimiser": "sgd", "lr": 0.01, "momentum": 0.5, "augment": ("flip",), "steps": 7})
    read = {name: (d, value) for each in space.trace(architecture) for name, d, value in _parameters(space, each)}
    kinds = optuna.distributions
    assert read["lr"] == (kinds.FloatDistribution(1e-4, 1.0, log=True), 0.01)
    assert read["steps"] == (kinds.IntDistribution(1, 100_000), 7)
    assert read["optimiser of 2"] == (kinds.CategoricalDistribution((0, 1)), 0)
    assert read["augment of 7"][1] == 1


def test_ordinals_are_integers_and_masks_are_other_parameters() -> None:
    space = EXAMPLE_SPACES["deep"]()
    names: dict[str, set[object]] = {}
    for architecture in space.enumerate():
        for decision in space.trace(architecture):
            for name, distribution, value in _parameters(space, decision):
                names.setdefault(name, set()).add(distribution)
                assert distribution._contains(distribution.to_internal_repr(value))
    assert all(len(distributions) == 1 for distributions in names.values())
    assert names["net/0/kernel of 3"] == {optuna.distributions.IntDistribution(0, 2)}
    assert any(name.startswith("net/1/width of 4 masked") for name in names)


def tell_all(search: TpeSearch, values: list[float]) -> list[Trial]:
    trials = []
    for value in values:
        (trial,) = search.ask()
        trials.append(trial)
        result = Result(metrics={"valid_accuracy": value}) if np.isfinite(value) else Result.failed("crashed")
        search.tell(trial.id, result)
    return trials


def test_losses_reach_the_study_with_the_right_sign() -> None:
    search = TpeSearch(small_space())
    tell_all(search, [3.0, 9.0, 5.0])
    assert search._study.best_trial.number == 1
    assert search._study.best_value == -9.0
    search = TpeSearch(small_space(), objectives=[Objective("valid_accuracy", "minimize")])
    tell_all(search, [3.0, 9.0, 5.0])
    assert search._study.best_value == 3.0


def test_failures_are_pruned_for_tpe_and_left_out_for_the_process() -> None:
    for kind, state in ((TpeSearch, "PRUNED"), (GaussianProcessSearch, "FAIL")):
        search = kind(small_space())
        tell_all(search, [1.0, float("nan")])  # type: ignore[arg-type]
        assert [trial.state.name for trial in search._study.get_trials()] == ["COMPLETE", state]


def test_a_rebuilt_study_equals_the_old_one() -> None:
    search = TpeSearch(EXAMPLE_SPACES["rising"](), seed=2, startup=3)
    tell_all(search, [1.0, 2.0, float("nan"), 4.0, 5.0])
    search.ask(2)
    again = TpeSearch(EXAMPLE_SPACES["rising"](), seed=2, startup=3)
    again.load_state_dict(json.loads(json.dumps(search.state_dict())))
    for old, new in zip(search._study.get_trials(), again._study.get_trials(), strict=True):
        assert (old.number, old.state, old.values) == (new.number, new.state, new.values)
        if old.state.name != "FAIL":
            assert (old.params, old.distributions) == (new.params, new.distributions)
        if old.state.name == "RUNNING":
            assert old.system_attrs == new.system_attrs
    assert [t.architecture for t in search.ask(3)] == [t.architecture for t in again.ask(3)]


def test_several_objectives() -> None:
    search = TpeSearch(small_space(), objectives=[Objective("a"), Objective("b", "minimize")], startup=3)
    for i in range(8):
        (trial,) = search.ask()
        search.tell(trial.id, Result(metrics={"a": 1.0 * i, "b": 2.0 * i}) if i % 3 else Result.failed("crashed"))
    assert search._study.get_trials()[1].values == [-1.0, 2.0]
    assert search._study.get_trials()[3].state.name == "FAIL"


def test_optuna_is_as_loud_as_before(capsys: pytest.CaptureFixture[str]) -> None:
    level = logging.getLogger("optuna").level
    tell_all(TpeSearch(small_space()), [1.0])
    assert logging.getLogger("optuna").level == level
    captured = capsys.readouterr()
    assert "study" not in captured.out + captured.err


def test_errors() -> None:
    with pytest.raises(UserError, match="startup: got 0"):
        TpeSearch(small_space(), startup=0)
    with pytest.raises(UserError, match="candidates: got 0"):
        TpeSearch(small_space(), candidates=0)


def test_a_missing_optuna_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"archsmith\[optuna\]"):
        bayes.TpeSearch(small_space())
