"""The contract of a predictor: inherit ``PredictorContract`` in a test file and override the fixture ``make``."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.predictors import Predictor

Make = Callable[[int], Predictor]


class PredictorContract:
    """Laws of ``archsmith.predictors.Predictor``; override ``make``, and ``features`` where only some are accepted."""

    @pytest.fixture
    def make(self) -> Make:
        """Return a function from a seed to a fresh predictor."""
        raise NotImplementedError("override the fixture 'make'")

    @pytest.fixture
    def features(self) -> np.ndarray:
        """Return at least 40 distinct rows; the targets will be a noisy linear function of them."""
        return np.random.default_rng(0).integers(0, 2, (60, 8)).astype(float)

    @pytest.fixture
    def targets(self, features: np.ndarray) -> np.ndarray:
        """Return targets far from mean 0 and variance 1."""
        rng = np.random.default_rng(1)
        return 90 + 5 * features @ rng.normal(size=features.shape[1]) + 0.1 * rng.normal(size=len(features))

    def test_learns_and_answers_in_the_units_of_fit(
        self, make: Make, features: np.ndarray, targets: np.ndarray
    ) -> None:
        """On rows left out it beats the mean; shapes, types and signs are those of the contract."""
        model = make(0)
        model.fit(features[:-15], targets[:-15])
        found = model.predict(features[-15:])
        for array in (found.mean, found.std):
            assert array.shape == (15,) and array.dtype == np.float64 and np.isfinite(array).all()
        assert (found.std >= 0).all()
        error = np.mean((found.mean - targets[-15:]) ** 2)
        assert error < 0.8 * np.mean((targets[:-15].mean() - targets[-15:]) ** 2)

    def test_same_seed_same_answer(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """Two predictors of one seed agree bit by bit, whatever numpy's global stream does; fitting again forgets."""
        first, second = make(3), make(3)
        second.fit(features[::2], -targets[::2])
        first.fit(features, targets)
        np.random.seed(99)
        before = np.random.get_state()[1].copy()  # type: ignore[index]
        second.fit(features, targets)
        one, two = first.predict(features), second.predict(features)
        assert (np.random.get_state()[1] == before).all()  # type: ignore[index]
        np.testing.assert_array_equal(one.mean, two.mean)
        np.testing.assert_array_equal(one.std, two.std)

    def test_inputs_are_left_alone(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """Neither fit nor predict write into the arrays they are given, nor follow later changes of them."""
        x, y = features.copy(), targets.copy()
        model = make(0)
        model.fit(x, y)
        expected = model.predict(features).mean
        np.testing.assert_array_equal(x, features)
        np.testing.assert_array_equal(y, targets)
        x[:], y[:] = 0.5, 0.0
        np.testing.assert_array_equal(model.predict(features).mean, expected)

    def test_rows_are_predicted_alone(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """What is said about a row does not depend on its company; no rows give no answers."""
        model = make(0)
        model.fit(features, targets)
        together = model.predict(features)
        alone = model.predict(features[7:8])
        assert alone.mean[0] == pytest.approx(together.mean[7], rel=1e-5)
        assert alone.std[0] == pytest.approx(together.std[7], rel=1e-4, abs=1e-4)
        assert model.predict(features[:0]).mean.shape == (0,)

    def test_single_example_and_constant_targets(self, make: Make, features: np.ndarray) -> None:
        """Nothing to learn: the value itself, without uncertainty."""
        for n, value in ((1, 91.6), (len(features), 0.1)):
            model = make(0)
            model.fit(features[:n], np.full(n, value))
            found = model.predict(features)
            assert (found.mean == value).all() and (found.std == 0).all()

    def test_two_examples(self, make: Make, features: np.ndarray) -> None:
        """The least that can be learned from gives finite answers."""
        model = make(0)
        model.fit(features[:2], np.array([1.0, 2.0]))
        found = model.predict(features)
        assert np.isfinite(found.mean).all() and np.isfinite(found.std).all()

    def test_duplicate_rows(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """Rows seen twice, with different targets, are neither an error nor a source of infinities."""
        model = make(0)
        model.fit(np.concatenate([features, features]), np.concatenate([targets, targets + 1.0]))
        found = model.predict(features)
        assert np.isfinite(found.mean).all() and np.isfinite(found.std).all()
        assert np.corrcoef(found.mean, targets)[0, 1] > 0.5

    def test_constant_columns(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """Features without any variation say nothing: all predictions are equal, and finite."""
        model = make(0)
        model.fit(np.repeat(features[:1], len(targets), axis=0), targets)
        found = model.predict(np.repeat(features[:1], 5, axis=0))
        assert np.ptp(found.mean) <= 1e-6 and np.isfinite(found.mean).all() and np.isfinite(found.std).all()

    def test_bad_input_is_named(self, make: Make, features: np.ndarray, targets: np.ndarray) -> None:
        """NaN, infinities, wrong shapes, no examples, predict before fit."""
        model = make(0)
        with pytest.raises(UserError, match="predict: got a call before fit"):
            model.predict(features)
        broken = targets.copy()
        broken[3] = np.nan
        with pytest.raises(UserError, match=r"targets: got nan at \(3,\); allowed: finite numbers"):
            model.fit(features, broken)
        infinite = features.copy()
        infinite[2, 1] = np.inf
        with pytest.raises(UserError, match=r"features: got inf at \(2, 1\)"):
            model.fit(infinite, targets)
        with pytest.raises(UserError, match="targets: got shape"):
            model.fit(features, targets[:-1])
        with pytest.raises(UserError, match="targets: got shape"):
            model.fit(features[:0], targets[:0])
        with pytest.raises(UserError, match="features: got shape"):
            model.fit(features[0], targets[:1])
        model.fit(features, targets)
        with pytest.raises(UserError, match="features: got shape"):
            model.predict(features[:, :-1])
        with pytest.raises(UserError, match="features: got inf"):
            model.predict(infinite)
