from __future__ import annotations

import numpy as np
import pytest
from ofa_samples import GOLDEN, SPACE, columns, genotypes
from scipy.stats import kendalltau

from archsmith.core.errors import UserError
from archsmith.predictors.tuned import RIDGE_PENALTIES, Tuned, label_divisor, mape, ridge_model, ridge_path, svr_model
from archsmith.space.genotypes import Genotypes


def rows(masked: bool = True) -> np.ndarray:
    return Genotypes(SPACE).one_hot(genotypes(), masked=masked)


@pytest.mark.parametrize("encoding", ["plain", "masked"])
@pytest.mark.parametrize(("label", "column"), [("macs_M", "macs"), ("top1", "valid_accuracy")])
def test_ridge_on_real_rows_is_the_published_one(encoding: str, label: str, column: str) -> None:
    expected = GOLDEN["ridge"]["expected"][f"{encoding}_{label}"]
    features, labels = rows(encoding == "masked"), np.array(columns()[column])
    found = ridge_model(features[:200], labels[:200], 1.0)(features[200:500])
    assert found[:3] == pytest.approx(expected["first3"], abs=1e-4)
    assert mape(found, labels[200:500]) == pytest.approx(expected["mape"], abs=1e-4)
    assert kendalltau(found, labels[200:500])[0] == pytest.approx(expected["kendall"], abs=1e-4)


def test_masking_improves_all_four_figures() -> None:
    expected = GOLDEN["ridge"]["expected"]
    for label in ("macs_M", "top1"):
        assert expected[f"masked_{label}"]["mape"] < expected[f"plain_{label}"]["mape"]
        assert expected[f"masked_{label}"]["kendall"] > expected[f"plain_{label}"]["kendall"]


@pytest.mark.parametrize(("largest", "divisor"), GOLDEN["label_normalisation"])
def test_labels_are_divided_by_a_power_of_ten(largest: float, divisor: float) -> None:
    assert label_divisor(np.array([largest / 3, -largest])) == pytest.approx(divisor, rel=1e-12)


def test_labels_of_nothing_are_left_alone() -> None:
    assert label_divisor(np.zeros(3)) == 1.0


def test_one_decomposition_serves_every_penalty() -> None:
    features, labels = rows()[:60], np.array(columns()["macs"])[:60]
    path = ridge_path(features, labels, RIDGE_PENALTIES)(rows()[60:70])
    for place in (0, 9, 99):
        penalty = RIDGE_PENALTIES[place]
        # The normal equations with a column for the intercept, which is not penalised.
        wide = np.hstack([features, np.ones((60, 1))])
        penalties = np.diag([penalty] * features.shape[1] + [0.0])
        weights = np.linalg.solve(wide.T @ wide + penalties, wide.T @ labels)
        assert path[place] == pytest.approx(rows()[60:70] @ weights[:-1] + weights[-1], rel=1e-8)


def test_the_model_with_the_smallest_held_out_error_is_chosen() -> None:
    rng = np.random.default_rng(0)
    features = rng.integers(0, 2, (60, 8)).astype(float)
    linear = Tuned()
    linear.fit(features, 50 + features @ np.arange(8.0))
    parity = Tuned()
    parity.fit(features[:, :3].repeat(2, axis=1), 50.0 + 10 * (features[:, :3].sum(axis=1) % 2))
    assert list(linear.chosen) == ["ridge"] and linear.errors["ridge"] < linear.errors["svr"]
    assert list(parity.chosen) == ["svr"] and parity.errors["svr"] < parity.errors["ridge"]


def test_labels_of_any_size_are_learned_alike() -> None:
    """Support vectors fail on labels of 1e8 that are not divided; and a unit must not change the choice."""
    features, labels = rows()[:80], np.array(columns()["macs"])[:80]
    small, large = Tuned(), Tuned()
    small.fit(features, labels)
    large.fit(features, labels * 1e6)
    assert large.chosen == small.chosen
    test = rows()[900:950]
    assert large.predict(test).mean == pytest.approx(small.predict(test).mean * 1e6, rel=1e-9)


def test_stacking_joins_both_families_and_helps_here() -> None:
    features, labels = rows(), np.array(columns()["valid_accuracy"])
    stacked, ridge = Tuned(stacked=True), Tuned(families=("ridge",))
    for predictor in (stacked, ridge):
        predictor.fit(features[:150], labels[:150])
    assert set(stacked.chosen) == {"ridge", "svr"}
    errors = [mape(predictor.predict(features[500:]).mean, labels[500:]) for predictor in (stacked, ridge)]
    assert errors[0] < errors[1]
    assert (stacked.predict(features[:5]).std > 0).all()


def test_two_examples_are_enough() -> None:
    predictor = Tuned()
    predictor.fit(np.array([[0.0, 1.0], [1.0, 0.0]]), np.array([70.0, 75.0]))
    assert np.isfinite(predictor.predict(np.array([[1.0, 0.0]])).mean).all()


def test_support_vectors_do_not_move_numpys_global_stream() -> None:
    before = np.random.get_state()[1].copy()
    svr_model(rows()[:20], np.arange(20.0), 1.0)
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_wrong_settings_are_named() -> None:
    with pytest.raises(UserError, match="'ridge', 'svr' or both"):
        Tuned(families=("forest",))
    with pytest.raises(UserError, match="folds"):
        Tuned(folds=1)
