import json

import pytest
import torch
import torch.nn.functional as F
from hand_units import IMAGE, Branches, along, awaken, batch, branches
from torch import nn
from users_networks import digits_net

from archsmith.atoms.declared import DeclaredAtoms
from archsmith.atoms.finding import find
from archsmith.atoms.gates import GateOptions, LogisticGate
from archsmith.atoms.shrinker import Shrinker
from archsmith.atoms.units import UnitGroup
from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.methods import load_method, method_table
from archsmith.methods.figs import Figs, Settings, levelled_off, preset_settings


def close_gates(figs, closed):
    """Set log odds so that exactly these units are closed."""
    with torch.no_grad():
        for name, logits in figs.gates.logits.items():
            logits.fill_(3.0)
            logits[list(closed.get(name, ()))] = -3.0


CLOSED = {"c1": [2, 5], "c2": [1, 3, 11], "c3": [4]}


def test_the_method_is_listed():
    row = next(row for row in method_table() if row["slug"] == "figs")
    assert (row["kind"], row["arxiv"], row["docs"]) == ("shrink", "2006.09581", "docs/systems/figs.md")
    assert load_method("figs", kind="shrink")[1].Settings is Settings
    assert Settings().tau == 0.001 and Settings(**preset_settings((3, 32, 32))).tau == 0.1


@pytest.mark.parametrize("soft", [False, True])
def test_the_cut_network_computes_what_the_gated_one_does(soft):
    atoms = branches()
    model = awaken(atoms.model)
    figs = Figs(atoms, options=GateOptions(soft_inference=soft))
    model.double()
    for logits in figs.gates.logits.values():
        logits.data = logits.data.double()
    close_gates(figs, CLOSED)
    model.eval()
    x = torch.randn(IMAGE, dtype=torch.float64)
    gated = model(x)
    figs.cut_()
    assert model.c2.weight.shape == (9, 6, 3, 3)
    torch.testing.assert_close(model(x), gated, rtol=1e-9, atol=1e-9)


def test_the_cost_is_that_of_the_network_that_is_built():
    atoms = branches()
    figs = Figs(atoms)
    close_gates(figs, CLOSED)
    cost = figs.cost()
    figs.cut_()
    assert cost == pytest.approx(2 * count(atoms.model, torch.zeros(IMAGE)).macs)


def test_the_first_channel_stays_and_is_counted():
    atoms = branches()
    figs = Figs(atoms, options=GateOptions(keep_first=True))
    close_gates(figs, {"c1": range(8), "c2": range(12), "c3": range(6)})
    assert figs.cost() == pytest.approx(2 * count(Branches(1, 1, 1), torch.zeros(IMAGE)).macs)
    figs.cut_()
    assert count(atoms.model, torch.zeros(IMAGE)).macs == count(Branches(1, 1, 1), torch.zeros(IMAGE)).macs


def test_masks_are_drawn_once_for_each_step():
    atoms = branches()
    figs = Figs(atoms, options=GateOptions(tau=1.0))
    atoms.model.eval()
    for module in atoms.model.modules():
        module.training = module is atoms.model  # batch statistics off, gates on
    x = torch.randn(IMAGE)
    first = atoms.model(x)
    assert torch.equal(atoms.model(x), first)
    torch.testing.assert_close(atoms.model(x[:1]), first[:1])
    figs.sample()
    assert not torch.allclose(atoms.model(x), first)


def test_the_same_seed_samples_the_same_masks():
    one, two, other = (Figs(branches(), seed=seed, options=GateOptions(tau=1.0)) for seed in (4, 4, 5))
    for _ in range(3):
        for figs in (one, two, other):
            figs.sample()
    assert torch.equal(one.gates.regularisation("c2"), two.gates.regularisation("c2"))
    assert not torch.equal(one.gates.regularisation("c2"), other.gates.regularisation("c2"))


