"""Once-for-All's elastic ResNet50: its space, its published sizes, and what its predictor says."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.evaluate.ofa_resnet_predictor import OfaResnetPredictor
from archsmith.families.ofa_resnet_space import exact_costs, ofa_resnet_space, uniform_decisions
from archsmith.space import Trial

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "hw-aware-system.json").read_text(encoding="utf-8"))
SPACE = ofa_resnet_space()
LARGEST, SMALLEST = (SPACE.validate(uniform_decisions(*each)) for each in ((2, 0.35, 1.0), (0, 0.2, 0.65)))


def test_the_space_has_the_published_size():
    published = GOLDEN["encodings"]["ofa_resnet50"]
    assert len(SPACE.paths) == published["n_variables"]
    assert len(SPACE.encode(LARGEST, "one-hot")) == published["onehot_length"]
    assert math.log10(3) * len(SPACE.paths) == pytest.approx(published["log10_size"], abs=1e-6)
    # Distinct networks decide no expansion of a block that does not exist: per stage 3^f (1 + 3 + 9) with its widths.
    assert SPACE.size == 3 * 3**2 * math.prod(3 * 3**fewest * (1 + 3 + 9) for fewest in (2, 2, 4, 2))


def test_networks_have_the_published_sizes():
    published = GOLDEN["network_sizes"]["resnet50"]
    for architecture, name in ((LARGEST, "max"), (SMALLEST, "min_d0_e0.2_w0")):
        costs = exact_costs(architecture)
        assert [costs["params"], costs["macs"]] == published[name]
    assert published["supernet_params"] == exact_costs(LARGEST)["params"]


def test_every_decision_costs_what_it_adds():
    rng = np.random.default_rng(0)
    low, high = exact_costs(SMALLEST), exact_costs(LARGEST)
    for _ in range(50):
        costs = exact_costs(SPACE.sample(rng))
        assert all(low[name] < costs[name] < high[name] for name in costs)
    assert exact_costs(LARGEST, side=112)["params"] == high["params"]
    assert exact_costs(LARGEST, side=112)["macs"] < 0.3 * high["macs"]
    with pytest.raises(UserError, match="side: got 16; allowed: at least 32"):
        exact_costs(LARGEST, side=16)


def test_predictions_rise_with_every_width_and_image_size():
    """What makes the reading of the inputs believable; random networks, means over the others' decisions."""
    data = shared_data("nas-benchmarks")
    predictor = OfaResnetPredictor(data)
    rng = np.random.default_rng(1)
    drawn = [SPACE.sample(rng) for _ in range(1_500)]
    accuracies = predictor.accuracy(drawn)
    for path in (path for path in SPACE.paths if path.startswith("stage") and path.endswith("width")):
        means = [accuracies[[each[path] == width for each in drawn]].mean() for width in (0.65, 0.8, 1.0)]
        assert means == sorted(means), path
    sizes = [OfaResnetPredictor(data, side=side).accuracy(drawn[:50]).mean() for side in range(112, 225, 16)]
    assert sizes[:6] == sorted(sizes[:6]) and sizes[5] - sizes[0] > 3
    assert abs(sizes[7] - sizes[5]) < 0.1  # from 192 pixels on it stays
    largest, smallest = predictor.accuracy([LARGEST, SMALLEST])
    assert smallest < accuracies.mean() < largest
    trial = Trial(id=1, architecture=LARGEST, fidelity=None, parent=None, seed=0, info={})
    result = predictor.evaluate(trial)
    assert result.metrics["valid_accuracy"] == largest and result.costs["macs"] == 7491643904


def test_what_is_not_the_predictor_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"ofa-resnet50-accuracy-predictor\.npz \(no such file\)"):
        OfaResnetPredictor(tmp_path)
    np.savez(tmp_path / "ofa-resnet50-accuracy-predictor.npz", other=np.zeros(3))
    with pytest.raises(UserError, match="allowed: the published file, whole"):
        OfaResnetPredictor(tmp_path)
    with pytest.raises(UserError, match="side: got 100; allowed: 112 to 224 in steps of 16"):
        OfaResnetPredictor(tmp_path, side=100)
