import numpy as np
import pytest
import torch
from st_nas_cases import cases

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families import relaxable_families
from archsmith.families.tdnn import CANDIDATES, TdnnFamily, open_family
from archsmith.run.constructor import call_of
from archsmith.supernet import StraightThrough
from archsmith.supernet.expected import CandidateMacs
from archsmith.supernet.relaxed import SearchSupernet
from archsmith.testing.families import FamilyContract

SHAPE = (3, 4, 12)
FAMILY = TdnnFamily(image=SHAPE, num_classes=5, width=8, blocks=4, stride_after=2, dropout=0.1)


class TestTdnn(FamilyContract):
    @pytest.fixture
    def family(self):
        return FAMILY


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("case", cases("params/derived"), ids=lambda case: case["name"])
def test_the_published_sizes(case):
    family = TdnnFamily(image=(3, 40, 30), num_classes=case["input"]["num_classes"])
    for dilation in (1, 2):
        names = {f"block/{n}": f"C{context}D{dilation}" for n, context in enumerate(case["input"]["C"])}
        assert family.exact_costs(names)["params"] == case["expected"]
        with torch.device("meta"):
            assert parameters(family.build(names)) == case["expected"]


def test_the_published_size_of_the_supernet_without_its_logits():
    (case,) = cases("params/supernet")
    assert tuple(case["input"]["candidates_per_block"]) == CANDIDATES
    with torch.device("meta"):
        network = TdnnFamily(image=(3, 40, 30), num_classes=case["input"]["num_classes"]).build(
            dict.fromkeys([f"block/{n}" for n in range(6)], "C1D1")
        )
        assert parameters(network) > 0
    supernet = TdnnFamily(image=(3, 40, 30), num_classes=case["input"]["num_classes"]).relaxed()
    assert parameters(supernet.network) == case["expected"] == sum(w.numel() for w in supernet.weights().values())
    assert supernet.logits["blocks"].shape == (6, 4)


def test_it_can_be_relaxed_and_paths_can_be_taken_out():
    assert "tdnn" in relaxable_families()
    supernet = FAMILY.relaxed(seed=1, relaxation=StraightThrough()).eval()
    assert isinstance(supernet, SearchSupernet)
    assert set(supernet.places()) <= {name for name, _ in supernet.network.named_modules()}
    x = torch.randn(3, *SHAPE)
    for architecture in (FAMILY.space.sample(np.random.default_rng(0)), FAMILY.largest(), FAMILY.smallest()):
        supernet.activate(architecture)
        network = supernet.extract(architecture)
        torch.testing.assert_close(network(x), supernet(x), rtol=1e-5, atol=1e-5)
        assert FAMILY.architecture_of(network) == architecture == supernet.derive(supernet.path(architecture))
        assert call_of(network) == call_of(FAMILY.build(architecture))
        assert supernet.weightless(architecture) == {"blocks": 0}


def test_candidates_have_weights_of_their_own_and_the_seed_decides_them():
    first, again, other = (FAMILY.relaxed(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())
    names = [name for name in first if "blocks.1.candidates" in name and name.endswith("conv.weight")]
    assert len({first[name].data_ptr() for name in names}) == len(names) == 4


def test_expected_macs_of_a_path_are_those_of_its_network():
    supernet = FAMILY.relaxed(seed=0)
    expected = CandidateMacs.of(supernet, SHAPE)
    architecture = FAMILY.space.sample(np.random.default_rng(2))
    macs = count(supernet.extract(architecture), torch.zeros(1, *SHAPE)).macs
    assert float(expected(supernet.path(architecture))) == macs == FAMILY.exact_costs(architecture)["macs"]


def test_a_probability_decides_and_not_a_sample():
    supernet = FAMILY.relaxed(seed=0, relaxation=StraightThrough())
    with torch.no_grad():
        supernet.logits["blocks"].zero_()[:, 2] = 0.5
    torch.manual_seed(0)
    for _ in range(5):
        assert set(supernet.derive().values()) == {"C2D1"}


def test_what_is_no_family_is_refused():
    given = {"image": SHAPE, "num_classes": 5}
    with pytest.raises(UserError, match=r"family.stride_after: got 7; allowed: 0 to the 6 blocks"):
        TdnnFamily(**given, stride_after=7)
    with pytest.raises(UserError, match=r"family.width: got 0"):
        TdnnFamily(**given, width=0)
    with pytest.raises(UserError, match=r"family.dropout: got 1.0"):
        TdnnFamily(**given, dropout=1.0)
    with pytest.raises(UserError, match="option of family tdnn: got 'channels'; allowed: width, blocks"):
        open_family("tdnn", **given, channels=3)
    with pytest.raises(UserError, match="mixes whole candidates"):
        FAMILY.relaxed(make_edge=object())
