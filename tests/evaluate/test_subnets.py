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


def test_what_subnets_have_in_common_is_computed_once() -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 16, 16), torch.randint(0, 4, (8,))) for _ in range(2)]
    elastic = Elastic(SmallResNet(3), batches[0][0][:2])
    rng = np.random.default_rng(0)
    parents = [elastic.space.sample(rng) for _ in range(4)]
    subnets = [*parents, *(elastic.space.mutate(parent, rng) for parent in parents for _ in range(8))]
    plain = SubnetEvaluator(elastic, batches)
    calls: list[int] = []
    hooks = [block.conv1.register_forward_hook(lambda *_: calls.append(1)) for block in elastic.model.layer1]  # type: ignore[union-attr]
    one_by_one = [plain.metrics(subnet) for subnet in subnets]
    alone, calls[:] = len(calls), []
    shared = SubnetEvaluator(elastic, batches)
    together = shared.metrics_of(subnets)
    assert shared.sharing and 0 < len(calls) < alone / 2
    for a, b in zip(one_by_one, together, strict=True):
        assert a["valid_accuracy"] == b["valid_accuracy"]
        assert a["valid_loss"] == pytest.approx(b["valid_loss"], rel=1e-6)
    assert len({round(a["valid_loss"], 7) for a in together}) > 10
    for hook in hooks:
        hook.remove()
    assert all("forward" not in vars(module) for module in elastic.modules())


class InPlace(SmallResNet):
    """Changes what its blocks return."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.bn(self.stem(x)))
        for block in (*self.layer1, *self.layer2):
            x = block(x)
            x.mul_(1.5)
        return self.fc(x.mean((2, 3)))


class Remembering(SmallResNet):
    """Depends on more than its input: on the call before."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.__dict__.setdefault("factor", 1.0)
        self.__dict__["factor"] += 0.5
        return super().forward(x)


@pytest.mark.parametrize(("kind", "shares"), [(InPlace, True), (Remembering, False)])
def test_outputs_that_are_changed_or_depend_on_more_are_not_shared(kind: type[SmallResNet], shares: bool) -> None:
    torch.manual_seed(0)
    batches = [(torch.randn(8, 3, 8, 8), torch.randint(0, 4, (8,)))]
    elastic = Elastic(kind(2), batches[0][0][:2], {"*conv1": [0.5, 1.0]})
    rng = np.random.default_rng(0)
    subnets = [elastic.space.sample(rng) for _ in range(12)]
    evaluator = SubnetEvaluator(elastic, batches)
    together = evaluator.metrics_of(subnets)
    assert evaluator.sharing == shares
    if shares:
        plain = SubnetEvaluator(elastic, batches)
        for subnet, found in zip(subnets, together, strict=True):
            assert found["valid_loss"] == pytest.approx(plain.metrics(subnet)["valid_loss"], rel=1e-5)


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
