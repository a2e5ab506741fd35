from itertools import pairwise, product

import numpy as np
import pytest
import torch
from darts_recipe import grid as indices
from darts_recipe import image, weighted_
from sharp_recipe import case, cases
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.hypercuboid import HyperCuboidFamily, family_from_json, hypercuboid_family, open_family
from archsmith.families.hypercuboid_space import chain_of, grid_widths
from archsmith.layers.hypercuboid import PathNetwork
from archsmith.supernet import MaxW, Softmax, batch_statistics
from archsmith.supernet.expected import CandidateMacs
from archsmith.supernet.grid_paths import bottom_up_path, cheapest_path, longest_path, priced_path

NAMES = {"ResizablePool": "max_pool_3x3", "SharpSepConv": "sep_conv_3x3"}


def small(**changes):
    settings = {"widths": (4, 6), "stages": 1, "filters": 8, **changes}
    return hypercuboid_family(image=settings.pop("image", (3, 8, 8)), num_classes=5, **settings)


def sampled(family, seed=0):
    return family.space.sample(np.random.default_rng(seed))


def of_fact(fact):
    """Return the grid network of a fact, its weights and logits in closed form."""
    family = HyperCuboidFamily(
        image=(3, 16, 16), num_classes=fact["input"]["classes"], widths=(4, 8), stages=2, filters=16
    )
    relaxation = MaxW() if ":max_w:" in fact["name"] else None
    supernet = weighted_(family.relaxed(seed=0, relaxation=relaxation))
    s, stage, i, j, p = indices(*fact["expected"]["arch_shape"])
    logits = 0.5 * torch.sin(1 + s + 2 * stage + 3 * i + 5 * j + 7 * p)
    with torch.no_grad():
        supernet.logits["grid"].copy_(logits.transpose(0, 1).reshape(4, -1))  # stage by stage, stride 1 first
    return family, supernet


def as_published(names):
    """Return widths and operations of a path in the published form."""
    steps = [name.split("_") for name in names if "_c_in_" in name]
    widths = [int(steps[0][6]), *(int(step[9]) for step in steps)]
    assert all(int(after[6]) == int(before[9]) for before, after in pairwise(steps))
    assert names[-4] == f"SharpSepConv{widths[-1]}"
    return tuple(widths), tuple(NAMES[step[12]] for step in steps)


HYPERCUBOIDS = cases("hypercuboid:")


@pytest.mark.parametrize("fact", HYPERCUBOIDS, ids=lambda fact: fact["name"])
def test_the_published_grid_network(fact):
    (_, supernet), expected = of_fact(fact), fact["expected"]
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]
    assert supernet.logits["grid"].numel() == expected["n_arch"]
    assert supernet.least == expected["min_score"]
    probabilities = supernet.probabilities()["grid"]
    assert probabilities.sum(-1).tolist() == pytest.approx([expected["w_stride1_layer0_sum"]] * 4)
    assert probabilities[0, :6].tolist() == pytest.approx(expected["w_stride1_layer0_flat"], rel=0, abs=1e-9)
    logits = supernet(image(3, 3, 16, 16))
    close = {"rel": 0, "abs": 1e-6}
    assert logits.flatten().tolist() == pytest.approx([v for row in expected["logits"] for v in row], **close)
    loss = functional.cross_entropy(logits, torch.tensor(fact["input"]["targets"]))
    assert loss.item() == pytest.approx(expected["loss"], **close)
    loss.backward()
    assert supernet.logits["grid"].grad.abs().sum().item() == pytest.approx(expected["grad_abs_sum"], **close)


@pytest.mark.parametrize("fact", HYPERCUBOIDS, ids=lambda fact: fact["name"])
def test_the_published_paths(fact):
    (family, supernet), expected = of_fact(fact), fact["expected"]
    strengths = supernet.grid_strengths()
    longest, greedy = (family.grid.architecture(rule(strengths)) for rule in (longest_path, bottom_up_path))
    assert chain_of(longest) == as_published(expected["longest_path"])
    assert chain_of(greedy) == as_published(expected["greedy_bottom_up"])
    assert supernet.derive() == longest

    def total(widths, operations):
        chosen = zip(pairwise(widths), operations, strict=True)
        return sum(strengths[step, i, j, p] for step, ((i, j), p) in enumerate(chosen))

    every = product(product(range(2), repeat=5), product(range(2), repeat=4))
    assert max(every, key=lambda path: total(*path)) == (
        longest_path(strengths).widths,
        longest_path(strengths).operations,
    )
    # Under Max-W the mixing weights are shifted, step by step: the paths stay.
    with torch.no_grad():
        assert supernet.derive(supernet.mixing()) == longest