def test_the_penalty_is_the_regulariser_over_the_initial_cost():
    atoms = branches()
    figs = Figs(atoms, penalty=2.0, regularise_on="probability", alive_from="probability")
    p = float(torch.sigmoid(torch.tensor(2.5)))
    weights = figs.resource.weights({})
    expected = sum(weights[name] * p * size for name, size in zip(figs.costs.names, figs.costs.sizes, strict=True))
    assert figs.regulariser().item() == pytest.approx(expected, rel=1e-5)
    assert figs.penalty().item() == pytest.approx(2 * expected / (2 * figs.costs.of()["macs"]), rel=1e-5)
    assert len(figs.parameters()) == 3


def test_one_optimiser_for_weights_and_log_odds():
    atoms = branches()
    figs = Figs(atoms, penalty=20.0, options=GateOptions(tau=1.0))
    optimizer = torch.optim.Adam(atoms.model.parameters(), lr=0.05)
    optimizer.add_param_group({"params": figs.parameters(), "weight_decay": 0.0})
    before = figs.cost()
    for number in range(60):
        x, y = batch(number)
        (F.cross_entropy(atoms.model(x), y) + figs.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
        figs.sample()
    assert figs.cost() < 0.8 * before
    outcome = figs.cut_([optimizer])
    assert outcome is not None
    F.cross_entropy(atoms.model(batch(0)[0]), batch(0)[1]).backward()
    optimizer.step()


class Residual(nn.Module):
    """y = f(x) + x with a gate on both sides, as a user writes it."""

    def __init__(self, gated=True):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.norm2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        options = GateOptions(tau=1.0, keep_first=False, soft_inference=False)
        self.gate1 = LogisticGate(6, options=options) if gated else nn.Identity()
        self.gate2 = LogisticGate(6, options=options) if gated else nn.Identity()
        self.head = nn.Linear(6, 10)

    def forward(self, x):
        x = self.gate1(torch.relu(self.norm(self.stem(x))))
        x = x + self.gate2(torch.relu(self.norm2(self.inner(x))))
        return self.head(x.mean((2, 3)))


def residual_group():
    vectors = ("stem.bias", "inner.bias", "gate1.logits", "gate2.logits")
    norms = [f"{n}.{leaf}" for n in ("norm", "norm2") for leaf in ("weight", "bias", "running_mean", "running_var")]
    return UnitGroup(
        "stem",
        6,
        (
            along("stem.weight", 0, 6),
            *(along(name, 0, 6) for name in (*vectors, *norms)),
            along("inner.weight", 0, 6),
            along("inner.weight", 1, 6),
            along("head.weight", 1, 6),
        ),
    )


@pytest.mark.parametrize("how", ["declared", "found"])
def test_a_channel_with_two_gates_lives_while_either_does(how):
    model = awaken(Residual())
    if how == "declared":
        atoms = DeclaredAtoms(model, torch.zeros(IMAGE), [residual_group()])
    else:
        atoms = find(model, torch.zeros(IMAGE))
    figs = Figs(atoms, regularise_on="probability")
    (name,) = figs.gates.names
    assert len(figs.gates.layers[name]) == 2 and not figs.parameters()
    with torch.no_grad():
        model.gate1.logits.copy_(torch.tensor([3.0, 3, -3, -3, 3, -3]))
        model.gate2.logits.copy_(torch.tensor([3.0, -3, 3, -3, 3, -3]))
    p, q = torch.sigmoid(model.gate1.logits), torch.sigmoid(model.gate2.logits)
    torch.testing.assert_close(figs.gates.regularisation(name, "probability"), 1 - (1 - p) * (1 - q))
    assert figs.alive()[name].tolist() == [True, True, True, False, True, False]
    model.eval()
    x = torch.randn(IMAGE)
    gated = model(x)
    figs.cut_()
    assert model.stem.weight.shape[0] == model.inner.weight.shape[0] == len(model.gate1.logits) == 4
    torch.testing.assert_close(model(x), gated, rtol=1e-5, atol=1e-6)


def test_limits_hold_after_the_cut():
    atoms = branches()
    figs = Figs(atoms)
    figs.cut_(limits={"macs": 0.4 * figs.costs.of()["macs"]})
    assert count(atoms.model, torch.zeros(IMAGE)).macs <= 0.4 * figs.costs.of()["macs"]


def test_nothing_closed_is_no_cut():
    atoms = branches()
    assert Figs(atoms).cut_() is None
    assert not any(module._forward_pre_hooks for module in atoms.model.modules())


def test_export_of_alive_counts():
    figs = Figs(branches())
    close_gates(figs, CLOSED)
    assert json.loads(figs.export()) == {"c1": 6, "c2": 9, "c3": 5, "dw": 6, "n1": 6, "n2": 6, "n3": 9, "n4": 5}


def test_resources_other_than_flops():
    atoms = branches()
    params = Figs(atoms, resource="params").cost()
    matrices = sum(p.numel() for p in atoms.model.parameters() if p.dim() > 1)
    assert params == pytest.approx(matrices)
    assert Figs(branches(), resource="latency", device="p100").cost() > 0
    with pytest.raises(UserError, match="device: got None"):
        Figs(branches(), resource="latency")


def test_a_model_without_gateable_units_is_refused():
    class Free(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.down = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(4, 2))

        def forward(self, x):
            return x @ self.up @ self.down

    group = UnitGroup("h", 4, (along("up", 1, 4), along("down", 0, 4)))
    with pytest.raises(UserError, match="a model none of whose units can have a gate"):
        Figs(DeclaredAtoms(Free(), torch.zeros(2, 3), [group]))


def test_levelled_off():
    falling = [1.0 / (1 + k) for k in range(10)]
    assert not levelled_off(falling)
    assert levelled_off([*falling, *[falling[-1]] * 6])
    assert not levelled_off(falling[:3])
    assert levelled_off(falling, tolerance=0.9)


@pytest.mark.slow
def test_stronger_penalties_leave_smaller_networks():
    """More of the toy is closed under a larger lambda, in the library's own loop."""
    from archsmith import open_task
    from archsmith.methods.figs import Searcher
    from archsmith.run.own_model import OwnCosts, OwnModel
    from archsmith.run.prepare import EarlyJournal

    class Silent:
        def step(self, total, **figures):
            pass

        def should_stop(self):
            return False

    task = open_task("digits", limit=60)
    left = []
    for penalty in (0.0, 0.5, 4.0):
        model = OwnModel("users_networks:digits_net", 0)
        costs = OwnCosts(digits_net(), task, None, {"minimum": 1, "divisor": 1}, EarlyJournal())
        settings = Settings(epochs_shrink=3, epochs_after=0, batch_size=40, penalty=penalty, tau=0.5, gate_lr=0.15)
        searcher = Searcher(model=model, task=task, settings=settings, costs=costs, seed=0)
        while not searcher.done:
            figures = searcher.advance(Silent())
        left.append(figures["macs_fraction"])
    assert left[0] > left[1] > left[2]


@pytest.mark.parametrize("zero_first", [True, False])
def test_gate_layers_are_charged_wherever_gradients_are_cleared(zero_first):
    """Layers of the model are trained by the user's optimiser: their charge must be there before it steps."""
    model = Residual()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    seen = []
    atoms = DeclaredAtoms(model, torch.zeros(IMAGE), [residual_group()])
    shrink = Shrinker(atoms, optimizer, score="figs", penalty=100.0)
    optimizer.register_step_pre_hook(lambda *_: seen.append(model.gate1.logits.grad.clone()))
    for number in range(3):
        if zero_first:
            optimizer.zero_grad()
        F.cross_entropy(model(batch(number)[0]), batch(number)[1]).backward()
        optimizer.step()
        if not zero_first:
            optimizer.zero_grad()
        shrink.step()
    assert all((gradient > 1e-3).any() for gradient in seen)
