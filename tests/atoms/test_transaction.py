import copy
import re

import pytest
import torch
from cut_samples import KEPT, REMOVED, Block, batches, block_groups, rows, sliced, steps
from torch import nn
from torch.optim.swa_utils import AveragedModel

from archsmith.atoms import transaction
from archsmith.atoms.edits import Edits
from archsmith.atoms.groups import tensors_of
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.record import record
from archsmith.atoms.transaction import apply_
from archsmith.atoms.units import Cut, TensorCut, UnitGroup
from archsmith.core.errors import UserError
from archsmith.train.average import MovingAverage
from archsmith.train.optim import RMSprop

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, 1e-3, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, 1e-3, amsgrad=True, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2),
    "ours": lambda p: RMSprop(p, 1e-3),
}


def trained(kind="sgd", count=5, dtype=torch.float32):
    torch.manual_seed(0)
    model = Block().to(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    steps(model, optimizer, batches(count))
    return model, optimizer


def planned(model):
    return plan_cut(block_groups(), REMOVED, model)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_training_goes_on_as_in_a_small_network_built_afresh(kind):
    model, optimizer = trained(kind, 50, torch.float64)
    small = Block(5, 4).double()
    small.load_state_dict({name: sliced(name, value) for name, value in model.state_dict().items()})
    other = OPTIMIZERS[kind](small.parameters())
    state = optimizer.state_dict()
    for number, (name, _) in enumerate(model.named_parameters()):
        values = state["state"][number]
        state["state"][number] = {k: sliced(name, v.clone()) if torch.is_tensor(v) else v for k, v in values.items()}
    other.load_state_dict(state)
    identities = [id(p) for p in model.parameters()]
    outcome = apply_(model, planned(model), optimizers=[optimizer])
    assert [id(p) for p in model.parameters()] == identities
    assert outcome.params == (sum(p.numel() for p in Block().parameters()), sum(p.numel() for p in small.parameters()))
    assert outcome.removed == {"a": 3, "b": 2}
    assert (model.depth.groups, model.depth.in_channels, model.fc.in_features, model.bn2.num_features) == (5, 5, 16, 4)
    for x, y in ((model, optimizer), (small, other)):
        steps(x, y, batches(50, seed=1))
    for (name, value), expected in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-9, msg=name)


def test_a_cut_between_the_micro_batches_of_one_step():
    (x1, y1), (x2, y2) = batches(2, seed=2)
    model, optimizer = trained("adamw")
    loss = nn.functional.cross_entropy(model(x1), y1)
    loss.backward()
    small = Block(5, 4)
    small.load_state_dict({name: sliced(name, value) for name, value in model.state_dict().items()})
    for (name, p), q in zip(model.named_parameters(), small.parameters(), strict=True):
        q.grad = sliced(name, p.grad)
    apply_(model, planned(model), optimizers=[optimizer])
    assert loss.grad_fn is not None  # still referenced, as in every loop: its graph must not be in the way
    for network in (model, small):
        nn.functional.cross_entropy(network(x2), y2).backward()
    for p, q in zip(model.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=1e-7)
    optimizer.step()


