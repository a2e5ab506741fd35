import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families import relaxable_families
from archsmith.families.cells import NasBench201Family
from archsmith.supernet.expected import CandidateMacs
from archsmith.supernet.relaxed import SearchSupernet

FAMILY = NasBench201Family(image=(3, 8, 8), num_classes=4, channels=4, cells=2)


def test_it_can_be_relaxed():
    assert {"darts", "nas-bench-201"} <= set(relaxable_families())
    supernet = FAMILY.relaxed(seed=0)
    assert isinstance(supernet, SearchSupernet)
    assert supernet.logits["cell"].shape == (6, 5) and len(supernet.places()) == 6 * 6
    assert set(supernet.places()) <= {name for name, _ in supernet.network.named_modules()}
    assert torch.equal(supernet.logits["cell"], FAMILY.relaxed(seed=0).logits["cell"])


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_an_extracted_network_is_the_active_path(training, affine):
    supernet = FAMILY.relaxed(seed=1, affine=affine)
    x = torch.rand(4, 3, 8, 8)
    supernet.train()
    supernet(x)  # running statistics of their own
    supernet.train(training)
    for cell in (FAMILY.space.sample(np.random.default_rng(0)), FAMILY.largest(), FAMILY.smallest()):
        supernet.activate(cell)
        network = supernet.extract(cell)
        torch.testing.assert_close(network(x), supernet(x), rtol=1e-5, atol=1e-5)
    supernet.activate(None)
    assert FAMILY.architecture_of(network) == FAMILY.smallest()


def test_the_mixture_is_the_weighted_sum():
    supernet, x = FAMILY.relaxed(seed=2).double().eval(), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    cell = supernet.network.skeleton.stages[0][0]
    weights = torch.rand(6, 5, dtype=torch.float64)
    x = torch.rand(2, 4, 8, 8, dtype=torch.float64)

    def edge(number, state):
        candidates = cell.edges[number].candidates.values()
        return sum(w * op(state) for w, op in zip(weights[number], candidates, strict=True))

    one = edge(0, x)
    two = edge(1, x) + edge(2, one)
    torch.testing.assert_close(cell(x, weights), edge(3, x) + edge(4, one) + edge(5, two))
    halves = torch.full((6,), 0.5, dtype=torch.float64)
    torch.testing.assert_close(cell.edges[0](x, weights[0]) * 0.5, one / 2)
    assert not torch.allclose(cell(x, weights, halves), cell(x, weights))


def test_the_strongest_operation_of_every_edge_is_derived_none_among_them():
    supernet = FAMILY.relaxed(seed=0)
    cell = FAMILY.space.sample(np.random.default_rng(3))
    assert supernet.derive(supernet.path(cell)) == cell
    with torch.no_grad():
        supernet.logits["cell"].zero_()[:, 0] = 1.0
    assert set(supernet.derive().values()) == {"none"}
    assert supernet.weightless(supernet.derive()) == {"cell": 6}
    with torch.no_grad():
        supernet.logits["cell"][2, 2] = torch.nan
    with pytest.raises(UserError, match="The search diverged"):
        supernet.derive()


def test_expected_macs_of_one_hot_weights_are_those_of_the_network():
    supernet = FAMILY.relaxed(seed=0)
    expected = CandidateMacs.of(supernet, (3, 8, 8))
    for seed in range(3):
        cell = FAMILY.space.sample(np.random.default_rng(seed))
        macs = count(supernet.extract(cell), torch.zeros(1, 3, 8, 8)).macs
        assert float(expected(supernet.path(cell))) == macs == FAMILY.exact_costs(cell)["macs"]
    mixing = supernet.mixing()
    expected(mixing).backward()
    assert supernet.logits["cell"].grad[0, 3] > 0 > supernet.logits["cell"].grad[0, 0]


def test_wrong_operations_are_refused():
    assert FAMILY.relaxed(seed=0, operations=("skip_connect", "nor_conv_3x3")).logits["cell"].shape == (6, 2)
    with pytest.raises(UserError, match="operations: got"):
        FAMILY.relaxed(operations=("conv",))
    with pytest.raises(UserError, match="operations: got"):
        FAMILY.relaxed(operations=())
