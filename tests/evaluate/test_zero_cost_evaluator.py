"""The zero-cost evaluator: one build, all scores; failures are results; wrong use is refused."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.zero_cost import SCORES, Batch, ZeroCostEvaluator, naswot
from archsmith.families.cells import NasBench201Family
from archsmith.space import Architecture, Objective, Trial

FAMILY = NasBench201Family(image=(3, 8, 8), num_classes=4, channels=4, cells=1)
BATCH = Batch(torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3, 0, 1]))
CHEAP = [name for name in SCORES if name != "zen"]


def trial(seed=0, number=0, **fields):
    architecture = FAMILY.space.sample(np.random.default_rng(number))
    return Trial(**{"id": number, "architecture": architecture, "seed": seed, **fields})


class Counting(NasBench201Family):
    """Counts what it builds."""

    built = 0

    def build(self, architecture, *, seed=None):
        Counting.built += 1
        return super().build(architecture, seed=seed)


class Crashing(NasBench201Family):
    """Builds networks without a ReLU, or none at all."""

    def build(self, architecture, *, seed=None):
        if architecture["edge/0-1"] == "none":
            raise MemoryError("no room for it")
        return nn.Sequential(nn.Flatten(), nn.Linear(192, 4))


def test_it_keeps_the_contract():
    assert isinstance(ZeroCostEvaluator(FAMILY, BATCH, scores=["naswot"]), Evaluator)


def test_all_scores_come_from_one_network():
    family = Counting(image=(3, 8, 8), num_classes=4, channels=4, cells=1)
    Counting.built = 0
    result = ZeroCostEvaluator(family, BATCH, scores=CHEAP).evaluate(trial())
    assert Counting.built == 1
    assert list(result.metrics) == CHEAP
    assert result.status == "ok" and result.seconds > 0
    costs = FAMILY.exact_costs(trial().architecture)
    assert dict(result.costs) == {name: costs[name] for name in ("params", "macs")}
    assert Objective("macs", "minimize").value(result) == costs["macs"]


def test_a_result_depends_on_the_trial_alone():
    evaluator = ZeroCostEvaluator(FAMILY, BATCH, scores=["naswot", "snip", "zen"])
    first = evaluator.evaluate(trial())
    evaluator.evaluate(trial(seed=1, number=3))
    torch.manual_seed(99)
    again = pickle.loads(pickle.dumps(evaluator)).evaluate(trial())  # noqa: S301
    assert again.metrics == first.metrics
    other = evaluator.evaluate(trial(seed=1))
    assert all(other.metrics[name] != value for name, value in first.metrics.items())
    alone = ZeroCostEvaluator(FAMILY, BATCH, scores=["zen"]).evaluate(trial())
    assert alone.metrics["zen"] == first.metrics["zen"]


def test_without_a_batch_the_shape_has_to_do():
    result = ZeroCostEvaluator(FAMILY, scores=["synflow", "params"]).evaluate(trial())
    assert result.metrics == ZeroCostEvaluator(FAMILY, BATCH, scores=["synflow", "params"]).evaluate(trial()).metrics


def test_infinite_scores_are_scores():
    none = Architecture(dict.fromkeys(FAMILY.smallest(), "none"), space="nas-bench-201")
    result = ZeroCostEvaluator(FAMILY, BATCH, scores=["naswot"]).evaluate(trial(architecture=none))
    assert (result.status, result.metrics["naswot"]) == ("ok", -math.inf)


def test_what_goes_wrong_inside_is_a_failed_result():
    evaluator = ZeroCostEvaluator(Crashing(image=(3, 8, 8), num_classes=4), BATCH, scores=["params", "naswot"])
    whole = Architecture({**trial().architecture, "edge/0-1": "skip_connect"}, space="nas-bench-201")
    result = evaluator.evaluate(trial(architecture=whole))
    assert result.status == "failed" and result.seconds > 0
    assert result.reason.startswith("naswot: UserError: network: got a Sequential without nn.ReLU")
    broken = Architecture({**whole, "edge/0-1": "none"}, space="nas-bench-201")
    reason = evaluator.evaluate(trial(architecture=broken)).reason
    assert reason == "building the network: MemoryError: no room for it"


@pytest.mark.parametrize(
    ("scores", "batch", "text"),
    [
        (["naswot", "magic"], BATCH, r"scores: got \['naswot', 'magic'\]; allowed: some of .*synflow.*, each once"),
        (["snip", "snip"], BATCH, r"scores: got \['snip', 'snip'\]; allowed: .*each once"),
        ([], BATCH, r"scores: got \[\]"),
        (["synflow", "snip"], None, r"batch: got None; allowed: a Batch, because snip look"),
        (["snip"], Batch(torch.zeros(2, 1, 8, 8), torch.zeros(2)), r"batch: got images of shape \(1, 8, 8\); allowed"),
    ],
)
def test_wrong_settings_are_refused(scores, batch, text):
    with pytest.raises(UserError, match=text):
        ZeroCostEvaluator(FAMILY, batch, scores=scores)


def test_wrong_trials_are_refused():
    evaluator = ZeroCostEvaluator(FAMILY, BATCH, scores=["naswot"])
    with pytest.raises(UserError, match=r"trial.fidelity: got 12; allowed: None"):
        evaluator.evaluate(trial(fidelity=12))
    with pytest.raises(UserError, match=r"architecture.space"):
        evaluator.evaluate(trial(architecture=Architecture({"a": 1}, space="other")))


def test_the_evaluator_gives_what_the_function_gives():
    from archsmith.core.rng import seed_of

    network = FAMILY.build(trial(7).architecture, seed=seed_of(7, "weights"))
    expected = naswot(network, BATCH, torch.Generator())
    assert ZeroCostEvaluator(FAMILY, BATCH, scores=["naswot"]).evaluate(trial(7)).metrics["naswot"] == expected
