"""Batch statistics of one network, taken as plain averages over batches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.supernet.elastic import Elastic
from archsmith.train.average import recalibrate
from archsmith.train.calibration import calibrate_, hold_statistics_
from tests.elastic_samples import SmallResNet, gap, outputs

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "elastic.json").read_text())


def test_statistics_are_plain_averages_with_the_unbiased_variance() -> None:
    norm = nn.BatchNorm2d(2).double()
    batches = []
    for b in range(3):
        rows = [[[b + 1, 2], [3, 4]], [[0, b], [1, -1]]]
        batches.append(torch.tensor([rows], dtype=torch.float64))
    calibrate_(norm, batches)
    expected = GOLDEN["bn-calibration-cumulative"]
    assert norm.running_mean.tolist() == pytest.approx(expected["running_mean"], abs=1e-9)
    assert norm.running_var.tolist() == pytest.approx(expected["running_var"], abs=1e-9)
    assert norm.momentum == 0.1 and not norm.training


def test_batches_of_different_size_count_the_same() -> None:
    norm = nn.BatchNorm1d(1)
    calibrate_(norm, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0]] * 10)])
    assert norm.running_mean.item() == pytest.approx((1 + 4) / 2)


def test_training_without_accumulation_leaves_the_running_statistics() -> None:
    net = hold_statistics_(SmallResNet().train())
    before = {name: buffer.clone() for name, buffer in net.named_buffers() if "num_batches" not in name}
    net(torch.randn(4, 3, 8, 8))
    assert all(torch.equal(before[name], net.get_buffer(name)) for name in before)


def test_a_childs_statistics_are_its_own() -> None:
    torch.manual_seed(0)
    elastic = Elastic(SmallResNet(), torch.randn(2, 3, 8, 8))
    batches = [torch.randn(6, 3, 8, 8) + 1 for _ in range(3)]
    for architecture in (elastic.smallest(), elastic.largest()):
        alone = elastic.extract(architecture)
        recalibrate(alone, batches)
        elastic.activate(architecture)
        calibrate_(elastic, batches)
        assert gap(outputs(elastic, batches[0]), outputs(alone, batches[0])) < 1e-5
        assert gap(outputs(elastic.extract(architecture).eval(), batches[0]), outputs(alone, batches[0])) < 1e-5


def test_inputs_may_be_arguments_or_a_mapping_and_nothing_is_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(2)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.norm(x + y)

    x, y = torch.randn(4, 2), torch.randn(4, 2)
    first, second = calibrate_(Two(), [(x, y)]), calibrate_(Two(), [{"y": y, "x": x}])
    assert torch.equal(first.norm.running_mean, second.norm.running_mean)  # type: ignore[union-attr]
    with pytest.raises(UserError, match="at least one batch"):
        calibrate_(Two(), [])
    with pytest.raises(UserError, match="a tensor, a tuple"):
        calibrate_(Two(), [3])
