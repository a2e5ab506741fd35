"""One-shot scores are deterministic, leave the supernet alone, and are those of the extracted network."""

from __future__ import annotations

import math
import pickle

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import nn

from archsmith.core.errors import UserError
from archsmith.evaluate.base import Evaluator
from archsmith.evaluate.one_shot import OneShotEvaluator, validation_metrics
from archsmith.families.cells import NasBench201Family, random_path
from archsmith.space import Architecture, Trial
from archsmith.train.single_path import train_single_path

FAMILY = NasBench201Family(image=(1, 8, 8), num_classes=10, channels=8, cells=1)
NORMS = ("batch", "recalibrated", "running")


def digits():
    """Return batches of real handwritten digits: training, validation."""
    x, y = load_digits(return_X_y=True)
    images = torch.from_numpy(x).float().view(-1, 1, 8, 8) / 8 - 1
    labels = torch.from_numpy(y).long()
    order = torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    train, valid = order[:1280], order[1280:1600]
    return (
        [(images[rows], labels[rows]) for rows in train.split(64)],
        [(images[rows], labels[rows]) for rows in valid.split(80)],
    )


@pytest.fixture(scope="module")
def trained():
    """A supernet trained by single paths for six epochs, its losses, and the data."""
    train, valid = digits()
    supernet = FAMILY.supernet(seed=0)
    optimizer = torch.optim.SGD(supernet.parameters(), lr=0.1, momentum=0.9, nesterov=True)
    losses = train_single_path(supernet, train * 6, optimizer, random_path, rng=np.random.default_rng(0))
    return supernet, losses, train, valid


def evaluator(trained, norm):
    supernet, _, train, valid = trained
    return OneShotEvaluator(supernet, valid, norm=norm, calibration=[images for images, _ in train[:5]])


def trial(number=0, **fields):
    return Trial(**{"id": number, "architecture": random_path(np.random.default_rng(number)), **fields})


def test_training_by_single_paths_learns(trained):
    _, losses, _, _ = trained
    assert len(losses) == 120
    assert np.mean(losses[-20:]) < 0.5 * np.mean(losses[:20])


@pytest.mark.parametrize("norm", NORMS)
def test_a_score_is_that_of_the_extracted_network(trained, norm):
    supernet, _, train, valid = trained
    calibration = [images for images, _ in train[:5]]
    for number in range(3):
        found = evaluator(trained, norm).evaluate(trial(number))
        network = supernet.extract(trial(number).architecture)
        alone = validation_metrics(network, valid, norm=norm, calibration=calibration)
        assert found.metrics["valid_accuracy"] == alone["valid_accuracy"]
        assert found.metrics["valid_loss"] == pytest.approx(alone["valid_loss"], rel=1e-5)
        assert found.seconds > 0


@pytest.mark.parametrize("norm", NORMS)
def test_scores_depend_on_the_trial_alone_and_change_nothing(trained, norm):
    supernet, _, _, _ = trained
    supernet.train()
    supernet.network.stem_norm.eval()
    before = {name: tensor.clone() for name, tensor in supernet.state_dict().items()}
    modes = [module.training for module in supernet.modules()]
    momenta = [m.momentum for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)]
    scorer = evaluator(trained, norm)
    first = scorer.evaluate(trial(1))
    scorer.evaluate(trial(2))
    assert scorer.evaluate(trial(1)).metrics == first.metrics
    assert pickle.loads(pickle.dumps(scorer)).evaluate(trial(1)).metrics == first.metrics  # noqa: S301
    assert all(torch.equal(tensor, before[name]) for name, tensor in supernet.state_dict().items())
    assert [module.training for module in supernet.modules()] == modes
    assert [m.momentum for m in supernet.modules() if isinstance(m, nn.BatchNorm2d)] == momenta


def test_a_trained_path_is_better_than_one_without_a_path(trained):
    whole = evaluator(trained, "batch").evaluate(trial(architecture=FAMILY.largest()))
    nothing = Architecture(dict.fromkeys(FAMILY.largest(), "none"), space="nas-bench-201")
    empty = evaluator(trained, "batch").evaluate(trial(architecture=nothing))
    assert whole.metrics["valid_accuracy"] > 0.6
    assert empty.metrics["valid_accuracy"] < 0.25


