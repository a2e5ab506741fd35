import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from archsmith.core.errors import UserError
from archsmith.families.nasnet_space import (
    FIELDS,
    NASNET_A,
    NASNET_A_OUTPUTS,
    NASNET_OPERATIONS,
    Block,
    Genotype,
    architecture_of,
    genotype_of,
    nasnet_a,
    nasnet_space,
    unused_states,
)
from archsmith.space import Architecture, ProductSpace, Space
from archsmith.testing.space import SpaceContract

GOLDEN = {
    case["name"]: case
    for case in json.loads(Path(__file__).parents[1].joinpath("golden/nasnet.json").read_text())["cases"]
}


class TestNasnetSpace(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nasnet_space()


class TestNasnetSpaceOfOneBlock(SpaceContract):
    @pytest.fixture
    def space(self) -> Space:
        return nasnet_space(1)


def test_one_cell_has_the_published_number_of_ordered_choices():
    assert nasnet_space().size == GOLDEN["space/ordered_choices_one_cell"]["expected"] ** 2


def test_the_stream_is_the_controllers():
    expected = GOLDEN["controller/softmaxes"]["expected"]
    trace = nasnet_space().trace(nasnet_a())
    assert len(trace) == expected["predictions"]
    assert [decision.path.split("/")[0] for decision in trace] == ["normal"] * 25 + ["reduction"] * 25
    for cell in (trace[:25], trace[25:]):
        assert [decision.path.split("/")[2] for decision in cell] == list(FIELDS) * 5
        for block, choices in enumerate(expected["state_choices_per_block"]):
            sizes = [len(decision.options) for decision in cell[5 * block : 5 * block + 5]]
            assert sizes == [choices, choices, 13, 13, 2]
    assert len(set(NASNET_OPERATIONS)) == 13


def test_genotype_and_architecture_are_two_forms_of_one_thing():
    space = nasnet_space()
    for seed in range(20):
        architecture = space.sample(np.random.default_rng(seed))
        assert architecture_of(genotype_of(architecture)) == architecture
    assert genotype_of(nasnet_a()) == NASNET_A


def test_unused_states_are_those_that_no_block_names():
    # NASNet-A: blocks consume h0, h1 (normal) and h0, h1, b0, b1 (reduction).
    assert unused_states(NASNET_A.normal) == (2, 3, 4, 5, 6)
    assert unused_states(NASNET_A.reduction) == (4, 5, 6)
    assert unused_states([Block(0, 0, "identity", "identity"), Block(0, 2, "identity", "identity")]) == (1, 3)


def test_the_published_cells_concatenate_one_consumed_state_more_each():
    for cell, extra in (("normal", 1), ("reduction", 3)):
        blocks = getattr(NASNET_A, cell)
        assert set(NASNET_A_OUTPUTS[cell]) == {*unused_states(blocks), extra}
        assert any(extra in (block.first, block.second) for block in blocks)


@pytest.mark.parametrize(
    ("cell", "same"),
    [
        ([(0, 1, "conv_1x1", "identity", "add")], [(1, 0, "identity", "conv_1x1", "add")]),  # an addition commutes
        (  # two independent blocks in the other order, and a third that uses both
            [(0, 0, "conv_1x1", "identity"), (1, 1, "conv_3x3", "identity"), (2, 3, "identity", "conv_1x1")],
            [(1, 1, "conv_3x3", "identity"), (0, 0, "conv_1x1", "identity"), (2, 3, "conv_1x1", "identity")],
        ),
    ],
)
def test_equal_networks_have_equal_network_digests(cell, same):
    first, second = ([Block(*block) for block in blocks] for blocks in (cell, same))
    one, other = (architecture_of(Genotype(tuple(blocks), tuple(blocks))) for blocks in (first, second))
    assert one.digest != other.digest
    assert one.network_digest == other.network_digest


@pytest.mark.parametrize(
    ("cell", "different"),
    [
        ([(0, 1, "conv_1x1", "identity", "concat")], [(1, 0, "identity", "conv_1x1", "concat")]),
        (  # one block used twice is not two equal blocks: the weights are shared
            [(0, 0, "conv_1x1", "conv_1x1"), (0, 0, "conv_1x1", "conv_1x1"), (2, 2, "identity", "identity")],
            [(0, 0, "conv_1x1", "conv_1x1"), (0, 0, "conv_1x1", "conv_1x1"), (2, 3, "identity", "identity")],
        ),
    ],
)
def test_different_networks_have_different_network_digests(cell, different):
    first, second = ([Block(*block) for block in blocks] for blocks in (cell, different))
    one, other = (architecture_of(Genotype(tuple(blocks), tuple(blocks))) for blocks in (first, second))
    assert one.network_digest != other.network_digest


def test_the_canonical_order_does_not_depend_on_the_given_one():
    space, rng = nasnet_space(4), np.random.default_rng(5)
    checked = 0
    for _ in range(30):
        genotype = genotype_of(space.sample(rng))
        digests = set()
        for order in product(range(4), repeat=4):
            if len(set(order)) == 4 and (cell := reordered(genotype.normal, order)) is not None:
                digests.add(architecture_of(Genotype(cell, genotype.reduction)).network_digest)
                checked += 1
        assert len(digests) == 1
    assert checked > 60


def reordered(blocks: tuple[Block, ...], order: tuple[int, ...]) -> tuple[Block, ...] | None:
    """Return the blocks in another order, None where one would use a state before it exists."""
    names = {0: 0, 1: 1}
    found = []
    for index in order:
        block = blocks[index]
        if block.first not in names or block.second not in names:
            return None
        found.append(block._replace(first=names[block.first], second=names[block.second]))
        names[index + 2] = len(names)
    return tuple(found)


def test_json_keeps_the_network_digest():
    again = Architecture.from_json(json.loads(json.dumps(nasnet_a().to_json())))
    assert again == nasnet_a() and again.network_digest == nasnet_a().network_digest


def test_the_space_restored_from_json_has_the_same_architectures():
    space = nasnet_space()
    again = ProductSpace.from_json(json.loads(json.dumps(space.to_json())))
    assert again.size == space.size
    assert again.sample(np.random.default_rng(1)) == space.sample(np.random.default_rng(1))
    assert again.validate(nasnet_a()).digest == nasnet_a().digest


@pytest.mark.parametrize("blocks", [0, -1, True, 2.0, "5"])
def test_a_cell_needs_blocks(blocks):
    with pytest.raises(UserError, match=r"blocks: got .*; allowed: an integer from 1"):
        nasnet_space(blocks)


def test_cells_of_different_length_are_refused():
    with pytest.raises(UserError, match="as many blocks in the normal cell"):
        architecture_of(Genotype(NASNET_A.normal, NASNET_A.reduction[:4]))


def test_a_state_that_does_not_exist_yet_is_refused():
    blocks = (Block(0, 2, "identity", "identity"),)
    with pytest.raises(UserError, match=r"normal/0/second"):
        architecture_of(Genotype(blocks, blocks))
