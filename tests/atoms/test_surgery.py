import copy

import numpy as np
import pytest
import torch
from mobile_samples import (
    built,
    closed_form_block,
    everything,
    fact,
    images,
    random_family,
    random_keep,
    silence_,
    small_family,
    without,
)
from references.cut_tensors import cut_by_name, cut_table
from torch import nn

from archsmith.atoms import surgery
from archsmith.atoms.groups import AtomBlock, AtomGroup, Atoms, Slot, tensors_of
from archsmith.atoms.penalty import ScalePenalty, penalty_weights
from archsmith.atoms.surgery import absorb_constants, cut_
from archsmith.families.mobile import BlockPlan, MobileFamily, collapse_
from archsmith.layers.mobile import ChannelShift
from archsmith.train.average import MovingAverage
from archsmith.train.layout import use_memory_format_
from archsmith.train.optim import RMSprop, decay_groups
from archsmith.train.state import load_optimizer_tensors, optimizer_tensors

DEAD = {"b1k3": [0, 3], "b1k5": ..., "b2k3": ..., "b2k5": ..., "b2k7": ..., "b3k5": [1], "b4k3": [0, 1, 2]}
"""Single units, a whole branch (blocks.1 k5) and a whole block (blocks.2) at once."""

# --------------------------------------------------------------------- the published block, exact zeros


@pytest.fixture
def published():
    """The closed-form block inside a network, its dead atoms silenced, and the mask of the living."""
    given, expected = fact("surgery_zero_gamma")
    block, x = closed_form_block({"cin": 8, "cout": 8, "stride": 1, "atoms": [4, 3, 2], "kernels": [3, 5, 7], "H": 10})
    plan = (BlockPlan(8, 1, ((3, 4), (5, 3), (7, 2)), True, True),)
    family = MobileFamily(image=(3, 10, 10), num_classes=2, stem_channels=8, stem_stride=1, plan=plan, last_channels=4)
    network = family.build(family.largest()).double()
    network.blocks[0] = block
    atoms = family.atoms(network)
    dead = dict(zip(["b0k3", "b0k5", "b0k7"], given["zeroed_depthwise_gamma"], strict=True))
    keep = without(atoms, **dead)
    silence_(network, atoms, keep)
    return network, atoms, keep, x, expected


def first5(network, x, training):
    with torch.no_grad():
        return copy.deepcopy(network.blocks[0]).train(training)(x).flatten()[:5].tolist()


def test_cutting_silent_atoms_gives_the_published_numbers(published):
    network, atoms, keep, x, expected = published
    before = network.blocks[0].norm.running_mean.clone()
    assert first5(network, x, False) == pytest.approx(expected["eval_masked"], abs=1e-9)
    assert first5(network, x, True) == pytest.approx(expected["train_masked"], abs=1e-9)
    plain = copy.deepcopy(network)
    cut_(plain, atoms, keep, collapse=collapse_, absorb=False)
    assert first5(plain, x, False) == pytest.approx(expected["eval_pruned_without_correction"], abs=1e-9)
    assert torch.equal(plain.blocks[0].norm.running_mean, before)
    cut_(network, atoms, keep, collapse=collapse_)
    assert first5(network, x, False) == pytest.approx(expected["eval_pruned_with_correction"], abs=1e-9)
    assert first5(network, x, True) == pytest.approx(expected["train_pruned"], abs=1e-9)
    correction = (before - network.blocks[0].norm.running_mean).tolist()
    assert correction == pytest.approx(expected["correction_to_subtract_from_output_bn_running_mean"], abs=1e-9)
    assert network.blocks[0].atoms() == tuple(zip(expected["kernels"], expected["channels"], strict=True))


