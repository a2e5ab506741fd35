import copy

import numpy as np
import pytest
import torch
from cut_samples import Block, batches, block_groups, rows, steps
from torch import nn
from torch.nn import functional as F

from archsmith.atoms.consumers import consuming_axes
from archsmith.atoms.finding import find
from archsmith.atoms.grow import deeper_layer, grow_
from archsmith.atoms.numbers import randomised
from archsmith.atoms.plan import CutRefused
from archsmith.atoms.records import rebuild, record
from archsmith.atoms.trace import export
from archsmith.atoms.units import Place, UnitGroup
from archsmith.core.errors import UserError


def unsettled(model):
    """Give a model in double precision random numbers everywhere, statistics included."""
    values = randomised(model, 1)
    model = model.double()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            tensor.copy_(values[name])
    return model


class DenseBlock(nn.Module):
    """Every layer normalises and reads the concatenation of all before it."""

    def __init__(self, growth=(4, 3, 5)):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norms, self.convs = nn.ModuleList(), nn.ModuleList()
        width = 6
        for k in growth:
            self.norms.append(nn.BatchNorm2d(width))
            self.convs.append(nn.Conv2d(width, k, 3, padding=1, bias=False))
            width += k
        self.last = nn.BatchNorm2d(width)
        self.fc = nn.Linear(width, 5)

    def forward(self, x):
        x = self.stem(x)
        for norm, conv in zip(self.norms, self.convs, strict=True):
            x = torch.cat([x, conv(torch.relu(norm(x)))], 1)
        return self.fc(torch.relu(self.last(x)).mean((2, 3)))


X = torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)).double()


def gap(model, whole, x, training=False):
    with torch.no_grad():
        a, b = (copy.deepcopy(m).train(training)(x) for m in (model, whole))
    return float((a - b).abs().max() / b.abs().max())


def test_hand_declared_units_are_copied_and_shared():
    torch.manual_seed(0)
    model = unsettled(Block())
    whole = copy.deepcopy(model)
    identities = [id(p) for p in model.parameters()]
    done, groups = grow_(model, block_groups(), {"a": [0, 0, 3], "b": [5]}, X)
    assert [id(p) for p in model.parameters()] == identities
    assert gap(model, whole, X) < 1e-12 and gap(model, whole, X, training=True) < 1e-12
    assert (model.conv1.out_channels, model.depth.groups, model.fc.in_features) == (11, 11, 28)
    assert [g.size for g in groups] == [11, 7] and done.params[1] > done.params[0]
    assert torch.equal(model.conv1.weight[[0, 1, 2]], whole.conv1.weight[[0, 0, 0]])
    torch.testing.assert_close(model.conv2.weight[0, :, 0, 0][:3], whole.conv2.weight[0, 0, 0, 0].expand(3) / 3)


def test_growing_goes_on_through_a_dense_block():
    torch.manual_seed(0)
    model = unsettled(DenseBlock())
    whole, atoms = copy.deepcopy(model), find(model, X)
    groups, names = atoms.groups, [g.name for g in atoms.groups]
    assert len(names) == 4
    for number, name in enumerate([*names, names[1], names[0]]):
        size = next(g.size for g in groups if g.name == name)
        _, groups = grow_(model, groups, {name: [0, size - 1, size - 1]}, X)
        assert gap(model, whole, X) < 1e-12, number
    assert model.stem.out_channels == 6 + 6 and model.fc.in_features == 18 + 6 * 3
    again = {g.name: g for g in find(model, X).groups}
    assert {g.name: g.size for g in groups} == {n: g.size for n, g in again.items()}
    for group in groups:
        for place, fresh in zip(group.places, again[group.name].places, strict=True):
            assert (place.tensor, place.axes) == (fresh.tensor, fresh.axes)
            assert np.array_equal(place.index, fresh.index)


