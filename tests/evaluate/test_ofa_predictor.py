from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from ofa_samples import evaluations
from scipy.stats import kendalltau
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.evaluate.ofa_predictor import LATENCY_FILE, OfaLatency, OfaPredictor, OfaPredictorEvaluator
from archsmith.space import Trial


@pytest.fixture(scope="module")
def evaluator() -> OfaPredictorEvaluator:
    folder = shared_data("nas-benchmarks")
    return OfaPredictorEvaluator(OfaPredictor(folder), OfaLatency(folder))


def published() -> dict[str, dict]:
    nets = json.loads((shared_data("nas-benchmarks") / "ofa-specialized-subnets.json").read_text())["nets"]
    return {net["name"]: net for net in nets}


def decisions(net: dict) -> dict[str, int]:
    """The decisions of a published specialised network: a block that does not skip begins a unit."""
    found, unit, place = {"resolution": net["image_size"]}, -1, 0
    for block in net["blocks"][1:]:
        unit, place = (unit, place) if block["skip"] else (unit + 1, 0)
        found[f"stage/{unit}/{place}/kernel"], found[f"stage/{unit}/{place}/expand"] = block["k"], block["e"]
        place += 1
        found[f"stage/{unit}/depth"] = place
    return found


@pytest.mark.parametrize(("name", "mmacs"), [("flops-389M", 389), ("flops-482M", 482)])
def test_published_networks_have_the_macs_in_their_names(evaluator, name: str, mmacs: int) -> None:
    net = next(net for key, net in published().items() if key.startswith(name))
    costs = evaluator.exact_costs(evaluator.space.validate(decisions(net)))
    assert costs["macs"] // 10**6 == mmacs


def test_a_published_phone_network_has_the_latency_in_its_name(evaluator) -> None:
    net = next(net for key, net in published().items() if key.startswith("note10_lat-30ms"))
    assert net["latency_ms"] == 30.0
    assert evaluator.exact_costs(decisions(net))["latency"] == pytest.approx(30.0, abs=0.5)


def test_the_predictor_ranks_networks_as_their_measured_accuracies_do(evaluator) -> None:
    """The order of its inputs is not written anywhere: any other makes the agreement fall."""
    rows = evaluations()
    measured = [row[3] for row in rows]
    sized = [{**row[0], "resolution": 224} for row in rows]
    features = OfaPredictor.features(sized)
    assert features.sum() == sum(len(row[0]) - 5 + 1 for row in rows)
    agreement = kendalltau(evaluator.accuracy(sized), measured)[0]
    assert agreement == pytest.approx(0.8855, abs=1e-3)
    exchanged = [
        {p: {3: 3, 5: 4, 7: 6}[row[0][p.replace("expand", "kernel")]] if "expand" in p else v for p, v in net.items()}
        for row, net in zip(rows, sized, strict=True)
    ]
    assert kendalltau(evaluator.accuracy(exchanged), measured)[0] < agreement


def test_trials_have_accuracy_and_exact_costs(evaluator) -> None:
    architecture = evaluator.space.sample(np.random.default_rng(0))
    result = evaluator.evaluate(Trial(id=1, architecture=architecture))
    assert set(result.costs) == {"macs", "params", "latency"}
    assert 70 < result.metrics["valid_accuracy"] < 90
    larger = evaluator.space.validate({**architecture, "resolution": 224})
    smaller = evaluator.space.validate({**architecture, "resolution": 160})
    for cost in ("macs", "latency"):
        assert evaluator.exact_costs(smaller)[cost] < evaluator.exact_costs(larger)[cost]


def test_missing_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="never downloads"):
        OfaPredictor(tmp_path)
    broken = tmp_path / LATENCY_FILE
    broken.write_text("{}")
    with pytest.raises(UserError, match="the published file, whole"):
        OfaLatency(tmp_path)
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(UserError, match="the published file, whole"):
        OfaPredictor(tmp_path / "other.npz")
