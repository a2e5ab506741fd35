"""Units of chains: which slices a hidden unit owns, and what is not a chain."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from node_samples import chain, small_cnn
from torch import nn

from archsmith.atoms.chains import chain_groups
from archsmith.core.errors import UserError


def test_a_hidden_unit_owns_row_bias_and_column() -> None:
    groups = chain_groups(chain(6, 5, 4, 3))
    assert [(group.name, group.size) for group in groups] == [("1", 5), ("3", 4)]
    first = {place.tensor: (place.axes, place.index.tolist()) for place in groups[0].places}
    rows = [[i] for i in range(5)]
    assert first == {"1.weight": ((0,), rows), "1.bias": ((0,), rows), "3.weight": ((1,), rows)}


def test_channels_own_normalisation_and_flattened_columns() -> None:
    groups = {group.name: group for group in chain_groups(small_cnn())}
    assert {name: group.size for name, group in groups.items()} == {"0.0": 8, "2.0": 6, "4": 10}
    places = {place.tensor: place for place in groups["2.0"].places}
    normalisation = {f"2.1.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")}
    assert set(places) == {"2.0.weight", "2.0.bias", "4.weight"} | normalisation
    assert (places["4.weight"].index == np.arange(96).reshape(6, 16)).all()


def test_every_place_lies_in_its_tensor_and_units_do_not_overlap() -> None:
    network = small_cnn()
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    for group in chain_groups(network):
        for place in group.places:
            (axis,) = place.axes
            assert sorted(place.index.flatten().tolist()) == list(range(tensors[place.tensor].shape[axis]))


@pytest.mark.parametrize(
    ("network", "text"),
    [
        (nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1)), "a LayerNorm"),
        (nn.Sequential(nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 1)), "a Conv2d"),
        (nn.Sequential(nn.Linear(2, 3), nn.Linear(4, 1)), r"4 inputs; allowed: the 3 of '0'"),
        (nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(4)), "4 features"),
        (nn.Sequential(*[nn.Linear(2, 2)] * 2), "used twice"),
    ],
)
def test_what_is_no_chain_is_refused(network: nn.Sequential, text: str) -> None:
    with pytest.raises(UserError, match=text):
        chain_groups(network)


def test_inputs_are_no_units_even_behind_a_normalisation() -> None:
    network = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 2), nn.ReLU(), nn.Linear(2, 1))
    assert [place.tensor for group in chain_groups(network) for place in group.places] == [
        "1.weight", "1.bias", "3.weight",
    ]  # fmt: skip
    assert network(torch.zeros(4, 3)).shape == (4, 1)
