"""Widths by two copies: the step, the penalty, the cut, and a resumed search."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hand_units import IMAGE, awaken, batch, branches
from torch import nn

from archsmith.atoms.declared import DeclaredAtoms
from archsmith.atoms.finding import find
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.supernet.split import Relaxed
from archsmith.train.loop import Diverged
from archsmith.train.width_search import WidthSearch

CLOSED = {"c1": [2, 5], "c2": [1, 3, 11], "c3": [4]}


def sgd(model, lr=0.05):
    return torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=1e-3)


def started(atoms=None, *, optimizer=None, budget=None, **changes):
    atoms = atoms or branches()
    optimizer = optimizer or sgd(atoms.model)
    return WidthSearch(atoms, optimizer, budget, **{"rate": 0.02, **changes}), optimizer


def losses(number):
    """Return the losses of two batches, one of each half."""
    (x, y), (u, v) = batch(2 * number), batch(2 * number + 1)
    return (lambda net: F.cross_entropy(net(x), y)), (lambda net: F.cross_entropy(net(u), v))


def learn(search, steps, first=0):
    return [search.learn(*losses(number)) for number in range(first, first + steps)]


def set_factors(search, closed, rest=0.7):
    with torch.no_grad():
        for name, factor in search.factors.values.items():
            factor.fill_(rest)
            factor[list(closed.get(name, ()))] = 0.0


class Shifted(nn.Module):
    """A residual sum whose normalisations have shifts, and activations that do not keep zero at zero."""

    def __init__(self):
        super().__init__()
        self.stem, self.n1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.n2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.wide = nn.Conv2d(6, 10, 3, padding=1)
        self.head = nn.Linear(10, 10)

    def forward(self, x):
        x = torch.sigmoid(self.n1(self.stem(x)))
        x = x + torch.sigmoid(self.n2(self.inner(x)))
        return self.head(torch.sigmoid(self.wide(x)).mean((2, 3)))


def found():
    return find(awaken(Shifted()), torch.randn(IMAGE))


@pytest.mark.parametrize("make", [branches, found])
def test_the_thin_network_computes_what_the_masked_one_does(make):
    atoms = make()
    model = awaken(atoms.model)
    search, _ = started(atoms)
    closed = CLOSED if make is branches else {group.name: [0, 3] for group in atoms.groups}
    set_factors(search, closed)
    assert search.going() == {name: closed.get(name, []) for name in search.going()}
    model.eval()
    x = torch.randn(4, *IMAGE[1:])
    masked, before = model(x), count(copy.deepcopy(model), torch.zeros(IMAGE)).macs
    assert search.finish() and search.twin is None
    torch.testing.assert_close(model(x), masked, rtol=1e-5, atol=1e-5)
    assert count(model, torch.zeros(IMAGE)).macs < before
    assert {name: len(units) for name, units in closed.items()} == search.history[-1].removed
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert set(map(id, sgd(model).param_groups[0]["params"])) == set(map(id, model.parameters()))


def test_small_factors_that_are_cut_count_as_zero():
    """What the threshold takes is not zero yet: the thin network is the one with exactly these units masked."""
    atoms = branches()
    search, _ = started(atoms, threshold=0.05)
    set_factors(search, {})
    with torch.no_grad():
        for name, units in CLOSED.items():
            search.factors.values[name][units] = torch.linspace(-0.04, 0.04, len(units))
    atoms.model.eval()
    x = torch.randn(4, *IMAGE[1:])
    with search.factors.using({n: f.detach() * (f.detach().abs() > 0.05) for n, f in search.factors.values.items()}):
        masked = atoms.model(x)
    search.finish()
    torch.testing.assert_close(atoms.model(x), masked, rtol=1e-5, atol=1e-5)


def direct(model, twin, search, number):
    """Return the gradients of both losses by the factors, with plain calls of the hooked networks."""
    train, valid = losses(number)
    factors = list(search.factors.values.values())
    return torch.autograd.grad(train(model), factors), torch.autograd.grad(valid(twin), factors)


@pytest.mark.parametrize("coupling", [0.0, 3.0])
def test_factors_learn_from_both_halves_and_from_the_penalty(coupling):
    search, _ = started(relaxed=Relaxed(train_weight=2.5, coupling=coupling), penalty=0.3)
    with torch.no_grad():
        for parameter in search.twin.parameters():
            parameter.mul_(1.1)
        next(iter(search.factors.values.values()))[0] = -0.5
    on_train, on_valid = direct(search.model, search.twin, search, 0)
    signs = [factor.detach().sign() for factor in search.factors.values.values()]
    taken = {}
    search._factor_optimizer.register_step_pre_hook(
        lambda *_: taken.update({name: f.grad.clone() for name, f in search.factors.values.items()})
    )
    learn(search, 1)
    for name, t, v, sign in zip(search.factors.values, on_train, on_valid, signs, strict=True):
        assert t.abs().max() > 0 and v.abs().max() > 0
        torch.testing.assert_close(taken[name], 2.5 * t + v + 0.3 * sign, rtol=1e-5, atol=1e-6)


def test_weights_move_down_their_own_loss_with_the_spring_behind_the_clip():
    optimizers = []
    atoms = branches()
    optimizers.append(torch.optim.SGD(atoms.model.parameters(), lr=0.1))
    search, _ = started(atoms, optimizer=optimizers[0], relaxed=Relaxed(coupling=1.0), clip_norm=1e-9)
    with torch.no_grad():
        for parameter in search.twin.parameters():
            parameter.add_(0.1)
    w = {name: p.detach().clone() for name, p in search.model.named_parameters()}
    y = {name: p.detach().clone() for name, p in search.twin.named_parameters()}
    learn(search, 1)
    for name, p in search.model.named_parameters():  # the copy moves second, towards where the weights are now
        torch.testing.assert_close(p, w[name] - 0.1 * (w[name] - y[name]), rtol=1e-5, atol=1e-6)
        own = dict(search.twin.named_parameters())[name]
        torch.testing.assert_close(own, y[name] - 0.1 * (y[name] - p), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("passes", "calls"), [("fused", 1), ("gauss-seidel", 2)])
def test_passes_of_a_step(passes, calls):
    search, _ = started(passes=passes)
    seen = {"train": 0, "valid": 0}
    train, valid = losses(0)

    def counted(name, loss):
        def call(net):
            seen[name] += 1
            return loss(net)

        return call

    search.learn(counted("train", train), counted("valid", valid))
    assert seen == {"train": calls, "valid": calls}


def test_each_network_has_its_own_running_statistics():
    search, _ = started()
    learn(search, 2)
    own, other = (dict(net.named_buffers()) for net in (search.model, search.twin))
    assert not torch.equal(own["n1.running_mean"], other["n1.running_mean"])
    assert int(own["n1.num_batches_tracked"]) == int(other["n1.num_batches_tracked"]) == 2


def test_a_strong_spring_holds_the_copies_together():
    distances = [learn(started(relaxed=Relaxed(coupling=beta))[0], 20)[-1]["distance"] for beta in (1e-3, 1e-1, 1.0)]
    assert distances == sorted(distances, reverse=True) and distances[-1] < distances[0] / 2


@pytest.mark.parametrize("sparsity", [pytest.param("gradient", marks=pytest.mark.slow), "threshold"])
def test_a_stronger_penalty_leaves_fewer_units(sparsity):
    left = []
    for rho in (0.0, 0.01, 0.05) if sparsity == "gradient" else (0.0, 0.5, 2.0):
        search, _ = started(penalty=rho, sparsity=sparsity, threshold=0.05)
        learn(search, 100)
        left.append(sum(g.size for g in search.groups) - sum(map(len, search.going().values())))
    assert left[0] == 26 and left[0] > left[1] > left[2]


def test_the_threshold_form_stops_at_zero():
    search, _ = started(penalty=100.0, sparsity="threshold", rate=0.01)
    learn(search, 3)
    assert all(bool((factor == 0).all()) for factor in search.factors.values.values())
    assert search.penalty() == 0.0


def test_one_threshold_for_a_stated_part_of_all_units():
    search, _ = started(ratio=0.25)
    with torch.no_grad():
        for name, factor in search.factors.values.items():
            factor.copy_(torch.linspace(0.5, 1.0, len(factor)) + {"c1": 0.0, "c2": 10.0, "c3": 0.01}[name])
    going = search.going()
    assert sum(map(len, going.values())) == int(0.25 * 26) == 6 and not going["c2"]
    kept = [f[[i for i in range(len(f)) if i not in going[n]]].min() for n, f in search.factors.values.items()]
    gone = [f[going[n]].max() for n, f in search.factors.values.items() if going[n]]
    assert max(gone) < min(kept)
    search.finish()
    assert sum(group.size for group in search.groups) == 20


def test_a_budget_takes_the_smallest_factors_and_holds():
    atoms = branches()
    before = count(atoms.model, torch.zeros(IMAGE)).macs
    search, _ = started(atoms, budget="macs<=0.5x")
    learn(search, 5)
    assert search.finish()
    assert count(atoms.model, torch.zeros(IMAGE)).macs <= 0.5 * before


def test_a_group_keeps_its_largest_factor():
    atoms = branches()
    search, _ = started(atoms)
    set_factors(search, {"c3": range(6)})
    with torch.no_grad():
        search.factors.values["c3"][4] = 0.005
    search.finish()
    assert atoms.model.c3.weight.shape[0] == 1 and search.history[-1].removed == {"c3": 5}


@pytest.mark.parametrize("passes", ["fused", "gauss-seidel"])
def test_a_resumed_search_makes_the_same_steps(passes):
    search, optimizer = started(passes=passes)
    learn(search, 3)
    kept = copy.deepcopy(
        (search.state_dict(), search.tensors(), search.model.state_dict(), optimizer.state_dict(), search.steps)
    )
    learn(search, 3, first=3)
    search.finish()
    again, second = started(branches(seed=9), passes=passes)
    again._fingerprint = search._fingerprint
    again.load_state_dict(kept[0])
    again.model.load_state_dict(kept[2])
    second.load_state_dict(kept[3])
    again.load_tensors(kept[1])
    assert again.steps == kept[4] == 3
    learn(again, 3, first=3)
    again.finish()
    one, two = search.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_copy_has_the_settings_of_the_first_optimiser():
    atoms = branches()
    slow = [p for name, p in atoms.model.named_parameters() if name.endswith("bias")]
    fast = [p for name, p in atoms.model.named_parameters() if not name.endswith("bias")]
    optimizer = torch.optim.AdamW([{"params": slow, "weight_decay": 0.0}, {"params": fast, "lr": 0.01}], lr=0.1)
    search, _ = started(atoms, optimizer=optimizer)
    optimizer.param_groups[1]["lr"] = 0.005
    learn(search, 1)
    groups = search._twin_optimizer.param_groups
    assert isinstance(search._twin_optimizer, torch.optim.AdamW)
    assert [(g["weight_decay"], g["lr"], len(g["params"])) for g in groups] == [
        (0.0, 0.1, len(slow)),
        (0.01, 0.005, len(fast)),
    ]
    own = {id(p) for p in search.twin.parameters()}
    assert {id(p) for g in groups for p in g["params"]} == own


def test_what_has_no_value_stops_before_the_step():
    search, _ = started()
    before = [p.detach().clone() for p in search.model.parameters()]
    with pytest.raises(Diverged, match="epoch 3, step 8"):
        search.learn(lambda net: net(batch(0)[0]).sum() * float("nan"), losses(0)[1], (2, 7))
    assert all(torch.equal(p, was) for p, was in zip(search.model.parameters(), before, strict=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sparsity": "l0"}, "sparsity: got 'l0'; allowed: 'gradient' or 'threshold'"),
        ({"ratio": 1.0}, "ratio: got 1.0"),
        ({"penalty": -1.0}, "penalty: got -1.0"),
    ],
)
def test_values_out_of_range_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        started(**changes)


def test_other_optimisers_and_other_steps_are_refused():
    atoms = branches()
    with pytest.raises(UserError, match="one optimiser of all trained parameters"):
        WidthSearch(atoms, torch.optim.SGD(atoms.model.c1.parameters(), 0.1))
    search, _ = started(atoms)
    with pytest.raises(UserError, match=r"allowed: learn\(train, valid\)"):
        search.step()
    set_factors(search, CLOSED)
    search.finish()
    with pytest.raises(UserError, match=r"learn: got it after finish\(\)"):
        learn(search, 1)


def test_declared_units_work_as_found_ones():
    assert isinstance(branches(), DeclaredAtoms)
    search, _ = started(found())
    learn(search, 2)
    assert set(search.factors.values) == {group.name for group in search.groups if not group.frozen}
