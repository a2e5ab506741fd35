"""Elastic networks from atoms: the contract over real architectures, what is offered, and what is refused."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import archsmith.atoms
from archsmith.core.errors import UserError
from archsmith.supernet import Supernet
from archsmith.supernet.elastic import Elastic
from tests import atoms_nets, transformers_nets
from tests.elastic_samples import Mlp, SmallMobile, SmallResNet, architectures, gap, keeps_the_contract, loss, outputs

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(5))


def mlp() -> tuple[nn.Module, Any, None]:
    return Mlp(), torch.randn(5, 6), None


def resnet() -> tuple[nn.Module, Any, None]:
    return SmallResNet(), IMAGES, None


def mobile() -> tuple[nn.Module, Any, None]:
    return SmallMobile(), IMAGES, None


def of_transformers(name: str) -> Callable[[], tuple[nn.Module, Any, Any]]:
    return lambda: (*transformers_nets.TRANSFORMERS[name](), transformers_nets.logits)


def of_atoms(name: str) -> Callable[[], tuple[nn.Module, Any, None]]:
    return lambda: (*atoms_nets.NETS[name](), None)


NETS: dict[str, Callable[[], tuple[nn.Module, Any, Any]]] = {
    "mlp": mlp,
    "resnet": resnet,
    "mobile": mobile,
    "BERT": of_transformers("BERT"),
    "ViT": of_transformers("ViT"),
    "Llama": of_transformers("Llama"),
    "fused qkv": of_atoms("fused qkv"),
    "dense block": of_atoms("dense block"),
    "grouped": of_atoms("grouped"),
    "shufflenet": of_atoms("shufflenet"),
    "lstm": of_atoms("lstm"),
}
MORE = (
    "ResNet",
    "MobileNetV2",
    "EfficientNet",
    "ConvNeXt",
    "Swin",
    "SegFormer",
    "DistilBERT",
    "GPT-2",
    "T5",
    "Whisper",
)


@functools.cache
def built(name: str) -> tuple[Elastic, Any, Any]:
    return made(name)


def build(name: str, dims: Any = None, **options: Any) -> tuple[Elastic, Any, Any]:
    """Return an elastic network; what is offered by default is made once and copied."""
    if dims is not None or options:
        return made(name, dims, **options)
    elastic, inputs, forward = built(name)
    return copy.deepcopy(elastic), inputs, forward


def made(name: str, dims: Any = None, **options: Any) -> tuple[Elastic, Any, Any]:
    torch.manual_seed(0)
    model, inputs, forward = NETS[name]() if name in NETS else of_transformers(name)()
    atoms_nets.randomised(model)
    return Elastic(model, inputs, dims, forward=forward, **options), inputs, forward


SLOW = pytest.mark.slow
QUICK = [
    pytest.param(name, marks=SLOW if name in ("ViT", "lstm", "dense block", "shufflenet") else ()) for name in NETS
]


@pytest.mark.parametrize("name", QUICK)
def test_the_active_path_is_the_extracted_network(name: str) -> None:
    elastic, inputs, forward = build(name)
    assert isinstance(elastic, Supernet)
    keeps_the_contract(elastic, inputs, forward, number=3)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_the_active_path_is_the_extracted_network_of_more_makes(name: str) -> None:
    elastic, inputs, forward = build(name)
    keeps_the_contract(elastic, inputs, forward)


@pytest.mark.parametrize("transform", [False, True])
def test_kernels_shrink_to_their_centre_and_through_learned_matrices(transform: bool) -> None:
    dims = {"blocks.*.kernel": [1, 3, 5], "width": [0.5, 1.0]}
    elastic, inputs, _ = build("mobile", dims, kernel_transform=transform)
    if transform:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for matrix in elastic.elastic_transforms.parameters():
                matrix.add_(0.1 * torch.randn(matrix.shape, generator=generator))
    keeps_the_contract(elastic, inputs)
    kernel = "blocks.1.depthwise.kernel"
    alone = elastic.extract({**elastic.largest(), kernel: 3})
    own, whole = alone.blocks[1].depthwise, elastic.model.blocks[1].depthwise  # type: ignore[union-attr]
    assert own.weight.shape[2:] == (3, 3) and own.kernel_size == (3, 3) and own.padding == (1, 1)
    cropped = torch.equal(own.weight, whole.weight[:, :, 1:4, 1:4])
    assert cropped != transform
    if transform:  # a 1 x 1 kernel passes both matrices: its gradient reaches them
        elastic.activate({**elastic.largest(), kernel: 1})
        loss(elastic(inputs)).backward()
        grads = [p.grad for p in elastic.elastic_transforms["1"].parameters()]
        assert all(g is not None and bool((g != 0).any()) for g in grads)


def test_a_resolution_resizes_the_images() -> None:
    elastic, inputs, _ = build("resnet", {"resolution": [8, 12, 16], "width": [0.5, 1.0]})
    keeps_the_contract(elastic, inputs)
    costs = [elastic.costs({**elastic.largest(), "resolution": side})["macs"] for side in (8, 16)]
    assert 3.5 < costs[1] / costs[0] < 4.5


def test_depth_removes_blocks_and_says_so_in_the_configuration() -> None:
    elastic, inputs, forward = build("BERT")
    depth = "bert.encoder.layer.depth"
    short = {**elastic.smallest()}
    assert set(short) == {depth, *(name for name in short if name.startswith("bert.encoder.layer.0."))}
    alone = elastic.extract(short)
    assert len(alone.bert.encoder.layer) == 1 and alone.config.num_hidden_layers == 1  # type: ignore[union-attr]
    assert elastic.model.config.num_hidden_layers == 2  # type: ignore[union-attr]
    assert not [name for name in alone.state_dict() if "encoder.layer.1" in name]
    again = type(alone)(alone.config)
    record = archsmith.atoms.record(alone)
    archsmith.atoms.rebuild(again, record, alone.state_dict())
    assert gap(outputs(again.eval(), inputs, forward), outputs(alone, inputs, forward)) == 0


def test_the_space_asks_only_for_what_takes_part() -> None:
    elastic, _, _ = build("resnet", {"layer1.depth": [1, 2, 3], "layer2.depth": [0, 2], "width": [0.5, 1.0]})
    depth = next(dim for dim in elastic.dims if dim.name == "layer1.depth")
    assert depth.choices == (1, 2, 3)
    inner = [dim for dim in elastic.dims if ("layer1.depth", 2) in dim.inside]
    assert inner
    shallow = {**elastic.largest(), "layer1.depth": 2}
    with pytest.raises(UserError, match="active paths"):
        elastic.space.validate(shallow)
    elastic.activate(shallow)  # a value of what is left out does not count
    assert not any(dim.name in elastic.active for dim in inner)
    full = elastic.canonical(elastic.active)
    assert all(full[dim.name] == dim.choices[0] for dim in inner) and len(full) == len(elastic.dims)
    elastic.activate(full)
    rng = np.random.default_rng(0)
    for _ in range(20):
        architecture = elastic.space.sample(rng)
        assert elastic.space.validate(architecture) == architecture
        elastic.activate(architecture)
        assert elastic.active == architecture


def test_heads_and_key_value_groups_are_kept_whole() -> None:
    elastic, _, _ = build("Llama")
    alone = elastic.extract(elastic.smallest())
    attention = alone.model.layers[0].self_attn  # type: ignore[union-attr]
    assert attention.q_proj.weight.shape == (8, 16) and attention.k_proj.weight.shape == (4, 16)
    assert attention.head_dim == 4
    whole = elastic.model.model.layers[0].self_attn  # type: ignore[union-attr]
    assert torch.equal(attention.q_proj.weight, whole.q_proj.weight[:8])


def test_the_width_of_the_stream_shrinks_where_it_is_asked_for() -> None:
    elastic, inputs, forward = build("ViT", {"embedding": [8, 16], "ffn": [0.5, 1.0]})
    keeps_the_contract(elastic, inputs, forward, number=2)
    elastic.activate(elastic.smallest())
    assert elastic.extract(elastic.smallest()).vit.embeddings.cls_token.shape[-1] == 8  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "name",
    ["mobile", "Llama", "fused qkv", "grouped", *(pytest.param(name, marks=SLOW) for name in ("resnet", "BERT"))],
)
def test_sorting_keeps_the_function_and_puts_the_important_first(name: str) -> None:
    elastic, inputs, forward = build(name)
    before = outputs(elastic.model, inputs, forward)
    moved = elastic.sort_("l2")
    assert moved and gap(outputs(elastic.model, inputs, forward), before) < 1e-5
    scores = archsmith.atoms.find(elastic.model, inputs, forward=forward)
    from archsmith.atoms.unit_scores import weight_scores

    sizes = weight_scores(elastic.model, scores.groups)
    for dim in elastic.dims:
        group = elastic.atoms.group(dim.groups[0]) if dim.groups else None
        if group is not None and not group.balance and group.name in moved:
            assert bool((np.diff(sizes[group.name]) <= 1e-6).all()), group.name
    keeps_the_contract(elastic, inputs, forward, number=1)


def test_units_whose_order_matters_are_left_alone() -> None:
    class Weighted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 6), nn.Linear(6, 2)
            self.other, self.out = nn.Linear(4, 8), nn.Linear(8, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            hidden = self.a(x).cumsum(-1)
            return self.b(hidden) + self.out(torch.relu(self.other(x)))

    torch.manual_seed(0)
    net, x = Weighted(), torch.randn(3, 4)
    elastic = Elastic(net, x, {"width": [0.5, 1.0]})
    before = outputs(net, x)
    moved = elastic.sort_()
    assert gap(outputs(net, x), before) < 1e-5
    cumulative = [dim.name for dim in elastic.dims if dim.name == "a"]
    assert not cumulative or ("a" not in moved and any("order" in note for note in elastic.notes))
    assert "other" in moved


def test_sorting_takes_scores_and_refuses_others() -> None:
    elastic, _, _ = build("mlp", {"width": [0.5, 1.0]})
    scores = {name: np.arange(size, dtype=float) for name, size in (("enter", 16), ("hidden", 12))}
    assert elastic.sort_(scores)["hidden"].tolist() == list(range(11, -1, -1))
    elastic.sort_(lambda model, groups: {group.name: np.ones(group.size) for group in groups})
    with pytest.raises(UserError, match="one for every unit"):
        elastic.sort_({"enter": np.ones(16)})
    with pytest.raises(UserError, match="importance"):
        elastic.sort_("biggest")  # type: ignore[arg-type]


def test_the_optimiser_and_the_state_dict_see_the_whole_network() -> None:
    elastic, inputs, _ = build("resnet")
    names = list(elastic.model.state_dict())
    assert list(elastic.state_dict()) == names
    optimizer = torch.optim.SGD(elastic.parameters(), lr=0.1, momentum=0.9)
    shapes = {name: p.shape for name, p in elastic.model.named_parameters()}
    elastic.train()
    for architecture in architectures(elastic, 2):
        elastic.activate(architecture)
        loss(elastic(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(elastic.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert {name: p.shape for name, p in elastic.model.named_parameters()} == shapes
    state = elastic.state_dict()
    fresh, _, _ = build("resnet")
    fresh.load_state_dict(state)
    assert all(torch.equal(a, b) for a, b in zip(fresh.state_dict().values(), state.values(), strict=True))
    elastic.model.load_state_dict(state)
    twin = copy.deepcopy(elastic)
    twin.activate(twin.smallest())
    elastic.activate(elastic.largest())
    with torch.no_grad():
        next(twin.model.parameters()).zero_()
    assert not bool((next(elastic.model.parameters()) == 0).all())
    assert gap(outputs(twin.eval(), inputs), outputs(twin.extract(twin.smallest()).eval(), inputs)) < 1e-5


def test_running_statistics_of_the_active_path_are_those_of_the_extracted_network() -> None:
    elastic, inputs, _ = build("mobile")
    elastic.train()
    small = elastic.smallest()
    alone = elastic.extract(small)
    elastic.activate(small)
    elastic(inputs)
    alone(inputs)
    again = elastic.extract(small)
    for (name, a), b in zip(again.state_dict().items(), alone.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name


def test_weights_that_do_not_fit_are_refused_whole() -> None:
    elastic, _, _ = build("mlp")
    before = {name: t.clone() for name, t in elastic.state_dict().items()}
    state = {**before, "leave.weight": torch.zeros(3, 11), "enter.weight": torch.zeros(16, 6)}
    with pytest.raises(UserError, match=r"'leave.weight': \(3, 11\), not \(3, 12\)"):
        elastic.load_state_dict(state)
    with pytest.raises(UserError, match=r"'leave\.bias' is missing"):
        elastic.load_state_dict({name: t for name, t in before.items() if name != "leave.bias"})
    with pytest.raises(UserError, match="'another' is unknown"):
        elastic.load_state_dict({**before, "another": torch.zeros(1)})
    assert all(torch.equal(before[name], t) for name, t in elastic.state_dict().items())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": 5}, "hidden: got 5; allowed: one of"),
        ({"hidden": 12.0}, "one of"),
        ({"nothing": 1}, "dimensions of 'elastic': enter, hidden"),
        ({"hidden": None}, "a choice for every active dimension"),
    ],
)
def test_choices_that_do_not_exist_are_refused(change: dict[str, Any], text: str) -> None:
    elastic, _, _ = build("mlp")
    architecture = {k: v for k, v in {**elastic.largest(), **change}.items() if v is not None}
    for call in (elastic.activate, elastic.extract, elastic.costs, elastic.canonical):
        with pytest.raises(UserError, match=text):
            call(architecture)
    assert elastic.active == elastic.largest()


@pytest.mark.parametrize(
    ("dims", "text"),
    [
        ({"width": [0.5]}, "the largest subnet is the network as it is"),
        ({"width": [16]}, "a number from 1 to 12"),
        ({"width": [1.5]}, "shares above 0"),
        ({"width": ["4"]}, "integers, or shares"),
        ({"enter": [0, 16]}, "a number from 1 to 16"),
        ({"heads": [1, 2]}, "a kind that the network has"),
        ({"width": []}, "at least the whole"),
        ({"width": [1.0]}, "a space of one point"),
    ],
)
def test_options_that_do_not_exist_are_refused(dims: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        build("mlp", dims)


def test_a_network_without_atoms_is_refused() -> None:
    with pytest.raises(UserError, match="nothing can shrink"):
        Elastic(nn.Sequential(nn.Linear(3, 2)), torch.zeros(1, 3))


def test_blocks_that_the_code_counts_on_are_not_a_depth() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
            self.leave = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = x + block(x)
            return self.leave(self.blocks[-1](x))

    class Pre(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.outer(torch.relu(self.inner(x)))

    class Once(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks, self.leave = nn.ModuleList([Pre() for _ in range(3)]), nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return self.leave(x)

    class Twice(Once):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * len(self.blocks)

    assert not [dim for dim in _dims(Named()) if dim.kind == "depth"]
    assert not [dim for dim in _dims(Twice()) if dim.kind == "depth"]
    assert [dim for dim in _dims(Once()) if dim.kind == "depth"]


def _dims(net: nn.Module) -> tuple[Any, ...]:
    try:
        return Elastic(net, torch.randn(2, 4)).dims
    except UserError:
        return ()


def test_a_half_width_of_a_balanced_group_takes_as_much_of_each_part() -> None:
    elastic, _, _ = build("grouped")
    for dim in elastic.dims:
        group = elastic.atoms.group(dim.groups[0])
        if group.balance:
            assert all(choice % len(group.balance) == 0 for choice in dim.choices)


@pytest.mark.parametrize("name", ["mobile", pytest.param("BERT", marks=SLOW)])
def test_costs_of_many_come_from_few_counts(name: str) -> None:
    elastic, _, _ = build(name)
    rng = np.random.default_rng(4)
    subnets = [elastic.space.sample(rng) for _ in range(60)]
    active = elastic.active
    found = [elastic.costs(subnet) for subnet in subnets]
    assert elastic.active == active
    table = elastic._cost_table
    assert table is not None and table.counts < 45
    for subnet, costs in list(zip(subnets, found, strict=True))[-8:]:
        assert costs["params"] == sum(p.numel() for p in elastic.extract(subnet).parameters())
        fresh = copy.deepcopy(elastic)
        counted = fresh._counted(fresh._values(subnet)).values()
        assert costs == {"macs": sum(m for m, _ in counted), "params": sum(p for _, p in counted)}
    assert len({each["macs"] for each in found}) > 20


def test_a_network_that_was_cut_before_is_elastic_again() -> None:
    elastic, inputs, _ = build("resnet")
    widths = {dim.name: dim.choices[0] for dim in elastic.dims if dim.kind == "width"}
    cut = elastic.extract({**elastic.largest(), **widths})
    before = archsmith.atoms.record(cut)
    again = Elastic(cut, inputs)
    shallow = {**again.largest(), "layer1.depth": 2}
    for architecture in (again.smallest(), shallow):
        again.activate(architecture)
        alone = again.extract(architecture)
        assert gap(outputs(alone, inputs), outputs(again, inputs)) < 1e-5
        archsmith.atoms.record(alone)
    assert archsmith.atoms.record(cut).original == before.original


def test_operations_outside_all_modules_are_counted() -> None:
    torch.manual_seed(0)
    net, x, table = Mlp(), torch.randn(5, 6), torch.randn(3, 7)
    elastic = Elastic(net, x, {"width": [0.5, 1.0]}, forward=lambda model, given: model(given) @ table)
    small = elastic.costs(elastic.smallest())["macs"]
    assert small == 6 * 8 + 8 * 6 + 6 * 3 + 3 * 7
    assert elastic.costs(elastic.largest())["macs"] == 6 * 16 + 16 * 12 + 12 * 3 + 3 * 7


def test_activation_checkpoints_recompute_inside_the_active_block() -> None:
    from torch.utils.checkpoint import checkpoint

    class Recomputing(SmallResNet):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = torch.relu(self.bn(self.stem(x)))
            for block in (*self.layer1, *self.layer2):
                x = checkpoint(block, x, use_reentrant=False) if torch.is_grad_enabled() else block(x)
            return self.fc(x.mean((2, 3)))

    torch.manual_seed(0)
    elastic = Elastic(atoms_nets.randomised(Recomputing()), IMAGES, {"*conv1": [0.5, 1.0]})
    small = elastic.smallest()
    alone = elastic.extract(small)
    elastic.activate(small)
    with elastic.slices.active():
        loss(elastic(IMAGES)).backward()
    loss(alone(IMAGES)).backward()
    found, wanted = elastic.model.layer1[0].conv1.weight.grad, alone.layer1[0].conv1.weight.grad  # type: ignore[union-attr]
    assert torch.allclose(found[:4], wanted, atol=1e-5) and not bool((found[4:] != 0).any())
    with pytest.raises(RuntimeError, match=r"recomputed|size|shape|expected"):
        loss(elastic(IMAGES)).backward()
