from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from sklearn.linear_model import Ridge

from archsmith.core.errors import UserError
from archsmith.families.cell_spaces import nas_bench_201_space
from archsmith.space import Architecture, Result
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import Affine, Concat, Conv2D, Dropout, Optional, ReLU
from archsmith.strategies import SurrogateSearch
from archsmith.strategies.smbo import NgramFeatures, ridge_predictions

CASE = json.loads((Path(__file__).parents[1] / "golden" / "deeparchitect.json").read_text())["cases"][
    "SMBO n-gram features and ridge prediction"
]


def published_space() -> ModuleSpace:
    parts = [Conv2D([8, 16], [1, 3]), ReLU(), Conv2D([8], [3]), ReLU(), Optional(Dropout([0.5])), Affine([10])]
    return ModuleSpace("published", Concat(parts), (3, 8, 8))


def chosen(space: ModuleSpace, history: list[int]) -> Architecture:
    answers = iter(history)
    return space.walk(lambda path, options, mask, group: options[next(answers)])  # type: ignore[index]


def test_features_and_predictions_of_the_reference() -> None:
    space = published_space()
    networks = [space.tokens(chosen(space, history)) for history in CASE["input"]["choice_histories"]]
    expected = CASE["expected"]
    assert networks == expected["repr_names"]
    features = NgramFeatures(longest=CASE["input"]["ngram_maxlen"] - 1, threshold=CASE["input"]["threshold"])
    features.fit(networks)
    assert len(features.known) == expected["n_ngrams"]
    assert [list(ngram) for ngram in features.known] == expected["ngrams"]
    seen = features.transform(networks)
    assert seen.tolist() == expected["feature_vectors"]
    query = features.transform([space.tokens(chosen(space, CASE["input"]["query_history"]))])
    scores = np.array(CASE["input"]["scores"])
    found = ridge_predictions(seen, scores, np.vstack([seen, query]), CASE["input"]["ridge_lambda"])
    assert found == pytest.approx(expected["predictions_three_then_query"], abs=1e-6)
    theirs = Ridge(alpha=CASE["input"]["ridge_lambda"]).fit(seen, scores).predict(np.vstack([seen, query]))
    assert found == pytest.approx(theirs, abs=1e-10)


def test_the_corrected_mode_counts_the_last_module() -> None:
    networks = [["Conv2D", "ReLU", "Affine"]]
    short, whole = NgramFeatures(threshold=1), NgramFeatures(threshold=1, complete=True)
    short.fit(networks)
    whole.fit(networks)
    assert ("Affine",) not in short.known and ("Affine",) in whole.known
    assert ("Conv2D", "ReLU", "Affine") in whole.known
    whole.fit([["ReLU"]])  # a refit forgets
    assert set(whole.known) == {("ReLU",)}


def test_the_surrogate_finds_what_it_can_see() -> None:
    space = nas_bench_201_space()

    def total(strategy: SurrogateSearch) -> float:
        found = 0.0
        for _ in range(60):
            (trial,) = strategy.ask()
            value = sum(choice == "nor_conv_3x3" for choice in trial.architecture.values()) / 6
            found += value
            strategy.tell(trial.id, Result(metrics={"valid_accuracy": value}))
        return found / 60

    guided = [total(SurrogateSearch(space, penalty=1.0, seed=seed)) for seed in range(5)]
    random = [total(SurrogateSearch(space, explore=1.0, seed=seed)) for seed in range(5)]
    assert min(guided) > max(random) + 0.1


def test_without_data_and_with_failures_only() -> None:
    strategy = SurrogateSearch(published_space(), seed=1)
    trials = strategy.ask(3)
    assert strategy.predict([trial.architecture for trial in trials]).tolist() == [0, 0, 0]
    for trial in trials:
        strategy.tell(trial.id, Result.failed("crash"))
    assert strategy.predict([trials[0].architecture]).tolist() == [0]
    with pytest.raises(UserError, match=r"explore: got 2; allowed: a probability"):
        SurrogateSearch(published_space(), explore=2)
    with pytest.raises(UserError, match=r"candidates: got 0"):
        SurrogateSearch(published_space(), candidates=0)