def test_training_goes_on_as_if_nothing_had_been_cut(published):
    network, atoms, keep, x, _ = published
    whole = copy.deepcopy(network)
    cut_(network, atoms, keep, collapse=collapse_)
    outputs, gradients = [], []
    for model in (whole, network):
        y = model.blocks[0].train()(x)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum().backward()
        outputs.append(y)
        gradients.append({name: p.grad for name, p in model.blocks[0].named_parameters()})
    torch.testing.assert_close(outputs[0], outputs[1], rtol=0, atol=1e-10)
    assert len(gradients[1]) < len(gradients[0])
    for name, gradient in gradients[1].items():
        wanted = cut_by_name(f"blocks.0.{name}", gradients[0][name], keep)
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-10, msg=name)


def test_without_absorption_the_output_moves_by_a_constant(published):
    network, atoms, keep, x, _ = published
    whole = network.blocks[0].eval()(x)
    cut_(network, atoms, keep, collapse=collapse_, absorb=False)
    gap = network.blocks[0].eval()(x) - whole
    assert gap.abs().max() > 0.1
    torch.testing.assert_close(gap, gap[:1, :, :1, :1].expand_as(gap), rtol=0, atol=1e-12)


def test_absorption_restores_the_evaluation_output(published):
    network, atoms, keep, x, _ = published
    whole = network.blocks[0].eval()(x)
    cut_(network, atoms, keep, collapse=collapse_)
    torch.testing.assert_close(network.blocks[0].eval()(x), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_nearly_silent_atoms_leave_no_more_than_the_bound(published, seed):
    network, atoms, keep, x, _ = published
    block = network.blocks[0].eval()
    generator = torch.Generator().manual_seed(seed)
    named = tensors_of(network)
    largest = {}  # max |z_i|, z: normalised input of the scale
    for group in atoms:
        branch = network.get_submodule(group.name)
        scale = named[group.scale].data
        drawn = (torch.rand(scale.shape, generator=generator, dtype=scale.dtype) * 2 - 1) * 1e-3
        scale.copy_(torch.where(keep[group.name], scale, drawn))
        y = branch.depthwise(branch.expand(x))
        mean, var = branch.norm.running_mean[:, None, None], branch.norm.running_var[:, None, None]
        largest[group.name] = ((y - mean) / (var + 1e-3).sqrt()).abs().amax((0, 2, 3))
    bound = torch.zeros(8, dtype=torch.float64)
    for group in atoms:
        dead, branch = ~keep[group.name], network.get_submodule(group.name)
        weights = branch.project.weight[:, dead, 0, 0].abs()
        bound += weights @ (branch.norm.weight[dead].abs() * largest[group.name][dead])
    bound = bound.detach() * (block.norm.weight.abs() / (block.norm.running_var + 1e-3).sqrt()).detach()
    whole = block(x)
    plain = copy.deepcopy(network)
    cut_(plain, atoms, keep, collapse=collapse_, absorb=False)
    cut_(network, atoms, keep, collapse=collapse_)
    gap = (network.blocks[0](x) - whole).abs().amax((0, 2, 3))
    assert (gap <= bound + 1e-12).all()
    assert gap.max() > 0
    assert ((plain.blocks[0](x) - whole).abs().amax((0, 2, 3)) > bound).any()


# --------------------------------------------------------------------- whole networks


@pytest.mark.parametrize("seed", range(12))
def test_cutting_silent_atoms_keeps_the_output_of_any_network(seed):
    """Dead branches and dead blocks included; also through averaged weights, with values of their own."""
    rng = np.random.default_rng(seed)
    family = random_family(rng) if seed else small_family()
    network, shadow = built(family, 1, torch.float64), built(family, 2, torch.float64)
    atoms = family.atoms(network)
    keep = random_keep(atoms, rng, share=0.4) if seed else without(atoms, **DEAD)
    for model in (network, shadow):
        silence_(model, atoms, keep)
        if family.squeeze_ratio:  # behind a gate only a unit that is silent altogether leaves nothing
            for group in atoms:
                model.get_submodule(group.name).norm.bias.data[~keep[group.name]] = 0
    x = images(family, 3, dtype=torch.float64)
    before = [model.eval()(x) for model in (network, shadow)]
    average = MovingAverage(shadow, 0.9)
    report = cut_(network, atoms, keep, collapse=collapse_, tables=[average.tensors])
    torch.testing.assert_close(network(x), before[0], rtol=0, atol=1e-9)
    averaged = average.averaged_copy(network)
    torch.testing.assert_close(averaged.eval()(x), before[1], rtol=0, atol=1e-9)
    assert family.architecture_of(network) == family.kept(atoms, keep)
    assert sum(report.removed.values()) == len(atoms) - len(family.atoms(network))
    left = family.atoms(network)
    for name in ("macs", "params"):
        assert report.removed_cost.get(name, 0) == atoms.cost(name) - left.cost(name)


def test_every_tensor_is_what_it_is_on_paper():
    family = small_family()
    network = built(family)
    atoms = family.atoms(network)
    keep = without(atoms, **DEAD)
    masks = {name: tensor.clone() for name, tensor in tensors_of(network).items() if name.endswith("conv.weight")}
    expected = cut_table(tensors_of(network), keep)
    expected_masks = {name: cut_by_name(name, tensor, keep) for name, tensor in masks.items()}
    report = cut_(network, atoms, keep, collapse=collapse_, tables=[masks])
    assert set(tensors_of(network)) == set(expected)
    for name, tensor in tensors_of(network).items():
        torch.testing.assert_close(tensor.detach(), expected[name], rtol=0, atol=1e-5, msg=name)
    assert set(masks) == {name for name, tensor in expected_masks.items() if tensor is not None}
    assert all(torch.equal(tensor, expected_masks[name]) for name, tensor in masks.items())
    assert report.removed["blocks.1.branches.k3"] == 2
    assert report.dead_blocks == ("blocks.2",)
    assert set(report.dead_groups) == {"blocks.1.branches.k5", *(f"blocks.2.branches.k{k}" for k in (3, 5, 7))}


def test_a_squeezed_network_is_cut_across_its_branches():
    family = small_family(squeeze_ratio=0.5)
    network = built(family)
    atoms = family.atoms(network)
    keep = without(atoms, b1k3=[0, 3], b1k5=..., b1k7=[1])
    expected = {name: cut_by_name(name, tensor, keep) for name, tensor in tensors_of(network).items()}
    cut_(network, atoms, keep, collapse=collapse_)
    for name, tensor in tensors_of(network).items():
        assert torch.equal(tensor, expected[name]), name
    assert network.blocks[1].squeeze.reduce.in_channels == network.blocks[1].squeeze.expand.out_channels == 8 + 7 - 2


def test_a_dead_block_becomes_its_constant_and_stays_trainable():
    family = small_family()
    network = built(family)
    atoms = family.atoms(network)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9)
    bias = network.blocks[2].norm.bias
    cut_(network, atoms, without(atoms, b2k3=..., b2k5=..., b2k7=...), collapse=collapse_, optimizer=optimizer)
    assert isinstance(network.blocks[2].norm, ChannelShift)
    assert network.blocks[2].norm.bias is bias
    assert any(p is bias for p in optimizer.param_groups[0]["params"])
    before = bias.detach().clone()
    network.eval()(images(family)).square().sum().backward()  # batch statistics of the next block would remove it
    optimizer.step()
    assert not torch.equal(bias, before)
    assert not family.atoms(network).blocks[1].groups