def test_the_full_grid_has_its_exact_size():
    fact = case("hypercuboid_count:C36:layers8:steps4")
    given, expected = fact["input"], fact["expected"]
    family = open_family("hypercuboid", image=(3, 32, 32), num_classes=given["classes"])
    assert list(family.widths) == expected["Cs"] == list(grid_widths(given["C"], given["steps"]))
    assert family.filters == given["final_linear_filters"]
    with torch.device("meta"):
        supernet = family.relaxed()
    network = supernet.network
    assert sum(weight.numel() for weight in supernet.weights().values()) == expected["params"]
    assert supernet.logits["grid"].numel() == expected["n_arch"]
    operations = sum(len(step.candidates) for step in network.steps)
    sums = len(network.steps) * len(family.widths)
    ends = len(network.stems), len(network.tails)
    # Image, sum of the blocks, pooling and classifier stand alone; stems are a convolution and a norm.
    assert 4 + 2 * ends[0] + operations + sums + ends[1] == expected["nodes"]
    assert 2 * ends[0] + 2 * operations + 2 * ends[1] + 2 == expected["edges"]


@pytest.mark.parametrize("fact", cases("path_model:"), ids=lambda fact: fact["name"])
def test_published_paths_have_their_exact_counts(fact):
    path, expected = fact["input"]["path"], fact["expected"]
    widths = (fact["input"]["stem_channels"], *(step[1] for step in path))
    assert [step[2] for step in path] == [1, 2] * 4
    operations = tuple(NAMES[step[3]] for step in path)
    family = hypercuboid_family("cifar", image=(3, 32, 32), num_classes=10)
    with torch.device("meta"):
        network = PathNetwork(3, 10, widths, operations)
        counted = count(network, torch.zeros(fact["input"]["input"]))
    assert {"params": counted.params, "macs": counted.macs} == expected
    assert family.exact_costs(family.architecture_of(network)) == expected


@pytest.mark.parametrize("operations", [("max_pool_3x3", "sep_conv_3x3"), ("avg_pool_3x3", "choke_conv_3x3")])
def test_extracted_networks_are_the_active_path(operations):
    family = small(operations=operations, stages=2, widths=(4, 6, 8), image=(3, 7, 10))
    supernet = family.relaxed(seed=1, relaxation=MaxW()).eval()
    x = torch.rand(4, 3, 7, 10)
    relaxed = supernet(x)
    for seed in range(6):
        point = sampled(family, seed)
        supernet.activate(point)
        network = supernet.extract(point)
        torch.testing.assert_close(network(x), supernet(x), rtol=0, atol=1e-5)
        assert family.architecture_of(network) == point
    supernet.activate(None)
    assert torch.equal(supernet(x), relaxed)


def test_expected_costs_of_a_decided_grid_are_those_of_its_network():
    family = small(stages=2)
    supernet = family.relaxed(seed=0)
    expected = CandidateMacs.of(supernet, (3, 8, 8))
    for seed in range(4):
        point = sampled(family, seed)
        assert int(expected(supernet.path(point))) == family.exact_costs(point)["macs"]
    with torch.no_grad():
        mean = float(expected(supernet.probabilities()))
    ends = [family.exact_costs(end)["macs"] for end in (family.smallest(), family.largest())]
    assert ends[0] < mean < ends[1]


def ran(supernet, mixing=None):
    """Return the names of the candidates that a call runs."""
    seen, handles = [], []
    for step, layer in enumerate(supernet.network.steps):
        for name, candidate in layer.candidates.items():
            note = lambda *_, name=f"{step}:{name}": seen.append(name)  # noqa: E731
            handles.append(candidate.register_forward_hook(note))
    with torch.no_grad(), batch_statistics(supernet):
        output = supernet(torch.rand(4, 3, 8, 8), mixing)
    for handle in handles:
        handle.remove()
    assert bool(output.isfinite().all())
    return seen


def test_improbable_candidates_are_not_run():
    family = small()
    supernet, whole = family.relaxed(seed=0), family.relaxed(seed=0, prune=False)
    names = family.grid.candidates
    with torch.no_grad():
        for net in (supernet, whole):
            net.logits["grid"].zero_()
            net.logits["grid"][0, 3] = -4.0  # 0.0026 of one: below 1 / 64
    assert supernet.least == 1 / 64
    assert len(ran(supernet)) == 15 and f"0:{names[3]}" not in ran(supernet)
    assert len(ran(whole)) == 16
    for relaxation, least in ((None, 0.13), (MaxW(), 0.99)):
        net = family.relaxed(seed=0, relaxation=relaxation)
        net.load_state_dict(supernet.state_dict())
        row = net.mixing()["grid"][0]
        assert row[3] == 0 and row[0] > least  # a shifted weight is no probability: what decides is the latter