def test_a_cut_between_unscale_and_step_of_a_scaler():
    results = []
    for early in (True, False):
        model, optimizer = trained("adamw", dtype=torch.float64)
        scaler = torch.amp.GradScaler("cpu")
        x, y = batches(1, seed=3)[0]
        with torch.autocast("cpu", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x.double()), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if early:
            apply_(model, planned(model), optimizers=[optimizer])
        scaler.step(optimizer)
        scaler.update()
        if not early:
            apply_(model, planned(model), optimizers=[optimizer])
        results.append(model.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name


def test_a_cut_inside_autocast_and_hooks_of_parameters():
    model, optimizer = trained()
    x, y = batches(1)[0]
    seen = []
    model.conv2.weight.register_hook(lambda grad: seen.append(tuple(grad.shape)))
    model.conv2.weight.register_post_accumulate_grad_hook(lambda p: seen.append(tuple(p.grad.shape)))
    with torch.autocast("cpu", torch.bfloat16):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
        apply_(model, planned(model), optimizers=[optimizer])
        loss = nn.functional.cross_entropy(model(x), y)  # not with casts from before the cut
    loss.backward()
    assert seen == [(6, 8, 1, 1)] * 2 + [(4, 5, 1, 1)] * 2
    optimizer.step()


def test_averages_and_tables_are_cut_alike():
    model, _ = trained()
    twin = AveragedModel(copy.deepcopy(model), use_buffers=True)
    average = MovingAverage(model, 0.9)
    tied = average.tensors["bn1.weight"]
    average.tensors["mask"] = torch.ones(3)  # not a tensor of the model: left alone
    before = {name: value.clone() for name, value in average.tensors.items()}
    apply_(model, planned(model), averages=[twin], tables=[average.tensors])
    assert twin.module.depth.groups == 5 and average.tensors["bn1.weight"] is not tied
    for name, value in before.items():
        expected = value if name == "mask" else sliced(name, value)
        assert torch.equal(average.tensors[name], expected), name
    twin.update_parameters(model)
    average.update(model)
    assert torch.equal(twin.module.bn1.running_mean, model.bn1.running_mean)
    assert record(twin).to_json() == record(model).to_json()


def test_ties_and_memory_format_are_kept():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(7, 6, padding_idx=0)
            self.conv = nn.Conv2d(6, 6, 3).to(memory_format=torch.channels_last)
            self.head = nn.Linear(6, 7, bias=False)
            self.head.weight = self.embed.weight

    model = Tied()
    group = UnitGroup("g", 6, (rows("head.weight", 1, 6), rows("conv.weight", 0, 6), rows("conv.bias", 0, 6)))
    inputs = UnitGroup("i", 6, (rows("conv.weight", 1, 6),))
    table = model.state_dict()
    table = {name: value.clone() for name, value in table.items()}
    apply_(model, plan_cut([group, inputs], {"g": [0, 5], "i": [1]}, model), tables=[table])
    assert model.head.weight is model.embed.weight and model.head.weight.shape == (7, 4)
    assert (model.embed.embedding_dim, model.head.in_features, model.embed.padding_idx) == (4, 4, 0)
    assert model.conv.weight.shape == (4, 5, 3, 3)
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert table["head.weight"].shape == table["embed.weight"].shape == (7, 4)
    words = UnitGroup("w", 7, (rows("embed.weight", 0, 7),))
    apply_(model, plan_cut([words], {"w": [2]}, model))
    assert (model.embed.num_embeddings, model.head.out_features) == (6, 6)
    with pytest.raises(UserError, match="padding row 0 would go"):
        apply_(model, plan_cut([UnitGroup("w", 6, (rows("embed.weight", 0, 6),))], {"w": [0]}, model))


def test_sparse_gradients_follow():
    embed = nn.Embedding(7, 6, sparse=True)
    embed(torch.tensor([1, 3, 3])).sum().backward()
    before = embed.weight.grad.to_dense()
    apply_(embed, plan_cut([UnitGroup("g", 6, (rows("weight", 1, 6),))], {"g": [4]}, embed))
    assert embed.weight.grad.is_sparse and torch.equal(embed.weight.grad.to_dense(), before[:, [0, 1, 2, 3, 5]])


# --------------------------------------------------------------------- nothing at all on failure


def marks(model, optimizer, twin, table):
    """Everything that a cut may touch: identities, memory, strides, bits."""

    def of(tensor):
        return (id(tensor), tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.clone())

    def members(module):
        return {
            name: {k: v for k, v in vars(m).items() if isinstance(v, int | tuple | str)}
            for name, m in module.named_modules()
        }

    tensors = {f"{part} {n}": of(t) for part, m in (("model", model), ("twin", twin)) for n, t in tensors_of(m).items()}
    tensors |= {f"grad {n}": of(p.grad) for n, p in model.named_parameters()}
    tensors |= {f"table {n}": of(t) for n, t in table.items()}
    for number, p in enumerate(model.parameters()):
        tensors |= {f"state {number} {k}": of(v) for k, v in optimizer.state[p].items()}
    order = [[id(p) for p in group["params"]] for group in optimizer.param_groups]
    return tensors, (members(model), members(twin), list(table), order, model.config)


def test_a_failure_at_any_write_leaves_every_bit_as_it_was(monkeypatch):
    model, optimizer = trained("adamw")
    model.config = {"width": 8, "sizes": [8, 6], "shape": (8, 6)}
    twin, table = copy.deepcopy(model), MovingAverage(model, 0.9).tensors
    nn.functional.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    cut = plan_cut(
        block_groups(), REMOVED, model, {"width": 5, "config.width": 5, "config.sizes.1": 4, "config.shape": [5, 4]}
    )
    tensors, others = marks(model, optimizer, twin, table)
    others = copy.deepcopy(others)
    writes = ["set_tensor", "set_item", "set_attribute", "restore_on_undo", "on_undo"]
    originals = {name: getattr(Edits, name) for name in writes}
    count, last = 0, None

    def counted(name):
        def write(self, *args):
            nonlocal count
            count += 1
            if count == last:
                raise KeyboardInterrupt(name)
            return originals[name](self, *args)

        return write

    for name in writes:
        monkeypatch.setattr(Edits, name, counted(name))
    settings = {"optimizers": [optimizer], "averages": [twin], "tables": [table]}
    failures, last = 0, 1
    while True:
        count = 0
        try:
            apply_(model, cut, **settings)
        except KeyboardInterrupt:
            failures += 1
        else:
            break
        if last % 7 == 0 or last < 5:  # comparing everything each time would be slow
            now, rest = marks(model, optimizer, twin, table)
            assert rest == others
            assert now.keys() == tensors.keys()
            for name, (*mark, value) in tensors.items():
                assert mark == list(now[name][:-1]) and torch.equal(value, now[name][-1]), name
        last += 1
    assert failures > 80
    assert model.config == {"width": 5, "sizes": [8, 4], "shape": (5, 4)} and model.width == 5
    assert "_archsmith_record" in vars(model)


@pytest.mark.parametrize(
    "where", ["refresh_attributes", "set_attributes", "attach", "forbid_wrappers", "verify", "gap"]
)
def test_a_failure_of_any_stage_is_taken_back(where, monkeypatch):
    model, optimizer = trained("adamw")
    twin, table = copy.deepcopy(model), MovingAverage(model, 0.9).tensors
    nn.functional.cross_entropy(model(batches(1)[0][0]), batches(1)[0][1]).backward()
    model.config = {}
    tensors, others = marks(model, optimizer, twin, table)
    others = copy.deepcopy(others)

    def broken(*args):
        raise RuntimeError("power cut")

    settings = {"optimizers": [optimizer], "averages": [twin], "tables": [table], "probe": batches(1)[0][0]}
    cut = planned(model)
    if where == "verify":
        settings["verify"] = broken
    else:
        monkeypatch.setattr(transaction, {"gap": "relative_gap"}.get(where, where), broken)
    with pytest.raises(RuntimeError, match="power cut"):
        apply_(model, cut, **settings)
    now, rest = marks(model, optimizer, twin, table)
    assert rest == others
    for name, (*mark, value) in tensors.items():
        assert mark == list(now[name][:-1]) and torch.equal(value, now[name][-1]), name
    steps(model, optimizer, batches(1))


# --------------------------------------------------------------------- errors


def test_an_optimiser_on_other_parameters_is_said():
    model, optimizer = trained()
    with pytest.raises(UserError, match=r"optimizers\[0\]: got a SGD that holds none of the parameters to be cut"):
        apply_(copy.deepcopy(model), planned(model), optimizers=[optimizer])
    with pytest.raises(UserError, match=r"optimizers: got a Linear; allowed: a list of torch.optim.Optimizer"):
        apply_(model, planned(model), optimizers=[nn.Linear(1, 1)])
    part = torch.optim.SGD([model.conv1.weight], 0.1)
    other, other_optimizer = trained()
    assert apply_(other, planned(other), optimizers=[other_optimizer]).notes == ()
    notes = apply_(model, planned(model), optimizers=[part]).notes
    assert notes == ("no optimiser holds bn1.weight, bn1.bias, depth.weight, depth.bias and 5 more",)


class Shampoo(torch.optim.SGD):
    """Stands for an optimiser with a square state that could be taken for an elementwise one."""

    @torch.no_grad()
    def step(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["preconditioner"] = torch.zeros_like(p)


def test_factored_and_unknown_states_are_refused():
    model, _ = trained()
    factored = torch.optim.Adafactor(model.parameters())
    steps(model, factored, batches(1))
    before = copy.deepcopy(model.state_dict())
    text = r"Adafactor with the factored states \['col_var', 'row_var'\] of 'conv1.weight'.*build the optimiser anew"
    with pytest.raises(UserError, match=text):
        apply_(model, planned(model), optimizers=[factored])
    unknown = Shampoo(model.parameters(), 0.1)
    unknown.step()
    with pytest.raises(UserError, match=r"Shampoo with the state 'preconditioner' .*say so with elementwise="):
        apply_(model, planned(model), optimizers=[unknown])
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(UserError, match=r"got LBFGS; allowed: optimisers with a state for each parameter"):
        apply_(model, planned(model), optimizers=[lbfgs])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    apply_(model, planned(model), optimizers=[unknown], elementwise=["preconditioner"])
    assert unknown.state[model.conv2.weight]["preconditioner"].shape == (4, 5, 1, 1)


def test_wrong_cuts_tables_and_attributes_are_said():
    model, _ = trained()
    cut = planned(model)
    with pytest.raises(UserError, match=r"model: got a network with fingerprint \w+; .*Plan the cut anew"):
        apply_(Block(9), cut)
    with pytest.raises(UserError, match="averages: got a network with fingerprint"):
        apply_(model, cut, averages=[Block(9)])
    with pytest.raises(
        UserError, match=r"tables: got shape .3,. for 'bn1.bias'; allowed: the shape of the parameter, "
    ):
        apply_(model, cut, tables=[{"bn1.bias": torch.ones(3)}])
    for path, text in {
        "config.width": "got no 'config' in Block",
        "bn1.nothing": "got no 'nothing' in BatchNorm2d",
        "__class__.x": "got no 'x' in type",
    }.items():
        with pytest.raises(UserError, match=re.escape(f"attributes['{path}']: {text}")):
            apply_(model, cut, attributes={path: 3})
    with pytest.raises(UserError, match="got a network without 'x'"):
        apply_(model, Cut({}, {"x": TensorCut({0: cut.tensors["bn1.bias"].axes[0]})}))
    with pytest.raises(UserError, match=r"cut.tensors\['bn1.bias'\]: got 0 kept positions up to -1 on axis 0"):
        apply_(model, Cut({}, {"bn1.bias": TensorCut({0: cut.tensors["bn1.bias"].axes[0][:0]})}))
    with pytest.raises(UserError, match="a network with fingerprint"):
        apply_(model, cut)
        apply_(model, cut)
    assert [model.conv1.out_channels, model.conv2.out_channels] == [len(KEPT["a"]), len(KEPT["b"])]


def test_tensors_that_are_not_plain_are_said():
    from torch.testing._internal.two_tensor import TwoTensor

    model = nn.Linear(4, 4)
    cut = plan_cut([UnitGroup("g", 4, (rows("weight", 0, 4), rows("bias", 0, 4)))], {"g": [0]}, model)
    model.weight = nn.Parameter(TwoTensor(torch.ones(4, 4), torch.ones(4, 4)))
    with pytest.raises(
        UserError, match=r"got 'weight' as a TwoTensor; allowed: plain tensors. Cut before parameters are"
    ):
        apply_(model, cut)


def test_an_attribute_that_can_not_be_set_rolls_back():
    class Strict(Block):
        @property
        def half(self):
            return self.width // 2

    model = Strict()
    with pytest.raises(UserError, match=r"attributes\['half'\]: got 3; allowed: attributes that can be set; this one"):
        apply_(model, plan_cut(block_groups(), REMOVED, model), attributes={"width": 5, "half": 3})
    assert model.width == 8 and model.conv1.weight.shape[0] == 8 and model.depth.groups == 8


# --------------------------------------------------------------------- under wrappers


def test_a_compiled_model_compiles_again():
    model, optimizer = trained()
    compiled = torch.compile(model, backend="eager")
    x = batches(1)[0][0]
    compiled(x)
    outcome = apply_(compiled, planned(compiled), optimizers=[optimizer], probe=x)
    assert outcome.gap is not None and outcome.gap > 1e-3  # living units went
    model.eval()
    assert torch.equal(compiled(x), model(x))
    model.train()
    twin = copy.deepcopy(model)
    nn.functional.cross_entropy(compiled(x), batches(1)[0][1]).backward()
    nn.functional.cross_entropy(twin(x), batches(1)[0][1]).backward()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