def test_the_network_says_its_new_sizes():
    family = small_family()
    network = built(family)
    atoms = family.atoms(network)
    cut_(network, atoms, without(atoms, b1k3=range(7), b1k7=[0], b4k5=...), collapse=collapse_)
    one = network.blocks[1].branches["k3"]
    assert (one.depthwise.groups, one.depthwise.in_channels, one.depthwise.out_channels) == (1, 1, 1)
    assert (one.expand.conv.in_channels, one.expand.conv.out_channels, one.expand.norm.num_features) == (4, 1, 1)
    assert (one.project.in_channels, one.project.out_channels, one.norm.num_features) == (1, 6, 1)
    assert [c.groups for c in (network.blocks[1].branches[k].depthwise for k in ("k5", "k7"))] == [8, 7]
    assert list(network.blocks[4].branches) == ["k3"]
    fresh = family.build(family.architecture_of(network))
    assert str(fresh) == str(network)


# --------------------------------------------------------------------- optimisers

OPTIMIZERS = {
    "rmsprop": lambda groups: RMSprop(groups, 0.02),
    "sgd": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9),
    "nesterov": lambda groups: torch.optim.SGD(groups, 0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: torch.optim.Adam(groups, 0.01),
    "adamw": lambda groups: torch.optim.AdamW(groups, 0.01, amsgrad=True),
}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class Training:
    """A network, its optimiser, its average and its penalty, trained on made-up batches numbered by step."""

    def __init__(self, family, network, make_optimizer, memory_format):
        use_memory_format_(network, memory_format)
        self.family, self.network, self.format = family, network, memory_format
        self.optimizer = make_optimizer(decay_groups(network, 1e-2))
        self.average = MovingAverage(network, 0.9)
        self.weights = penalty_weights(family.atoms(family.build(family.largest())))
        self.follow()

    def follow(self):
        self.atoms = self.family.atoms(self.network)
        named = tensors_of(self.network)
        self.penalty = ScalePenalty(self.weights, {g.name: named[g.scale] for g in self.atoms})

    def steps(self, first, last):
        self.network.train()
        for step in range(first, last):
            x = images(self.family, 6, seed=step).contiguous(memory_format=self.format)
            targets = torch.arange(6) % self.family.num_classes
            self.optimizer.zero_grad()
            nn.functional.cross_entropy(self.network(x), targets).backward()
            self.penalty.add_gradient_(1e-3)
            self.optimizer.step()
            self.average.update(self.network)
        return self

    def cut(self, keep):
        report = cut_(
            self.network, self.atoms, keep, collapse=collapse_, optimizer=self.optimizer, tables=[self.average.tensors]
        )
        self.follow()
        return report

    def tensors(self):
        """Everything that training depends on, by name."""
        tensors = dict(tensors_of(self.network))
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.tensors.items()}
        return tensors | optimizer_tensors(self.optimizer, self.network)