def test_metrics_are_accuracy_and_mean_loss():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.flatten(1)

    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [0.0, 3.0]]).view(3, 2, 1, 1)
    labels = torch.tensor([0, 0, 1])
    expected = sum(math.log(1 + math.exp(margin)) for margin in (-2.0, 1.0, -3.0)) / 3
    for batches in ([(logits, labels)], [(logits[:2], labels[:2]), (logits[2:], labels[2:])]):
        found = validation_metrics(Fixed(), batches)
        assert found["valid_accuracy"] == pytest.approx(2 / 3)
        assert found["valid_loss"] == pytest.approx(expected, rel=1e-6)


def test_what_normalisations_do():
    norm = nn.BatchNorm2d(2, affine=False)
    network = nn.Sequential(norm, nn.Flatten())
    norm.running_mean.copy_(torch.tensor([5.0, 0.0]))
    logits = torch.tensor([[4.0, 0.0], [6.0, 0.0]]).view(2, 2, 1, 1)
    batches = [(logits, torch.tensor([1, 0]))]
    norm.num_batches_tracked.fill_(100)
    assert validation_metrics(network, batches, norm="batch")["valid_accuracy"] == 1.0  # -1 and 1, around their mean
    assert validation_metrics(network, batches, norm="running")["valid_accuracy"] == 1.0  # around 5 too
    # Calibrated on {-1, 1} and {3, 5}: mean 2 and variance 2, the plain averages of both batches.
    pair = torch.tensor([[1.0, 1.0], [-1.0, -1.0]])
    calibration = [(pair + torch.tensor([shift, 0.0])).view(2, 2, 1, 1) for shift in (0.0, 4.0)]
    found = validation_metrics(network, batches, norm="recalibrated", calibration=calibration)
    margins = [(4 - 2) / math.sqrt(2), -(6 - 2) / math.sqrt(2)]
    assert found["valid_loss"] == pytest.approx(sum(math.log(1 + math.exp(m)) for m in margins) / 2, rel=1e-4)
    assert found["valid_accuracy"] == 0.5
    assert (norm.running_mean.tolist(), int(norm.num_batches_tracked)) == ([5.0, 0.0], 100)


def test_a_path_that_fails_is_a_failed_result(trained):
    supernet, _, _, valid = trained
    broken = pickle.loads(pickle.dumps(supernet))  # noqa: S301
    with torch.no_grad():
        broken.network.classifier.bias.fill_(math.nan)
    result = OneShotEvaluator(broken, valid).evaluate(trial())
    assert (result.status, result.reason) == ("failed", "the validation loss is nan")
    wrong = [(images.expand(-1, 2, -1, -1), labels) for images, labels in valid]
    result = OneShotEvaluator(supernet, wrong).evaluate(trial())
    assert result.status == "failed" and "Error" in result.reason


def test_wrong_use_is_refused(trained):
    supernet, _, _, valid = trained
    assert isinstance(OneShotEvaluator(supernet, valid), Evaluator)
    with pytest.raises(UserError, match=r"norm: got 'fixed'; allowed: batch or recalibrated or running"):
        OneShotEvaluator(supernet, valid, norm="fixed")
    with pytest.raises(UserError, match=r"batches: got \[\]; allowed: at least one batch"):
        OneShotEvaluator(supernet, [])
    with pytest.raises(UserError, match=r"calibration: got \[\]; allowed: at least one batch of training images"):
        OneShotEvaluator(supernet, valid, norm="recalibrated")
    with pytest.raises(UserError, match=r"supernet: got a Linear; allowed: an nn.Module with space"):
        OneShotEvaluator(nn.Linear(1, 1), valid)
    with pytest.raises(UserError, match=r"trial.fidelity: got 3; allowed: None"):
        OneShotEvaluator(supernet, valid).evaluate(trial(fidelity=3))
    with pytest.raises(UserError, match=r"architecture.space"):
        OneShotEvaluator(supernet, valid).evaluate(trial(architecture=Architecture({"a": 1}, space="b")))
