import pytest
import torch
from mobile_samples import small_family, wave
from torch import nn

from archsmith.atoms.groups import AtomBlock, AtomGroup, Atoms, Slot, activate, tensors_of


def group(name, block="b", size=2, macs=10):
    return AtomGroup(name, block, size, f"{name}.w", (Slot(f"{name}.w", 0),), {"macs": macs, "params": 1})


def block(*groups, name="b"):
    return AtomBlock(name=name, groups=groups, minimum=1, norm=f"{name}.norm", norm_eps=1e-3)


def test_atoms_are_counted_and_summed():
    atoms = Atoms((group("a", size=2, macs=10), group("c", size=3, macs=7)), (block("a", "c"),))
    assert len(atoms) == 5
    assert [g.name for g in atoms] == ["a", "c"]
    assert (atoms.cost("macs"), atoms.cost("params")) == (41, 5)
    assert atoms.group("c").size == 3
    with pytest.raises(KeyError, match=r"no atom group 'x'; there are \['a', 'c'\]"):
        atoms.group("x")


@pytest.mark.parametrize(
    ("groups", "blocks"),
    [
        ((group("a"),), ()),
        ((group("a"),), (block("a"), block("a", name="other"))),
        ((group("a"),), (block("a", "c"),)),
        ((group("a"), group("a")), (block("a", "a"),)),
    ],
    ids=["no block", "two blocks", "unknown group", "same name"],
)
def test_every_group_belongs_to_exactly_one_block(groups, blocks):
    with pytest.raises(ValueError, match="every group must belong to exactly one block, got groups"):
        Atoms(groups, blocks)


def test_a_block_has_at_least_its_minimum():
    atoms = (group("a", size=2),)
    with pytest.raises(ValueError, match="block 'b' has 2 units, fewer than its minimum of 3"):
        Atoms(atoms, (AtomBlock(name="b", groups=("a",), minimum=3, norm="b.norm", norm_eps=1e-3),))


def test_scales_are_the_models_own_tensors():
    family = small_family()
    network = family.build(family.largest())
    atoms = family.atoms(network)
    scales = atoms.scales(tensors_of(network))
    assert list(scales) == [g.name for g in atoms]
    for g in atoms:
        branch = network.get_submodule(g.name)
        assert scales[g.name].data_ptr() == branch.norm.weight.data_ptr()
        assert not scales[g.name].requires_grad


def test_shared_tensors_appear_under_each_name():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    model[1].weight = model[0].weight
    named = tensors_of(model)
    assert named["0.weight"] is named["1.weight"]
    assert {"2.running_mean", "2.running_var", "2.num_batches_tracked"} <= set(named)


def test_activations_are_those_of_the_layers():
    x = wave((50,), 0.7) * 4
    assert torch.equal(activate("relu", x), nn.functional.relu(x))
    torch.testing.assert_close(activate("swish", x), nn.functional.silu(x))
    with pytest.raises(ValueError, match="got 'gelu'; allowed: 'relu', 'relu6', 'swish'"):
        activate("gelu", x)