def test_a_width_that_nobody_wrote_is_not_read():
    family = small()
    supernet = family.relaxed(seed=0)
    names = family.grid.candidates
    mixing = supernet.path(sampled(family))
    mixing["grid"].zero_()
    mixing["grid"][0, names.index("4-4-sep_conv_3x3")] = 1.0
    mixing["grid"][1, :] = 0.5
    assert set(ran(supernet, mixing)) == {
        "0:4-4-sep_conv_3x3",
        *(f"1:4-{behind}-{name}" for behind in (4, 6) for name in ("max_pool_3x3", "sep_conv_3x3")),
    }
    mixing["grid"][1, :] = 0.0
    mixing["grid"][1, names.index("6-6-sep_conv_3x3")] = 1.0
    assert ran(supernet, mixing) == ["0:4-4-sep_conv_3x3"]  # no way goes through: the classifier sees zeros


def test_measured_times_price_a_path():
    family = small()
    times = family.measured_times(block_ms=0.05)
    assert times.steps.shape == (2, 2, 2, 2) and bool((times.steps > 0).all())
    assert times.first.shape == times.last.shape == (2,) and bool((times.first > 0).all() and (times.last > 0).all())
    strengths = family.relaxed(seed=0).grid_strengths()
    paths = [priced_path(strengths, times, price) for price in (0, 1e9)]
    assert paths == [longest_path(strengths), cheapest_path(times)]
    assert family.space.contains(family.grid.architecture(paths[1]))


def test_steps_alternate_strides_and_sides_are_halved_rounding_up():
    family = small(stages=3, image=(3, 7, 10))
    assert family.sizes() == [(7, 10), (7, 10), (4, 5), (4, 5), (2, 3), (2, 3), (1, 2)]
    assert family.build(family.largest(), seed=0)(torch.rand(2, 3, 7, 10)).shape == (2, 5)
    assert family.grid.labels[:3] == ("stage 1, stride 1", "stage 1, stride 2", "stage 2, stride 1")


def test_poolings_that_keep_the_width_have_no_weights():
    family = small(stages=1)
    supernet = family.relaxed(seed=0)
    point = {"stem/width": 4, "1/operation": "max_pool_3x3", "1/width": 4}
    assert supernet.weightless({**point, "2/operation": "max_pool_3x3", "2/width": 6}) == {"grid": 1}
    assert supernet.weightless({**point, "2/operation": "max_pool_3x3", "2/width": 4}) == {"grid": 2}


def test_grids_of_any_hyper_parameters():
    """Kernel, dilation and middle as axes: a grid of six kinds of convolution."""
    kinds = ("sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5", "flood_conv_3x3", "dil_flood_conv_3x3")
    family = small(operations=kinds, stages=1)
    assert family.space.size == 2 * (6 * 2) ** 2
    supernet = family.relaxed(seed=0)
    assert supernet.logits["grid"].shape == (2, 24)
    assert supernet(torch.rand(2, 3, 8, 8)).shape == (2, 5)
    assert family_from_json(family.to_json()) == family


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"widths": (6, 4)}, "family.widths: got (6, 4); allowed: different numbers of channels from 1, ascending"),
        ({"widths": ()}, "family.widths: got ()"),
        ({"operations": ("skip_connect",)}, "family.operations: got ('skip_connect',); allowed: different ones of max"),
        ({"operations": ("max_pool_3x3", "max_pool_3x3")}, "family.operations: got"),
        ({"stages": 0}, "family.stages: got 0; allowed: an integer from 1"),
        ({"skeleton": "huge"}, "family.skeleton: got 'huge'; allowed: auto, cifar, tiny"),
        ({"channels": 4}, "family: got ['channels']; allowed: skeleton, widths, stages"),
    ],
)
def test_grids_that_make_no_sense_are_refused(changes, text):
    with pytest.raises(UserError) as error:
        small(**changes)
    assert text in str(error.value)


def test_edges_of_cells_are_refused():
    with pytest.raises(UserError, match="allowed: a family of cells: its edges can have edge_weights"):
        small().relaxed(seed=0, edge_weights=True)
    with pytest.raises(UserError, match="channels: got 0"):
        grid_widths(0, 2)


class Halved(Softmax):
    def mix(self, x, candidates, weights_O):
        return 0.5 * super().mix(x, candidates, weights_O)


def test_mixtures_that_are_no_weighted_sum_are_refused():
    with pytest.raises(
        UserError, match="relaxation: got 'Halved'; allowed: one that takes the weighted sum, on a grid"
    ):
        small().relaxed(seed=0, relaxation=Halved())
    with pytest.raises(UserError, match="relaxation: got 'Halved'; allowed: one that takes the weighted sum"):
        MaxW(Halved())