def trained(name, memory_format="contiguous", steps=3):
    family = small_family(dropout=0.0)
    network = family.build(family.largest(), seed=4)
    return Training(family, network, OPTIMIZERS[name], FORMATS[memory_format]).steps(0, steps)


def small_twin(run, name, keep, *, state=True):
    """Return a freshly built small network with weights, state and averages cut on paper."""
    kept = {f: v for f, v in run.tensors().items() if f.startswith("optimizer.")}
    network = run.family.build(run.family.kept(run.atoms, keep))
    with torch.no_grad():
        for key, value in cut_table(tensors_of(run.network), keep).items():
            tensors_of(network)[key].copy_(value)
    twin = Training(run.family, network, OPTIMIZERS[name], run.format)
    for key, value in cut_table(run.average.tensors, keep).items():
        twin.average.tensors[key].copy_(value)
    twin.average.steps = run.average.steps
    if state:
        parameters = dict(network.named_parameters())
        for key, value in kept.items():
            parameter, leaf = key.removeprefix("optimizer.").split("::")
            cut = cut_by_name(parameter, value, keep)
            if cut is not None:
                target = torch.empty_like(parameters[parameter]) if cut.dim() else torch.empty(())
                twin.optimizer.state[parameters[parameter]][leaf] = target.copy_(cut).detach()
    return twin


