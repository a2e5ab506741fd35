import copy
import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hand_units import IMAGE, Attention, Branches, attention, awaken, batch, branches
from torch import nn
from two_processes import outcomes

from archsmith.atoms.declared import DeclaredAtoms
from archsmith.atoms.finding import find
from archsmith.atoms.gates import GateOptions
from archsmith.atoms.shrinker import Shrinker
from archsmith.atoms.unit_budget import CutSchedule
from archsmith.core.errors import UserError
from archsmith.cost import count

SCORES = ("scale", "factor", "l1", "l2", "taylor", "figs", "random")
QUICK = CutSchedule(kind="cubic", begin=2, end=6, every=2)


def sgd(model):
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(model, optimizer, shrink, steps, *, first=0, call=None):
    """The three-line loop; returns at which steps a cut was made."""
    cuts = []
    for number in range(first, first + steps):
        x, y = batch(number)
        F.cross_entropy((call or model)(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrink.step():
            cuts.append(number + 1)
    return cuts


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("make_optimizer", [sgd, lambda m: torch.optim.AdamW(m.parameters(), lr=1e-3)])
def test_the_budget_holds_at_the_end_and_keys_stay(score, make_optimizer):
    atoms = branches()
    model = atoms.model
    keys, before = list(model.state_dict()), count(model, torch.zeros(IMAGE)).macs
    optimizer = make_optimizer(model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", score=score, schedule=QUICK)
    cuts = train(model, optimizer, shrink, 8)
    assert cuts and set(cuts) <= {2, 4, 6}
    assert list(model.state_dict()) == keys
    assert count(model, torch.zeros(IMAGE)).macs <= 0.5 * before
    assert shrink.history[-1].costs["macs"] == count(model, torch.zeros(IMAGE)).macs
    assert not any(module._forward_pre_hooks for module in model.modules())  # let go of the model


def test_a_loop_that_ends_before_the_schedule_is_warned():
    atoms = branches()
    shrink = Shrinker(atoms, sgd(atoms.model), "macs<=0.5x", score="l2")
    with pytest.warns(UserWarning, match=r"finish\(\) after 0 steps cut \d+ % of the MACs.*step 1000.*CutSchedule"):
        assert shrink.finish()


def test_units_without_scales_get_gates_that_are_folded_away():
    atoms = attention()
    model = atoms.model
    keys = list(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shrink = Shrinker(atoms, optimizer, "macs<=0.6x", penalty=5.0, schedule=QUICK)
    x, y = batch(0, (16, 5, 6))
    for _ in range(1):
        F.cross_entropy(model(x).mean(1), y % 6).backward()
        optimizer.step()
        optimizer.zero_grad()
        shrink.step()
    gates = shrink.bank.values
    assert set(gates) == {"heads", "qk", "v", "ffn"}
    assert all((gate < 1).all() for gate in gates.values())  # the penalty pushed
    gated = model(x)
    assert list(model.state_dict()) == keys
    shrink.bank.remove()
    assert not torch.allclose(model(x), gated)
    shrink.bank.follow(shrink.groups, {g.name: np.arange(g.size) for g in shrink.groups})
    torch.testing.assert_close(model(x), gated)
    shrink.bank.fold_()
    torch.testing.assert_close(model(x), gated)
    assert shrink.finish()
    assert count(model, torch.zeros(2, 5, 6)).macs <= shrink.limits["macs"]


@pytest.mark.parametrize("make_optimizer", [sgd, lambda m: torch.optim.Adam(m.parameters(), lr=0.05)])
def test_the_penalty_keeps_its_weighting_under_any_optimiser(make_optimizer):
    """Without gradients of the loss a scale falls by exactly lr * rho * c_i."""
    atoms = branches()
    model = atoms.model
    optimizer = make_optimizer(model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", penalty=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    shrink.step()
    falls = {
        name: 1 - model.get_parameter(f"{norm}.weight") for name, norm in (("c1", "n1"), ("c2", "n3"), ("c3", "n4"))
    }
    macs = shrink.costs.marginal("macs", np.array([8.0, 12.0, 6.0]))
    mean = (macs @ np.array([8, 12, 6])) / 26
    for (_, fall), each in zip(falls.items(), macs, strict=True):
        torch.testing.assert_close(fall, torch.full_like(fall, 0.05 * 0.1 * float(each) / mean), rtol=1e-4, atol=1e-7)


def test_scales_stop_at_zero():
    atoms = branches()
    optimizer = sgd(atoms.model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", penalty=1e4, schedule=CutSchedule(kind="one_shot", end=50))
    train(atoms.model, optimizer, shrink, 1)
    assert not atoms.model.n1.weight.any()


def test_dead_units_go_on_the_fly_and_the_budget_at_the_end():
    atoms = branches()
    model = atoms.model
    optimizer = sgd(model)
    schedule = CutSchedule(kind="dead", begin=1, end=6, every=2, threshold=1e-2)
    shrink = Shrinker(atoms, optimizer, "macs<=0.4x", penalty=0.0, schedule=schedule)
    with torch.no_grad():
        model.n3.weight[[1, 5]] = 0.0
        model.n1.weight[0] = 0.0  # alive through n2
        optimizer.param_groups[0]["lr"] = 0.0
    train(model, optimizer, shrink, 1)
    assert shrink.history[0].removed == {"c2": 2}
    train(model, optimizer, shrink, 5)
    assert count(model, torch.zeros(IMAGE)).macs <= shrink.limits["macs"]


def test_without_a_budget_only_dead_units_go():
    atoms = branches()
    optimizer = sgd(atoms.model)
    shrink = Shrinker(atoms, optimizer, schedule=CutSchedule(kind="dead", begin=0, end=4, every=1), penalty=0.0)
    assert train(atoms.model, optimizer, shrink, 5) == []
    assert shrink.finish() is False


def test_gradient_accumulation_counts_optimiser_steps():
    atoms = branches()
    model, optimizer = atoms.model, None
    optimizer = sgd(model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", score="taylor", schedule=QUICK)
    for number in range(8):
        x, y = batch(number)
        F.cross_entropy(model(x), y).backward()
        if number % 2:
            optimizer.step()
            optimizer.zero_grad()
        shrink.step()  # called at every micro-batch
    assert shrink.steps == 4
    assert [event.step for event in shrink.history] == [2, 4]


def test_a_cut_between_the_parts_of_an_accumulated_step_keeps_gradients():
    atoms = branches()
    model = atoms.model
    optimizer = sgd(model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", score="l2")
    x, y = batch(0)
    F.cross_entropy(model(x), y).backward()
    before = model.c2.weight.grad.clone()
    shrink.finish()
    kept = shrink._origin
    torch.testing.assert_close(model.c2.weight.grad, before[kept["c2"]][:, kept["c1"]])


def test_autocast_and_a_gradient_scale():
    atoms = attention()
    model = atoms.model
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.0)
    twin = copy.deepcopy(atoms.model)
    other = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.0)
    one = Shrinker(atoms, optimizer, "macs<=0.5x", penalty=0.0)
    two = Shrinker(
        DeclaredAtoms(twin, atoms.example_inputs, atoms.groups, attributes=atoms.attributes),
        other,
        "macs<=0.5x",
        penalty=0.0,
    )
    x, y = batch(0, (16, 5, 6))
    for net, opt, shrink, scale in ((model, optimizer, one, 1.0), (twin, other, two, 64.0)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(net(x).float().mean(1), y % 6)
        (scale * loss).backward()
        for p in net.parameters():
            p.grad.div_(scale)
        opt.step()
        shrink.step(grad_scale=scale)
    for name, gate in one.bank.values.items():
        torch.testing.assert_close(gate, two.bank.values[name], rtol=1e-3, atol=1e-5)
        assert not torch.equal(gate, torch.ones_like(gate))


@pytest.mark.parametrize("score", SCORES)
def test_a_resumed_run_makes_the_same_steps_and_cuts(score):
    schedule = CutSchedule(kind="linear", begin=2, end=8, every=2)

    def start():
        atoms = branches()
        optimizer = torch.optim.AdamW(atoms.model.parameters(), lr=1e-2)
        gates = GateOptions(tau=0.5) if score == "figs" else None
        return (
            atoms.model,
            optimizer,
            Shrinker(atoms, optimizer, "macs<=0.4x", score=score, schedule=schedule, gates=gates),
        )

    model, optimizer, shrink = start()
    train(model, optimizer, shrink, 5)
    stream = io.BytesIO()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shrink": shrink.state_dict()}, stream
    )
    train(model, optimizer, shrink, 5, first=5)

    again, second, resumed = start()
    stream.seek(0)
    saved = torch.load(stream, weights_only=True)
    resumed.load_state_dict(saved["shrink"])
    again.load_state_dict(saved["model"])
    second.load_state_dict(saved["optimizer"])
    train(again, second, resumed, 5, first=5)
    assert resumed.history == shrink.history
    for name, value in model.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_states_of_another_network_or_budget_are_refused():
    atoms = branches()
    state = Shrinker(atoms, sgd(atoms.model), "macs<=0.5x").state_dict()
    other = DeclaredAtoms(Branches(8, 12, 7), atoms.example_inputs, atoms.groups[:2])
    with pytest.raises(
        UserError, match=r"state: got that of a network with fingerprint \w+; allowed: that of this one"
    ):
        Shrinker(other, sgd(other.model), "macs<=0.9x").load_state_dict(state)
    fresh = branches()
    with pytest.raises(UserError, match=r"state.limits"):
        Shrinker(fresh, sgd(fresh.model), "macs<=0.6x").load_state_dict(state)
    used = branches()
    optimizer = sgd(used.model)
    shrink = Shrinker(used, optimizer, "macs<=0.5x")
    train(used.model, optimizer, shrink, 1)
    with pytest.raises(UserError, match="it before any step"):
        shrink.load_state_dict(state)
    with pytest.raises(UserError, match="format version 9"):
        shrink.load_state_dict({**state, "format_version": 9})


def test_wrong_set_ups_are_refused():
    atoms = branches()
    with pytest.raises(UserError, match=r"the optimiser of this very model.*built on model.parameters\(\) of the same"):
        Shrinker(atoms, sgd(copy.deepcopy(atoms.model)), "macs<=0.5x")
    with pytest.raises(UserError, match=r"atoms: got 0 groups"):
        Shrinker(DeclaredAtoms(atoms.model, atoms.example_inputs, []), sgd(atoms.model), "macs<=0.5x")
    with pytest.raises(UserError, match=r"a torch\.optim\.Optimizer, or several"):
        Shrinker(atoms, "adam", "macs<=0.5x")
    with pytest.raises(UserError, match="when everything removable is gone"):
        Shrinker(atoms, sgd(atoms.model), "macs<=0.01x")
    with pytest.raises(UserError, match="it keeps these limits already"):
        Shrinker(atoms, sgd(atoms.model), "macs<=10M")
    with pytest.raises(UserError, match="limits on macs, params, latency"):
        Shrinker(atoms, sgd(atoms.model), "energy<=1mJ")
    with pytest.raises(UserError, match="score: got 'magnitude'"):
        Shrinker(atoms, sgd(atoms.model), "macs<=0.5x", score="magnitude")
    with pytest.raises(UserError, match="penalty: got -1"):
        Shrinker(atoms, sgd(atoms.model), "macs<=0.5x", penalty=-1)


def test_a_latency_budget_holds_by_measurement():
    atoms = branches()
    seen = []

    def clock(network):
        seen.append(count(network, torch.zeros(IMAGE)).macs)
        return seen[-1] / 1e4

    optimizer = sgd(atoms.model)
    shrink = Shrinker(atoms, optimizer, "latency<=0.6x", score="l2", measure=clock, schedule=QUICK)
    train(atoms.model, optimizer, shrink, 6)
    assert clock(atoms.model) <= 0.95 * shrink.limits["latency"]
    assert shrink.history[-1].costs["latency"] == clock(atoms.model)


def test_found_units_of_a_found_network():
    torch.manual_seed(0)
    model = awaken(Branches())
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    shrink = Shrinker(find(model, torch.zeros(IMAGE)), optimizer, "macs<=0.5x, params<=0.6x", schedule=QUICK)
    train(model, optimizer, shrink, 6)
    built = count(model, torch.zeros(IMAGE))
    assert built.macs <= shrink.limits["macs"] and built.params <= shrink.limits["params"]
    assert len(shrink.history) > 1  # found anew after the first cut


def test_compiled_models_are_compiled_again():
    atoms = branches()
    optimizer = sgd(atoms.model)
    shrink = Shrinker(atoms, optimizer, "macs<=0.5x", score="figs", schedule=CutSchedule(kind="one_shot", end=2))
    compiled = torch.compile(atoms.model, backend="eager")
    for number in range(3):
        x, y = batch(number)
        F.cross_entropy(compiled(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        if shrink.step():
            compiled = shrink.rewrap(compiled)
    x, _ = batch(9)
    compiled.eval()
    torch.testing.assert_close(compiled(x), atoms.model(x))
    assert count(atoms.model, torch.zeros(IMAGE)).macs <= shrink.limits["macs"]


def test_averages_and_tables_are_cut_along():
    atoms = branches()
    average = copy.deepcopy(atoms.model)
    table = {name: tensor.detach().clone() for name, tensor in atoms.model.named_parameters()}
    optimizer = sgd(atoms.model)
    seen = []
    shrink = Shrinker(
        atoms, optimizer, "macs<=0.5x", score="l2", averages=[average], tables=[table], on_cut=seen.append
    )
    shrink.finish()
    assert average.c2.weight.shape == table["c2.weight"].shape == atoms.model.c2.weight.shape
    assert seen == shrink.history


def test_figs_in_the_loop_closes_gates_of_what_is_charged():
    atoms = branches()
    optimizer = torch.optim.AdamW(atoms.model.parameters(), lr=1e-3)
    schedule = CutSchedule(kind="one_shot", end=1000)
    gates = GateOptions(tau=1.0)
    shrink = Shrinker(
        atoms, optimizer, "macs<=0.5x", score="figs", penalty=30.0, schedule=schedule, gate_lr=0.2, gates=gates
    )
    start = shrink.penalty()
    train(atoms.model, optimizer, shrink, 25)
    assert all(float(shrink.bank.probability(name).mean()) < 0.6 for name in ("c1", "c2", "c3"))
    assert shrink.penalty() < start


def test_a_penalty_for_logging():
    atoms = branches()
    shrink = Shrinker(atoms, sgd(atoms.model), "macs<=0.5x", penalty=0.5)
    assert shrink.penalty() == pytest.approx(0.5 * (26 + 8 * shrink.penalties.charge["c1"]), rel=1e-6)  # n1 and n2
    assert isinstance(shrink.cost()["macs"], int)
    assert shrink.scores()["c2"].tolist() == [1.0] * 12


def test_a_group_that_the_plan_refuses_is_left_whole():
    atoms = branches()

    class Reluctant(DeclaredAtoms):
        def plan(self, removed):
            from archsmith.atoms.plan import CutRefused

            if "c1" in removed:
                raise CutRefused("c1", "no reason")
            return super().plan(removed)

    stubborn = Reluctant(atoms.model, atoms.example_inputs, atoms.groups)
    shrink = Shrinker(stubborn, sgd(atoms.model), "macs<=0.8x", score="l2")
    shrink.finish()
    assert "c1" not in shrink.history[0].removed
    assert count(atoms.model, torch.zeros(IMAGE)).macs <= shrink.limits["macs"]
    with pytest.raises(UserError, match="when everything removable is gone"):
        again = branches()
        Shrinker(
            Reluctant(again.model, again.example_inputs, again.groups), sgd(again.model), "macs<=0.2x", score="l2"
        ).finish()


def test_constants_of_dead_units_are_absorbed():
    """A dead unit whose shift is positive speaks a constant; without padding it is moved exactly."""
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3), nn.Flatten(), nn.Linear(80, 10))
    model = nn.Sequential(*layers)
    awaken(model).eval()
    with torch.no_grad():
        model[1].weight[[2, 6]] = 0.0
        model[1].bias[[2, 6]] = 1.0
    x = torch.randn(IMAGE)
    before = model(x)
    schedule = CutSchedule(kind="dead", begin=0, end=10)
    shrink = Shrinker(find(model, torch.randn(IMAGE)), sgd(model), score="scale", schedule=schedule, penalty=0.0)
    assert shrink.finish()
    assert model[0].weight.shape[0] == 6
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-5)


def in_two_processes(workers):
    """Train under DDP with cuts; return the record of the cuts and the weights."""
    results = []
    for score in ("figs", "random", "taylor"):
        atoms = branches()
        optimizer = torch.optim.SGD(atoms.model.parameters(), lr=0.05, momentum=0.9)
        gates = GateOptions(tau=1.0) if score == "figs" else None
        seed = workers.rank if score == "random" else 0  # ranks that would decide differently
        shrink = Shrinker(atoms, optimizer, "macs<=0.5x", score=score, schedule=QUICK, gates=gates, seed=seed)
        model = nn.parallel.DistributedDataParallel(atoms.model)
        for number in range(7):
            x, y = batch(10 * number + workers.rank)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
            if shrink.step():
                model = shrink.rewrap(model)
        macs = count(atoms.model, torch.zeros(IMAGE)).macs
        origin = {name: units.tolist() for name, units in shrink._origin.items()}
        weights = {name: tensor.tolist() for name, tensor in atoms.model.named_parameters()}
        results.append((origin, weights, macs <= shrink.limits["macs"], len(shrink.history)))
    return results


def test_all_ranks_make_the_same_cuts_under_ddp():
    (one, error), (two, other) = outcomes(in_two_processes)
    assert error is None and other is None, (error, other)
    for (origin, weights, within, cuts), (origin2, weights2, _, _) in zip(one, two, strict=True):
        assert within and cuts >= 1
        assert origin == origin2
        assert weights == weights2


@pytest.mark.slow
@pytest.mark.parametrize("score", ["scale", "figs", "taylor"])
def test_heads_columns_and_neurons_of_a_found_network(score):
    torch.manual_seed(0)
    model = Attention()
    x = torch.randn(4, 5, 6)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    shrink = Shrinker(find(model, x), optimizer, "macs<=0.5x", score=score, schedule=QUICK)
    for number in range(6):
        inputs, targets = batch(number, (16, 5, 6))
        F.cross_entropy(model(inputs).mean(1), targets % 6).backward()
        optimizer.step()
        optimizer.zero_grad()
        shrink.step()
    assert count(model, x).macs <= shrink.limits["macs"]
    assert model(x).shape == x.shape
