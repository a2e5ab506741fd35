"""Many subnets on one validation set."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.subnets import SubnetEvaluator, classified
from archsmith.space import Trial
from archsmith.supernet.elastic import Elastic
from archsmith.train.calibration import calibrate_
from tests import transformers_nets
from tests.elastic_samples import SmallResNet, architectures


def test_scores_are_those_of_the_extracted_networks() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(16, 3, 16, 16), torch.randint(0, 4, (16,))) for _ in range(2)]
    calibration = [torch.randn(8, 3, 16, 16) for _ in range(2)]
    elastic = Elastic(
        SmallResNet(2),
        batches[0][0][:2],
        {"width": [0.5, 1.0], "resolution": [8, 16], "layer1.depth": [1, 2], "layer2.depth": [0, 1]},
    )
    evaluator = SubnetEvaluator(elastic, batches, calibration=calibration)
    assert isinstance(evaluator, Evaluator)
    found = set()
    for number, architecture in enumerate(architectures(elastic, 4)):
        result = evaluator.evaluate(Trial(id=number, architecture=architecture))
        alone = elastic.extract(architecture)
        side = architecture["resolution"]
        calibrate_(alone, elastic.resized(calibration, side))
        wanted = classified(alone, elastic.resized(batches, side))
        assert result.metrics["valid_accuracy"] == wanted["valid_accuracy"]
        assert result.metrics["valid_loss"] == pytest.approx(wanted["valid_loss"], rel=1e-5)
        assert result.costs["params"] == sum(p.numel() for p in alone.parameters())
        found.add(round(wanted["valid_loss"], 6))
    assert len(found) > 3


def test_a_subnet_is_run_once_and_again_when_the_weights_changed() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))]
    elastic = Elastic(SmallResNet(2), batches[0][0])
    calls = []
    elastic.register_forward_hook(lambda *_: calls.append(1))
    evaluator = SubnetEvaluator(elastic, batches)
    first = evaluator.metrics(elastic.smallest())
    evaluator.metrics(elastic.canonical(elastic.smallest()))
    assert len(calls) == 1
    with torch.no_grad():
        elastic.model.fc.weight.mul_(3)  # type: ignore[union-attr]
    evaluator.forget()
    assert evaluator.metrics(elastic.smallest()) != first and len(calls) == 2


def test_inputs_by_name_and_logits_inside() -> None:
    torch.manual_seed(0)
    model, inputs = transformers_nets.vit()
    elastic = Elastic(model, inputs)
    evaluator = SubnetEvaluator(elastic, [(inputs, torch.tensor([0, 1]))], logits=lambda found: found.logits)
    assert 0 <= evaluator.metrics(elastic.space.sample(np.random.default_rng(0)))["valid_accuracy"] <= 1


def test_what_can_not_be_scored_is_refused() -> None:
    x = torch.randn(2, 3, 8, 8)
    elastic = Elastic(SmallResNet(2), x)
    for batches in ([], [(x[:0], torch.zeros(0, dtype=torch.long))]):
        with pytest.raises(UserError, match="at least one batch"):
            SubnetEvaluator(elastic, batches)
    evaluator = SubnetEvaluator(elastic, [(x, torch.tensor([0, 1]))])
    with pytest.raises(UserError, match="no fidelity"):
        evaluator.evaluate(Trial(id=0, architecture=elastic.smallest(), fidelity=1))
    with pytest.raises(UserError, match="dimensions of"):
        evaluator.metrics({**elastic.smallest(), "nothing": 1})