def largest_gap(one, two):
    assert set(one) == set(two)
    return max((one[name].detach() - two[name].detach()).abs().max().item() for name in one)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_continues_as_in_a_small_network_with_the_same_state(name, memory_format):
    run = trained(name, memory_format)
    keep = without(run.atoms, **DEAD)
    twin, forgetful = small_twin(run, name, keep), small_twin(run, name, keep, state=False)
    run.cut(keep)
    assert largest_gap(run.tensors(), twin.tensors()) < 1e-6
    rounded = {name for name, t in run.tensors().items() if not torch.equal(t, twin.tensors()[name])}
    assert all(name.endswith((".norm.running_mean", "blocks.2.norm.bias")) for name in rounded)  # where constants go
    for name in rounded:  # else the rounding would grow with every step
        twin.tensors()[name].data.copy_(run.tensors()[name])
    run.steps(3, 7)
    twin.steps(3, 7)
    forgetful.steps(3, 7)
    assert largest_gap(run.tensors(), twin.tensors()) == 0
    assert largest_gap(tensors_of(run.network), tensors_of(forgetful.network)) > 1e-3


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_checkpoint_right_after_the_cut_changes_no_bit(name, memory_format, tmp_path):
    from safetensors.torch import load_file, save_file

    run = trained(name, memory_format)
    run.cut(without(run.atoms, **DEAD))
    save_file({key: value.detach().contiguous() for key, value in run.tensors().items()}, tmp_path / "c.safetensors")
    saved = load_file(tmp_path / "c.safetensors")
    network = run.family.build(run.family.architecture_of(run.network))
    loaded = Training(run.family, network, OPTIMIZERS[name], run.format)
    with torch.no_grad():
        for key, value in tensors_of(network).items():
            value.copy_(saved[key])
    for key, value in loaded.average.tensors.items():
        value.copy_(saved[f"average.{key}"])
    loaded.average.steps = run.average.steps
    load_optimizer_tensors(loaded.optimizer, network, saved)
    run.steps(3, 7)
    loaded.steps(3, 7)
    for key, value in run.tensors().items():
        assert torch.equal(value, loaded.tensors()[key]), key


@pytest.mark.parametrize("memory_format", FORMATS)
def test_strides_are_those_of_a_network_that_was_built(memory_format):
    run = trained("rmsprop", memory_format)
    run.cut(without(run.atoms, **(DEAD | {"b1k3": range(1, 8)})))  # down to one atom, where formats look alike
    fresh = run.family.build(run.family.architecture_of(run.network))
    use_memory_format_(fresh, run.format)
    twin = Training(run.family, fresh, OPTIMIZERS["rmsprop"], run.format).steps(0, 1)
    expected = {name: tensor.stride() for name, tensor in twin.tensors().items()}
    assert {name: tensor.stride() for name, tensor in run.tensors().items()} == expected


def test_parameters_keep_identity_order_and_groups():
    run = trained("adamw")
    before = {name: id(p) for name, p in run.network.named_parameters()}
    order = [[id(p) for p in group["params"]] for group in run.optimizer.param_groups]
    steps = {name: t.item() for name, t in run.tensors().items() if name.endswith("::step")}
    run.cut(without(run.atoms, **DEAD))
    after = {name: id(p) for name, p in run.network.named_parameters()}
    assert all(before[name] == identity for name, identity in after.items())
    assert len(after) < len(before)
    living = set(after.values())
    assert [[id(p) for p in group["params"]] for group in run.optimizer.param_groups] == [
        [identity for identity in group if identity in living] for group in order
    ]
    assert {id(p) for p in run.optimizer.state} == living
    for parameter, state in run.optimizer.state.items():
        assert all(value.shape == parameter.shape for value in state.values() if value.dim())
        assert parameter.grad.shape == parameter.shape
    assert set(run.average.tensors) == {n for n, t in tensors_of(run.network).items() if t.is_floating_point()}
    assert all(steps[name] == t.item() for name, t in run.tensors().items() if name.endswith("::step"))
    assert [id(p) for p in run.network.parameters()] == [i for i in before.values() if i in living]


def test_nothing_dead_changes_nothing():
    run = trained("rmsprop")
    before = {name: (id(t), t.clone()) for name, t in run.tensors().items()}
    report = run.cut(everything(run.atoms))
    assert not report.removed and not report.dead_groups and report.removed_cost == {"macs": 0, "params": 0}
    assert all(id(t) == before[n][0] and torch.equal(t, before[n][1]) for n, t in run.tensors().items())


