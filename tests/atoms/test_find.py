import pytest
import torch
import torch.nn.functional as F
from atoms_checks import gap, single_and_pairs
from atoms_nets import NETS, build
from torch import Tensor, nn

from archsmith.atoms.finding import find
from archsmith.atoms.plan import CutRefused
from archsmith.core.errors import UserError

MAY_REFUSE = {"shuffle into conv", "shape-scaled attention", "written in slices"}
"""Nets some of whose cuts are refused: numbers of rows or positions in the code, a scale by the width."""


def cut_and_compare(name: str, limit: int) -> None:
    model, inputs = build(name)
    found = find(model, inputs)
    done = 0
    for removed in single_and_pairs(found, limit):
        try:
            cut = found.plan(removed)
        except CutRefused as refusal:
            if any(len(units) == found.group(group).size for group, units in removed.items()):
                assert "at least 1 must stay" in refusal.reason  # a whole width was asked for
            else:
                assert name in MAY_REFUSE, refusal
            continue
        assert all(len(units) < found.group(group).size for group, units in removed.items())
        assert gap(found, cut, inputs, lambda twin, *x: twin(*x)) < 1e-5, (removed, cut.attributes)
        done += 1
    assert done or name in MAY_REFUSE


@pytest.mark.parametrize("name", NETS)
def test_some_cuts_equal_the_masked_original(name):
    cut_and_compare(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETS)
def test_every_unit_and_pair_equals_the_masked_original(name):
    cut_and_compare(name, 400)


def groups_of(name: str) -> dict[str, int]:
    model, inputs = build(name)
    return {group.name: group.size for group in find(model, inputs).groups}


def test_groups_are_the_widths_of_a_residual_network():
    model, inputs = build("residual")
    found = find(model, inputs)
    assert {g.name: g.size for g in found.groups} == {"stem": 6, "a": 8, "down": 10}
    stem = {(place.tensor, place.axes[0]) for place in found.group("stem").places}
    assert {("stem.weight", 0), ("bn.weight", 0), ("bn.running_var", 0), ("a.weight", 1), ("b.weight", 0)} <= stem
    assert ("bnb.running_mean", 0) in stem and ("down.weight", 1) in stem


def test_shuffled_channels_reach_the_right_inputs():
    """Two rows of three columns, transposed: column j owns outputs j and j + 3, but inputs 2 j and 2 j + 1."""
    model, inputs = build("shuffle into conv")
    found = find(model, inputs)
    columns = found.group("a.columns")
    places = {(p.tensor, p.axes[0]): p.index.tolist() for p in columns.places}
    assert places["a.weight", 0] == [[0, 3], [1, 4], [2, 5]]
    assert places["b.weight", 1] == [[0, 1], [2, 3], [4, 5]]


def test_heads_go_with_their_key_and_value_group_and_pairs_of_rotary_columns():
    model, inputs = build("decoder")
    found = find(model, inputs)
    heads = {(p.tensor, p.axes[0]): p.index.tolist() for p in found.group("attention.q.rows").places}
    assert heads["attention.q.weight", 0] == [list(range(12)), list(range(12, 24))]
    assert heads["attention.k.weight", 0] == [list(range(6)), list(range(6, 12))]
    pairs = {(p.tensor, p.axes[0]): p.index.tolist() for p in found.group("attention.q.columns").places}
    assert pairs["cos", 1] == [[0, 3], [1, 4], [2, 5]]
    assert found.plan({"attention.q.rows": [0]}).attributes == {"attention.num_heads": 2, "attention.num_kv": 1}
    assert found.plan({"attention.q.columns": [1]}).attributes == {"attention.head_dim": 4}


def test_units_before_a_normalisation_are_function_changing():
    model, inputs = build("norm after permute")
    found = find(model, inputs)
    assert found.group("stem").changes == ("layer_norm norm",)
    assert found.group("up").changes == ()


def test_one_attribute_of_two_widths_is_told_apart():
    """Heads of one layer and columns of the other have the same old and new size."""
    model, inputs = build("fused qkv")
    found = find(model, inputs)
    names = {group.name: group.size for group in found.groups}
    assert names == {"qkv.rows": 4, "qkv.columns": 3, "qkv.inputs": 10}
    assert found.plan({"qkv.rows": [1]}).attributes == {"heads": 3}
    assert found.plan({"qkv.columns": [1]}).attributes == {"head_dim": 2}


def test_cuts_to_the_same_widths_are_traced_once(monkeypatch):
    from archsmith.atoms import replay

    model, inputs = build("residual")
    found = find(model, inputs)
    traced = []
    original = replay.export
    monkeypatch.setattr(replay, "export", lambda *a, **k: traced.append(1) or original(*a, **k))
    for unit in range(4):
        found.plan({"a": [unit]})
    assert len(traced) == 1