class Gated(nn.Module):
    """A gated layer whose two halves lie in one weight, behind a flattened map."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.up = nn.Linear(64, 2 * 5)
        self.down = nn.Parameter(torch.randn(5, 3))

    def forward(self, x):
        a, b = self.up(self.conv(x).flatten(1)).chunk(2, -1)
        return (a * b.sigmoid()) @ self.down


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(3, 4, num_layers=2, bidirectional=True, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.rnn(x.flatten(2).transpose(1, 2))[0])


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.out = nn.Linear(3, 3 * 3 * 2), nn.Linear(6, 3)
        self.heads = 3

    def forward(self, x):
        x = x.flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, scale=0.4).transpose(1, 2).flatten(2))


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 4), nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        return self.b(self.norm(self.a(x)))


@pytest.mark.parametrize("kind", [Gated, Recurrent])
def test_units_of_other_layers(kind):
    torch.manual_seed(0)
    model = unsettled(kind())
    atoms = find(model, X)
    assert atoms.groups
    for group in atoms.groups:
        twin = copy.deepcopy(model)
        _, groups = grow_(twin, atoms.groups, {group.name: [1, 1, 2]}, X)
        assert gap(twin, model, X) < 1e-12, group.name
        assert next(g.size for g in groups if g.name == group.name) == group.size + 3


def test_whole_heads_with_their_attribute():
    torch.manual_seed(0)
    model = unsettled(Heads())
    atoms = find(model, X)
    heads = next(g for g in atoms.groups if g.size == 3)
    twin = copy.deepcopy(model)
    with pytest.raises(CutRefused, match=r"the function would change by|the grown model does not run"):
        grow_(twin, atoms.groups, {heads.name: [1]}, X)
    assert twin.qkv.out_features == 18
    grow_(twin, atoms.groups, {heads.name: [1]}, X, attributes={"heads": 4})
    assert gap(twin, model, X) < 1e-12 and twin.heads == 4 and twin.qkv.out_features == 24
    features = next((g for g in atoms.groups if g.size == 2 and not any("out" in p.tensor for p in g.places)), None)
    if features is not None:
        with pytest.raises(CutRefused, match="no weight sums over its units, so nothing can share between copies"):
            grow_(copy.deepcopy(model), atoms.groups, {features.name: [0]}, X)


def test_statistics_over_units_need_equal_copies():
    model = unsettled(Normed())
    x = torch.randn(5, 6).double()
    atoms = find(model, x)
    (group,) = atoms.groups
    whole = copy.deepcopy(model)
    with pytest.raises(
        CutRefused, match="layer_norm norm would see other statistics unless every unit is copied equal"
    ):
        grow_(model, atoms.groups, {group.name: [0]}, x)
    grow_(model, atoms.groups, {group.name: [0, 1, 2, 3]}, x)
    assert gap(model, whole, x) < 1e-12 and model.norm.normalized_shape == (8,)


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.0, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, 0.0, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.0, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.0),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_optimiser_states_are_those_of_the_grown_network(kind):
    """With a learning rate of zero the states of a network grown at the end and at the beginning must agree."""
    torch.manual_seed(0)
    late = unsettled(Block())
    early = copy.deepcopy(late)
    copies = {"a": [0, 0, 3], "b": [5]}
    grow_(early, block_groups(), copies, X)
    optimizers = [OPTIMIZERS[kind](model.parameters()) for model in (late, early)]
    for model, optimizer in zip((late, early), optimizers, strict=True):
        steps(model, optimizer, batches(4))
        F.cross_entropy(model(X), torch.zeros(4, dtype=torch.long)).backward()
    table = {"conv2.weight": late.conv2.weight.detach().clone()}
    average = copy.deepcopy(late)
    grow_(late, block_groups(), copies, X, optimizers=optimizers[:1], tables=[table], averages=[average])
    torch.testing.assert_close(table["conv2.weight"], early.conv2.weight)
    torch.testing.assert_close(average.conv2.weight, early.conv2.weight)
    for (name, p), q in zip(late.named_parameters(), early.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-12, msg=f"gradient of {name}")
        for key, value in optimizers[0].state[p].items():
            torch.testing.assert_close(
                value, optimizers[1].state[q][key], rtol=1e-8, atol=1e-12, msg=f"{key} of {name}"
            )


def test_noise_breaks_the_symmetry_of_copies():
    torch.manual_seed(0)
    model = unsettled(Block())
    whole = copy.deepcopy(model)
    grow_(model, block_groups(), {"a": [0]}, X, noise=1e-3, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(model.conv1.weight[0], model.conv1.weight[1])
    assert torch.equal(model.conv1.weight[0], whole.conv1.weight[0])
    assert 1e-9 < gap(model, whole, X) < 1e-2


def test_a_grown_network_has_a_record_too():
    torch.manual_seed(0)
    model = unsettled(Block())
    _, groups = grow_(model, block_groups(), {"a": [0, 7]}, X)
    grow_(model, groups, {"a": [9], "b": [1]}, X)
    fresh = rebuild(Block().double(), record(model), model.state_dict())
    assert torch.equal(fresh.eval()(X), model.eval()(X))
    assert fresh.depth.groups == 11


def test_what_can_not_grow_is_said():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(9, 4)
            self.inner = nn.Linear(4, 4)
            self.head = nn.Linear(4, 9, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x) + self.inner(self.embed(x)))

    model, x = Tied(), torch.arange(6)
    atoms = find(model, x)
    text = (
        r"axis 1 of 'embed.weight' is summed over and also used as it is \(tied weights\): copies there can not be div"
    )
    with pytest.raises(CutRefused, match=text):
        grow_(model, atoms.groups, {atoms.groups[0].name: [0]}, x)
    block = Block()
    with pytest.raises(UserError, match=r"copies: got 'c'; allowed: names of groups: a, b"):
        grow_(block, block_groups(), {"c": [0]}, X.float())
    with pytest.raises(UserError, match=r"copies\['a'\]: got 8; allowed: units 0 to 7"):
        grow_(block, block_groups(), {"a": [8]}, X.float())
    frozen = UnitGroup("f", 8, (rows("conv1.weight", 0, 8),), frozen="so")
    joint = UnitGroup("j", 8, (Place("conv1.weight", (0, 1), np.arange(24).reshape(8, 3)),))
    halves = UnitGroup("h", 8, block_groups()[0].places, balance=((0, 1, 2, 3), (4, 5, 6, 7)))
    for group, units, text in (
        (frozen, [0], "it is frozen: so"),
        (joint, [0], "'conv1.weight' holds its units along several axes at once: there is no growing yet"),
        (halves, [0], r"its parts would have \[4, 5\] units, they must have equally many"),
        (UnitGroup("p", 8, block_groups()[0].places[:-1]), [0], "no weight sums over its units"),
        (UnitGroup("q", 8, block_groups()[0].places[1:]), [0], "the grown model does not run: RuntimeError"),
    ):
        with pytest.raises(CutRefused, match=text):
            grow_(block, [group], {group.name: units}, X.float())
    assert block.conv1.weight.shape[0] == 8 and "_archsmith_record" not in vars(block)


def test_consuming_axes_are_read_off_the_graph():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Parameter(torch.randn(4, 4)) for _ in range(3))
            self.d = nn.Linear(4, 4)
            self.conv = nn.Conv1d(4, 4, 1, groups=4)
            self.up = nn.ConvTranspose1d(4, 4, 1)
            self.rnn = nn.GRU(4, 4)

        def forward(self, x):
            x = x @ self.a + x @ self.b.T
            x = self.d(torch.einsum("bi,oi->bo", x, self.c))
            x = self.up(self.conv(x[..., None]))[..., 0]
            return self.rnn(x)[0] * self.a.sum()

    model = Many()
    program = export(model, torch.randn(3, 4), None)
    consuming, mixed = consuming_axes(program.graph_module, program.tensor_names)
    expected = {("a", 0), ("b", 1), ("c", 1), ("d.weight", 1), ("up.weight", 0)}
    assert consuming == {*expected, ("rnn.weight_ih_l0", 1), ("rnn.weight_hh_l0", 1)}
    assert mixed == {("a", 0)}


# --------------------------------------------------------------------- deeper


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("shape", [(6, 5, 7, 7), (6, 5), (6, 4, 5)])
def test_a_deeper_layer_changes_nothing(shape, norm):
    x = torch.randn(*shape).double().relu()
    like = nn.Conv2d(3, 5, 5).double()
    layer = deeper_layer(like, x, norm=norm)
    if isinstance(layer, nn.Sequential) and x.dim() == 3:
        layer = nn.Sequential(layer[0], nn.Flatten(0, 1), layer[1], nn.Unflatten(0, shape[:2]))
    for training in (False, True):
        torch.testing.assert_close(copy.deepcopy(layer).train(training)(x).relu(), x, rtol=1e-9, atol=1e-9)
    first = layer[0] if isinstance(layer, nn.Sequential) else layer
    assert first.weight.dtype == torch.float64 and (first.bias is None) == norm
    if x.dim() == 4:
        assert first.kernel_size == (5, 5)
        assert deeper_layer(nn.ReLU(), x.float()).weight.shape == (5, 5, 3, 3)


def test_wrong_deeper_layers_are_said():
    with pytest.raises(UserError, match=r"x: got a tensor of shape \(3,\); allowed: images or feature vectors"):
        deeper_layer(nn.ReLU(), torch.zeros(3))
    with pytest.raises(UserError, match="kernel: got 4; allowed: an odd number"):
        deeper_layer(nn.Conv2d(3, 3, 4), torch.zeros(1, 3, 4, 4))