def test_a_second_cut_equals_one_cut_of_both():
    once, twice = trained("sgd"), trained("sgd")
    once.cut(without(once.atoms, b1k3=[0, 3, 5], b3k5=[1, 2]))
    twice.cut(without(twice.atoms, b1k3=[3], b3k5=[2]))
    twice.cut(without(twice.atoms, b1k3=[0, 4], b3k5=[1]))  # unit 5 has moved up to 4
    assert largest_gap(once.tensors(), twice.tensors()) < 1e-6


# --------------------------------------------------------------------- all or nothing


def snapshot(run):
    """Everything a cut may touch, by value and by identity."""
    named = tensors_of(run.network)
    return {
        "tensors": {n: (id(t), t.data_ptr(), t.stride(), t.detach().clone()) for n, t in run.tensors().items()},
        "grads": {n: (id(p.grad), p.grad.clone()) for n, p in named.items() if p.grad is not None},
        "modules": [(n, id(m), m.training, m.extra_repr()) for n, m in run.network.named_modules()],
        "attributes": {
            n: {k: v for k, v in vars(m).items() if isinstance(v, int | float | str | tuple)}
            for n, m in run.network.named_modules()
        },
        "groups": [
            {k: [id(p) for p in v] if k == "params" else v for k, v in g.items()} for g in run.optimizer.param_groups
        ],
        "state": {id(p): {k: id(v) for k, v in s.items()} for p, s in run.optimizer.state.items()},
        "table": list(run.average.tensors),
        "order": list(named),
    }


def assert_same(before, after):
    for part in ("tensors", "grads"):
        assert before[part].keys() == after[part].keys()
        for name, (*marks, value) in before[part].items():
            assert marks == list(after[part][name][:-1]), name
            assert torch.equal(value, after[part][name][-1]), name
    assert {k: v for k, v in before.items() if k not in ("tensors", "grads")} == {
        k: v for k, v in after.items() if k not in ("tensors", "grads")
    }


LATE = ["_replace_model_tensors", "_replace_state", "_delete_module", "_drop_parameters", "_replace_table"]


@pytest.mark.parametrize("where", ["collapse before", "collapse after", *LATE, "_refresh_attributes"])
def test_a_failure_on_the_way_leaves_everything_as_it_was(where, monkeypatch):
    run = trained("adam", "channels_last")
    keep = without(run.atoms, **DEAD)
    logits = copy.deepcopy(run.network).eval()(images(run.family))
    before = snapshot(run)

    def failing(function):
        def wrapped(*args):
            if where != "collapse before":
                function(*args)
            raise RuntimeError("power cut")

        return wrapped

    collapse = failing(collapse_) if where.startswith("collapse") else collapse_
    if not where.startswith("collapse"):
        monkeypatch.setattr(surgery, where, failing(getattr(surgery, where)))
    with pytest.raises(RuntimeError, match="power cut"):
        cut_(run.network, run.atoms, keep, collapse=collapse, optimizer=run.optimizer, tables=[run.average.tensors])
    assert_same(before, snapshot(run))
    assert torch.equal(copy.deepcopy(run.network).eval()(images(run.family)), logits)
    monkeypatch.undo()
    untouched = trained("adam", "channels_last")
    untouched.cut(keep)
    run.cut(keep)  # and the same cut succeeds afterwards
    assert largest_gap(run.steps(3, 5).tensors(), untouched.steps(3, 5).tensors()) == 0


K3 = "blocks.1.branches.k3"


def spoil_missing(run, keep):
    del keep[K3]
    return rf"keep\['{K3}'\] must be a boolean tensor.*got None"


def spoil_float(run, keep):
    keep[K3] = torch.ones(8)
    return r"must be a boolean tensor of shape \(8,\), got \(\(8,\), torch.float32\)"


def spoil_size(run, keep):
    keep[K3] = torch.ones(7, dtype=torch.bool)
    return r"must be a boolean tensor of shape \(8,\), got \(\(7,\)"