class Sized(nn.Module):
    """A linear network whose middle is given by the test."""

    def __init__(self, middle, width: int = 6, after: int = 6) -> None:
        super().__init__()
        self.enter, self.leave, self.middle = nn.Linear(4, width), nn.Linear(after, 3), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.middle(self.enter(x)))


REFUSED = {
    "a scale by the width": (lambda y: y / y.shape[-1] ** 0.5, 6, "a constant follows the width"),
    "a branch on the width": (lambda y: y.relu() if y.shape[-1] == 6 else y.sigmoid(), 6, "meets aten.sigmoid"),
    "a slice by number": (lambda y: y[:, :3], 3, "a and b must have same reduction dim"),
    "a roll by number": (lambda y: y.roll(2, -1) + y.flip(-1), 6, "living positions end up elsewhere"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_silent_damage_is_refused(what):
    middle, after, reason = REFUSED[what]
    found = find(Sized(middle, 6, after).eval(), torch.randn(2, 4))
    with pytest.raises(CutRefused, match=reason) as refusal:
        found.plan({found.groups[0].name: [found.groups[0].size - 1]})
    assert refusal.value.group == found.groups[0].name


PINNED = {
    "a fixed vector": (lambda y: y * torch.arange(6.0), "meets a tensor of fixed width"),
    "positions by rank": (lambda y: y.topk(6, -1)[0], "positions of the axis are returned"),
    "an unknown operator": (lambda y: torch.linalg.matrix_exp(y[:2, :2]).sum() + y.diff(dim=-1, prepend=y[:, :1]), ""),
    "itself transposed": (lambda y: (y[:, :, None] * y[:, None, :]).sum(1) @ torch.eye(6), "fixed width"),
}


@pytest.mark.parametrize("what", PINNED)
def test_what_has_no_rule_is_pinned_with_a_reason(what):
    middle, reason = PINNED[what]
    found = find(Sized(middle).eval(), torch.randn(2, 4))
    assert not found.groups
    assert any(reason in pinned.reason and "enter.weight" in pinned.tensors for pinned in found.pinned)
    assert "enter.weight" in found.explain()


def test_unknown_operator_is_named():
    found = find(
        Sized(lambda y: y + torch.special.zeta(y.abs() + 2, y.abs() + 1).cummax(-1)[0]).eval(), torch.randn(2, 4)
    )
    assert any(p.operator == "aten.cummax.default" and p.reason == "this operator has no rule" for p in found.pinned)


def test_branches_of_the_training_mode_count():
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.main, self.extra = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            return self.main(y) + self.extra(y) if self.training else self.main(y)

    found = find(Auxiliary(), torch.randn(2, 4))
    (group,) = found.groups
    assert ("extra.weight", 1) in {(p.tensor, p.axes[0]) for p in group.places}


def test_code_of_the_training_mode_that_does_not_fit_refuses_the_cut():
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.width = nn.Linear(4, 6), nn.Linear(6, 3), 6

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if self.training:
                y = y + torch.cat([y[:, 3:], y[:, :3]], -1) * 0.1
            return self.b(y)

    found = find(Noisy(), torch.randn(2, 4))
    assert {group.size for group in found.groups} == {3}  # the training mode pairs i with i + 3
    with pytest.raises(CutRefused, match=r"in training mode: aten\.slice"):
        found.plan({found.groups[0].name: [0]})


def test_unused_tensors_stay():
    model = Sized(torch.relu)
    model.unused = nn.Parameter(torch.zeros(6))
    found = find(model.eval(), torch.randn(2, 4))
    assert [p.tensors for p in found.pinned if p.operator == "unused"] == [("unused",)]


def test_torch_attention_loses_a_head_with_its_part_of_the_stream():
    layer = nn.TransformerEncoderLayer(12, 3, 10, batch_first=True)
    model = nn.Sequential(nn.Linear(5, 12), layer, nn.Linear(12, 4)).eval()
    found = find(model, torch.randn(2, 6, 5))
    assert {g.name: g.size for g in found.groups} == {"0": 3, "1.linear1": 10}
    cut = found.plan({"0": [1]})
    assert gap(found, cut, (torch.randn(2, 6, 5),), lambda twin, x: twin(x)) < 1e-5


def test_the_model_stays_as_it_is():
    model, inputs = build("decoder")
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    hooks, attributes = dict(model._forward_hooks), sorted(model.attention.__dict__)
    find(model, inputs).plan({"attention.q.rows": [0]})
    assert model.training and model.attention.num_heads == 4 and model.head.weight is model.embed.weight
    assert model._forward_hooks == hooks and sorted(model.attention.__dict__) == attributes
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_hooks_that_a_model_puts_on_itself_while_traced_are_gone():
    class Hooked(Sized):
        def forward(self, x: Tensor) -> Tensor:
            if not getattr(self, "hooked", False):
                self.enter.register_forward_hook(lambda module, args, output: output * 2)
                self.hooked = True
            return super().forward(x)

    model = Hooked(torch.relu).eval()
    find(model, torch.randn(2, 4))
    assert not model.enter._forward_hooks and not hasattr(model, "hooked")


def test_frozen_and_constraints():
    model, inputs = build("residual")
    frozen = find(model, inputs, frozen=["a", "down.weight"])
    assert not frozen.groups  # a's inputs are the stream
    assert any(p.operator == "frozen" and "a.weight" in p.tensors for p in frozen.pinned)
    found = find(model, inputs, constraints={"a": {"divisor": 4}, "down": {"minimum": 9}})
    with pytest.raises(CutRefused, match="not a multiple of 4"):
        found.plan({"a": [0]})
    with pytest.raises(CutRefused, match="at least 9 must stay"):
        found.plan({"down": [0, 1]})
    assert "a multiple of 4" in found.explain()


def test_equal_pieces_are_required_before_anything_is_traced():
    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            left, right = torch.cat([self.a(x), self.b(x)], -1).chunk(2, -1)
            return self.c(left) + self.d(right)

    found = find(Halves(), torch.randn(2, 4))
    with pytest.raises(CutRefused, match="splits into pieces of equal width: they would be"):
        found.plan({found.groups[0].name: [0]})


@pytest.mark.parametrize("name", ["shuffle", "shufflenet"])
def test_halves_of_shuffled_channels_go_together(name):
    model, inputs = build(name)
    found = find(model, inputs)
    for group in found.groups:
        assert found.plan({group.name: [0]}).tensors


def test_bad_input():
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            if y.sum() > 0:
                return y
            return -y

    with pytest.raises(UserError, match=r"test_find.py:\d+ \(if y.sum\(\) > 0:\)"):
        find(Branching(), torch.randn(2, 4))
    model, inputs = build("residual")
    with pytest.raises(UserError, match="example_inputs"):
        find(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(UserError, match="a tensor, a tuple"):
        find(model, "image")
    with pytest.raises(UserError, match="frozen"):
        find(model, inputs, frozen=["nowhere"])
    found = find(model, inputs)
    with pytest.raises(CutRefused, match="at least 1 must stay"):
        found.plan({"a": range(8)})
    with pytest.raises(UserError, match="positions 0 to 7"):
        found.plan({"a": [8]})
    with pytest.raises(UserError, match="names of groups"):
        found.plan({"b": [0]})
    with pytest.raises(CutRefused, match="the replay fails with the given attributes"):
        decoder, tokens = build("decoder")
        find(decoder, tokens).plan({"attention.q.rows": [0]}, attributes={"attention.num_heads": 3})
    model.fc = nn.Linear(10, 7)
    with pytest.raises(UserError, match="find again after a cut"):
        found.plan({"a": [0]})


def test_other_ways_of_calling():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor, *, scale: Tensor) -> dict[str, Tensor]:
            hidden = self.a(x) * scale
            return {"hidden": hidden, "out": self.b(F.relu(hidden))}

    inputs = {"x": torch.randn(2, 4), "scale": torch.randn(1)}
    assert not find(Two(), inputs).groups  # the hidden values are returned
    found = find(Two(), inputs, forward=lambda model, **given: model(**given)["out"])
    assert {g.name: g.size for g in found.groups} == {"a": 6}
    assert found.plan({"a": [1, 2]}).tensors["b.weight"].axes[1].tolist() == [0, 3, 4, 5]


class TablesLongerThanTheExample(nn.Module):
    """Positions of a learned table, and of a buffer, of which a short input reads the first."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Parameter(torch.randn(12, 6))
        self.first, self.second = nn.Parameter(torch.randn(12, 6)), nn.Parameter(torch.randn(12, 6))
        self.embedding = nn.Embedding(12, 6)
        self.register_buffer("numbers", torch.arange(12)[None])
        self.inner, self.outer = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        length = x.shape[1]
        x = x + self.positions[:length] + (self.first + self.second)[:length] + self.embedding(self.numbers[:, :length])
        return self.outer(torch.relu(self.inner(x)))


def test_what_longer_inputs_would_read_is_pinned():
    found = find(TablesLongerThanTheExample(), torch.randn(2, 4, 6))
    assert [(group.name, group.size) for group in found.groups] == [("inner", 5)]
    for name in ("positions", "first", "second", "numbers"):
        assert any(name in pinned.tensors and "size of the input" in pinned.reason for pinned in found.pinned)
