from __future__ import annotations

import numpy as np
import pytest
import torch
from ofa_samples import GOLDEN, SPACE, evaluations

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.ofa_mobile import OfaMobileFamily, open_family
from archsmith.families.ofa_mobile_space import (
    DEPTHS,
    EXPANSIONS,
    KERNELS,
    Skeleton,
    from_genes,
    ofa_mobile_space,
    uniform_decisions,
)
from archsmith.families.table_spaces import ofa_mobilenet_space
from archsmith.testing.families import FamilyContract, measured_costs

FAMILY = OfaMobileFamily(image=(3, 224, 224), num_classes=1000)

SIZES = {"max": (7, 6, 4), "min_k3_e3_d2": (3, 3, 2), "k5_e4_d3": (5, 4, 3), "k7_e3_d4": (7, 3, 4)}


class TestOfaMobileFamily(FamilyContract):
    @pytest.fixture
    def family(self):
        return open_family("ofa-mobile", image=(3, 9, 12), num_classes=5, width=0.25)


def test_params_and_macs_of_every_evaluated_network_are_the_published_ones() -> None:
    skeleton = Skeleton()
    for architecture, params, macs, _ in evaluations():
        assert skeleton.costs(architecture) == {"params": params, "macs": macs}


@pytest.mark.parametrize("row", [0, 700, 1481])
def test_built_networks_have_what_the_closed_form_says(row: int) -> None:
    architecture, params, macs, _ = evaluations()[row]
    assert measured_costs(FAMILY, architecture) == {"params": params, "macs": macs}


@pytest.mark.parametrize(("name", "width"), [("mbv3_w1.0", 1.0), ("mbv3_w1.2", 1.2)])
def test_uniform_networks_have_the_published_sizes(name: str, width: float) -> None:
    family = OfaMobileFamily(image=(3, 224, 224), num_classes=1000, width=width)
    for key, size in GOLDEN["network_sizes"][name].items():
        if key in SIZES:
            architecture = family.space.validate(uniform_decisions(*SIZES[key]))
            assert list(family.exact_costs(architecture).values())[::-1] == size
    assert measured_costs(family, family.largest()) == family.exact_costs(family.largest())


def test_networks_and_genotypes_are_counted() -> None:
    assert GOLDEN["distinct"]["distinct"] == SPACE.size
    assert len(DEPTHS) ** 5 * (len(KERNELS) * len(EXPANSIONS)) ** 20 == GOLDEN["distinct"]["genotypes"]
    blocks = len(KERNELS) * len(EXPANSIONS)
    assert sum(blocks**depth for depth in DEPTHS) ** 5 == SPACE.size  # by hand


def test_samples_are_uniform_by_decision_and_not_over_networks() -> None:
    rng = np.random.default_rng(0)
    depths = np.array([SPACE.sample(rng)["stage/2/depth"] for _ in range(900)])
    for depth in DEPTHS:
        assert abs((depths == depth).sum() - 300) < 4 * np.sqrt(900 * 2 / 9)
    assert not SPACE.samples_uniformly
    assert len(SPACE.sample_many(rng, 3)) == 3


def test_images_of_any_size_have_exact_costs() -> None:
    for image, width in (((3, 40, 56), 0.5), ((1, 32, 32), 1.0)):
        family = open_family("ofa-mobile", image=image, num_classes=7, width=width)
        for seed in range(3):
            architecture = family.space.sample(np.random.default_rng(seed))
            assert measured_costs(family, architecture) == family.exact_costs(architecture)


def test_small_images_lose_their_first_strides() -> None:
    family = open_family("ofa-mobile", image=(3, 32, 32), num_classes=10)
    assert family.strides == (1, 1, 2, 2, 1, 2)
    network = family.build(family.smallest(), seed=0).eval()
    with torch.no_grad():
        assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert count(network, torch.zeros(1, 3, 32, 32)).macs == family.exact_costs(family.smallest())["macs"]


def test_the_space_of_the_latency_table_is_this_space_with_image_sizes() -> None:
    sized = ofa_mobilenet_space()
    assert set(sized.paths) == {"resolution", *ofa_mobile_space().paths}
    assert sized.size == SPACE.size * 25


def test_wrong_input_is_named() -> None:
    with pytest.raises(UserError, match="a number above 0"):
        OfaMobileFamily(image=(3, 32, 32), num_classes=10, width=0)
    with pytest.raises(UserError, match="6 strides of 1 or 2"):
        OfaMobileFamily(image=(3, 32, 32), num_classes=10, strides=(2, 2))
    with pytest.raises(UserError, match="allowed: ofa-mobile"):
        open_family("ofa", image=(3, 32, 32), num_classes=10)
    with pytest.raises(UserError, match="20 kernels, 20 expansions"):
        from_genes([3], [3], [2])