def spoil_minimum(run, keep):
    for kernel in (3, 5):
        keep[f"blocks.3.branches.k{kernel}"][:] = False
    return "block 'blocks.3' would keep 0 atoms, it needs at least 1.*use archsmith.atoms.score.protect"


def spoil_factored(run, keep):
    run.optimizer.state[tensors_of(run.network)[f"{K3}.norm.weight"]]["row"] = torch.ones(3)
    return rf"optimiser state 'row' of '{K3}.norm.weight' has shape \(3,\).*factored states cannot be sliced"


@pytest.mark.parametrize("spoil", [spoil_missing, spoil_float, spoil_size, spoil_minimum, spoil_factored])
def test_impossible_cuts_are_refused_before_anything_changes(spoil):
    run = trained("sgd")
    keep = without(run.atoms, b1k3=[0, 3], b1k5=...)
    message = spoil(run, keep)
    before = snapshot(run)
    with pytest.raises(ValueError, match=message):
        cut_(run.network, run.atoms, keep, collapse=collapse_, optimizer=run.optimizer, tables=[run.average.tensors])
    assert_same(before, snapshot(run))


def test_a_description_of_another_network_is_refused():
    run = trained("sgd")
    old = run.atoms
    run.cut(without(run.atoms, b1k3=[0, 3]))
    before = snapshot(run)
    with pytest.raises(ValueError, match=r"group 'blocks.1.branches.k3' has 8 units of 1 rows, but axis 0 .* length 6"):
        cut_(run.network, old, without(old, b1k3=[1]), collapse=collapse_)
    assert_same(before, snapshot(run))


# --------------------------------------------------------------------- any model


class Gated(nn.Module):
    """Heads of three rows each, a gate for each head, a tied decoder, and a grouped convolution that nobody cuts."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(5, 12)
        self.gate = nn.Parameter(torch.randn(4))
        self.out = nn.Linear(12, 5)
        self.out.weight = nn.Parameter(torch.randn(5, 12))
        self.twin = nn.Linear(12, 5, bias=False)
        self.twin.weight = self.out.weight
        self.grouped = nn.Conv2d(2, 6, 1, groups=2)

    def forward(self, x):
        heads = self.into(x).unflatten(-1, (-1, 3)) * self.gate[:, None]
        return self.out(heads.flatten(-2)) + self.twin(heads.flatten(-2))


def test_units_of_several_rows_and_tied_tensors_are_cut():
    torch.manual_seed(0)
    model = Gated().double()
    slots = (Slot("into.weight", 0, 3), Slot("into.bias", 0, 3), Slot("gate", 0), Slot("out.weight", 1, 3))
    group = AtomGroup("heads", "block", 4, "gate", slots, {"macs": 6, "params": 1})
    atoms = Atoms((group,), (AtomBlock("block", ("heads",), 1, "norm", 1e-3),))
    keep = {"heads": torch.tensor([True, False, True, False])}
    model.gate.data[~keep["heads"]] = 0
    x = torch.randn(2, 5, dtype=torch.float64)
    before = model(x)
    grouped = (model.grouped.groups, model.grouped.out_channels)
    cut_(model, atoms, keep, collapse=collapse_)
    torch.testing.assert_close(model(x), before, rtol=0, atol=1e-12)
    assert model.out.weight is model.twin.weight
    assert (model.into.out_features, model.out.in_features, model.twin.in_features) == (6, 6, 6)
    assert (model.grouped.groups, model.grouped.out_channels) == grouped


def test_constants_are_only_looked_up_where_something_died():
    family = small_family()
    network = built(family)
    atoms = family.atoms(network)
    assert absorb_constants(atoms, everything(atoms), tensors_of(network)) == {}
    changed = absorb_constants(atoms, without(atoms, b1k3=[0], b1k5=[1]), tensors_of(network))
    assert list(changed) == ["blocks.1.norm.running_mean"]
    assert absorb_constants(atoms, without(atoms, b1k3=[0]), {}) == {}
