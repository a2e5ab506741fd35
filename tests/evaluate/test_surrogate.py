from __future__ import annotations

import numpy as np
import pytest
from ofa_samples import GOLDEN, SPACE, black_box, columns, evaluations

from archsmith.core.errors import UserError
from archsmith.evaluate.surrogate import KernelSurrogate, SurrogateEvaluator
from archsmith.families.ofa_mobile_space import uniform_decisions
from archsmith.space import Trial
from archsmith.testing.strategies import flat_space


def test_the_black_box_is_the_published_one() -> None:
    expected = GOLDEN["surrogate"]["expected"]
    probes = [
        SPACE.validate(uniform_decisions(probe["ks"], probe["e"], probe["d"]))
        for probe in GOLDEN["surrogate"]["input"]["probes_uniform_settings"]
    ]
    assert black_box().values(probes) == pytest.approx(np.array(expected["probe_values"]), abs=1e-4)
    first = [row[0] for row in evaluations()[:3]]
    assert black_box().values(first) == pytest.approx(np.array(expected["first_row_values"]), abs=1e-4)


def test_without_a_ridge_it_goes_through_its_points() -> None:
    places = list({row[0].digest: at for at, row in enumerate(evaluations()[::40])}.values())  # no network twice
    architectures = [evaluations()[::40][at][0] for at in places]
    measured = {name: [values[::40][at] for at in places] for name, values in columns().items()}
    exact = KernelSurrogate(SPACE, architectures, measured, ridge=0.0)
    assert exact.values(architectures) == pytest.approx(np.stack(list(measured.values()), axis=1), rel=1e-6)


def test_trials_are_answered_by_metrics_and_costs() -> None:
    evaluator = SurrogateEvaluator(black_box())
    architecture = evaluations()[5][0]
    result = evaluator.evaluate(Trial(id=1, architecture=architecture))
    macs, accuracy = black_box().values([architecture])[0]
    assert (dict(result.costs), dict(result.metrics)) == ({"macs": macs}, {"valid_accuracy": accuracy})
    with pytest.raises(UserError, match="no fidelity"):
        evaluator.evaluate(Trial(id=1, architecture=architecture, fidelity=3.0))
    with pytest.raises(UserError, match="the space it is used in"):
        evaluator.evaluate(Trial(id=1, architecture=flat_space().sample(np.random.default_rng(0))))


def test_columns_must_fit() -> None:
    architectures = [row[0] for row in evaluations()[:3]]
    for wrong in ([1.0, 2.0], [1.0, 2.0, np.nan]):
        with pytest.raises(UserError, match="as many finite numbers"):
            KernelSurrogate(SPACE, architectures, {"macs": wrong})
