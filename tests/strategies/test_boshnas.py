import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.predictors.boshnas import BoshnasSurrogate, published_surrogate
from archsmith.space import Ordinal, ProductSpace, Result
from archsmith.strategies.boshnas import Boshnas
from archsmith.strategies.candidates import CandidatePool

SPACE = ProductSpace("grid", {name: Ordinal(tuple(range(8))) for name in ("x", "y", "z")})


def features(architecture):
    return np.array([float(architecture[name]) for name in ("x", "y", "z")])


POOL = CandidatePool(SPACE.enumerate(), features)


def value(architecture):
    return float(features(architecture).sum())


def searched(search, count):
    kinds, values = [], []
    for _ in range(count):
        for trial in search.ask():
            kinds.append(trial.info["kind"])
            values.append(value(trial.architecture))
            search.tell(trial.id, Result(metrics={"valid_accuracy": values[-1]}))
    return kinds, values


def quick(seed):
    return BoshnasSurrogate(epochs=80, seed=seed)


@pytest.mark.slow
def test_on_a_slope_descent_runs_into_the_corner():
    # An easy landscape: on a narrow quadratic of this grid 25 evaluations were no better than chance.
    ours, chance = [], []
    for seed in range(2):
        search = Boshnas(SPACE, pool=POOL, initial=8, starts=4, steps=30, refit=1.2, surrogate=quick, seed=seed)
        ours.append(max(searched(search, 13)[1]))
        drawn = np.random.default_rng(seed).permutation(len(POOL))[:13]
        chance.append(max(value(POOL.architectures[int(at)]) for at in drawn))
    assert np.mean(ours) > np.mean(chance) + 1, (ours, chance)


def test_rounds_are_mixed_as_published():
    def shallow(seed):
        return BoshnasSurrogate(epochs=1, seed=seed)

    search = Boshnas(SPACE, pool=POOL, starts=1, steps=1, refit=2.0, surrogate=shallow, seed=0)
    kinds = searched(search, 210)[0]
    assert set(kinds[:10]) == {"random"}
    counts = [kinds[10:].count(kind) for kind in ("exploit", "uncertain", "random")]
    for count, share in zip(counts, (0.8, 0.1, 0.1), strict=True):
        assert abs(count - 200 * share) < 4 * (200 * share * (1 - share)) ** 0.5, counts


def test_it_converges_by_its_rule():
    search = Boshnas(
        SPACE,
        pool=POOL,
        initial=2,
        exploit=1.0,
        uncertain=0.0,
        patience=3,
        stops=True,
        starts=1,
        steps=1,
        surrogate=lambda seed: BoshnasSurrogate(epochs=1, seed=seed),
    )
    phases = []
    for number in range(20):
        for trial in search.ask():
            phases.append(search.aleatoric)
            search.tell(trial.id, Result(metrics={"valid_accuracy": -float(number)}))  # the first is the best
    assert search.done and search.ask() == []
    assert phases == [False] * (2 + 3) + [True] * 3


def test_the_published_fit_is_one_example_per_update():
    fit = published_surrogate(seed=1)
    assert (fit.batch_size, fit.learning_rates, fit.student, fit.reshuffle) == (1, (5e-5, 2e-3, 2e-3), "sgd", True)
    assert (fit.epochs, fit.patience, fit.validation) == (200, 7, 0.2)


def test_the_student_knows_how_unsure_the_teacher_is():
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(60, 4))
    fit = BoshnasSurrogate(unlabelled=rows, seed=0)
    fit.fit(rows[:20], rows[:20] @ np.array([1.0, -2.0, 0.5, 0.0]))
    std = fit.predict(rows).std
    assert 0.005 < std.mean() / np.ptp(rows[:20] @ np.array([1.0, -2.0, 0.5, 0.0])) < 0.2
    assert std.std() > 0


@pytest.mark.parametrize(
    ("wrong", "text"),
    [({"exploit": 1.5}, "exploit: got 1.5; allowed: a number from 0 to 1"), ({"uncertain": 0.5}, "uncertain"),
     ({"initial": 1}, "initial"), ({"trust": 2.0}, "trust"), ({"patience": 0}, "patience")],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong, text):
    with pytest.raises(UserError, match=text):
        Boshnas(SPACE, **wrong)
