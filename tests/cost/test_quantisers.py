import json
from pathlib import Path

import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.cost.quantisers import activation_quantiser, weight_quantiser
from archsmith.space.quantisation import LayerPolicy

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "simq-nas.json").read_text())["cases"]
N = 54
WEIGHT = (np.sin(0.37 * np.arange(N) + 0.4) * (1 + np.arange(N) / N)).astype(np.float32).reshape(3, 2, 3, 3)


def mse(quantiser, values):
    return float(((quantiser.fake(values) - values) ** 2).mean())


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
def test_weights_are_quantised_like_torchs_observers_do(scheme):
    wanted = GOLDEN["weight-and-activation-quantisers"]["expected"][scheme]
    quantiser = weight_quantiser(WEIGHT, LayerPolicy("int8", "per-channel", scheme))
    assert quantiser.scale == pytest.approx(wanted["scale"], rel=1e-5)
    assert quantiser.zero_point.tolist() == wanted["zero_point"]
    assert mse(quantiser, WEIGHT) == pytest.approx(wanted["mse"], rel=1e-3, abs=1e-8)
    assert quantiser.fake(WEIGHT).ravel()[:4] == pytest.approx(wanted["first4"], rel=1e-5)


def test_activations_are_quantised_like_torchs_observers_do():
    wanted = GOLDEN["weight-and-activation-quantisers"]["expected"]["activation_relu_per_tensor_asymmetric_uint8"]
    values = np.maximum(WEIGHT, 0)
    quantiser = activation_quantiser(float(values.min()), float(values.max()))
    assert float(quantiser.scale) == pytest.approx(wanted["scale"], rel=1e-5)
    assert int(quantiser.zero_point) == wanted["zero_point"]
    assert mse(quantiser, values) == pytest.approx(wanted["mse"], rel=1e-3, abs=1e-8)


def test_finer_and_freer_quantisers_lose_less_here():
    lost = {
        (granularity, scheme): mse(weight_quantiser(WEIGHT, LayerPolicy("int8", granularity, scheme)), WEIGHT)
        for granularity in ("per-channel", "per-tensor")
        for scheme in ("symmetric", "asymmetric")
    }
    assert lost["per-channel", "asymmetric"] <= lost["per-channel", "symmetric"] <= lost["per-tensor", "symmetric"]
    assert lost["per-channel", "asymmetric"] <= lost["per-tensor", "asymmetric"]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_tensors_and_arrays_agree_whatever_the_axis(axis):
    quantiser = weight_quantiser(WEIGHT, LayerPolicy("int8", "per-channel", "asymmetric"), axis=axis)
    assert len(quantiser.scale) == WEIGHT.shape[axis]
    integers = quantiser.quantise(WEIGHT)
    assert integers.min() >= -128 and integers.max() <= 127
    assert (integers == np.round(integers)).all()
    assert np.abs(quantiser.fake(WEIGHT) - WEIGHT).max() <= 0.5001 * quantiser.scale.max()
    assert torch.equal(quantiser.fake(torch.from_numpy(WEIGHT)), torch.from_numpy(quantiser.fake(WEIGHT)))


def test_zero_stays_zero_and_a_constant_channel_does_no_harm():
    positive = np.full((2, 3), 5.0, np.float32)
    positive[1] = 0.0
    for scheme in ("symmetric", "asymmetric"):
        quantiser = weight_quantiser(positive, LayerPolicy("int8", "per-channel", scheme))
        assert quantiser.fake(np.zeros((2, 3), np.float32)).tolist() == [[0.0] * 3] * 2
        assert quantiser.fake(positive) == pytest.approx(positive, rel=1e-2)
    assert float(activation_quantiser(2.0, 3.0).fake(np.float32([0.0]))[0]) == 0.0


def test_weights_that_are_not_numbers_are_refused():
    with pytest.raises(UserError, match=r"weight"):
        weight_quantiser(np.array([np.nan], np.float32), LayerPolicy("int8"))
