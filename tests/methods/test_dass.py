import json
import math
from pathlib import Path

import pytest
import torch
from darts_runs import copied, small_family, small_task, stop_after, to_the_end
from shared_data import cifar10_arrays
from torch import nn
from torch.nn import functional

import archsmith
from archsmith.families.darts import DartsFamily
from archsmith.families.darts_space import DARTS_V2, Genotype
from archsmith.layers.darts import DenseLayers
from archsmith.layers.sparse import SparseConv2d, SparseLayers, SparseLinear, masks, set_keep_, sparse_layers, top_mask
from archsmith.methods import darts, load_method
from archsmith.methods.dass import (
    DASS_90,
    DASS_99,
    SIZES,
    Searcher,
    Settings,
    dense,
    nonzeros,
    phases_of,
    plan_of,
    preset_settings,
    train_sparse,
)
from archsmith.supernet.updaters import first_order
from archsmith.tasks.vision import ImageClassification

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "dass.json").read_text())["cases"]
NETWORKS = [case for case in GOLDEN if "genotype" in case["input"]]
SLOW = ("dass_k10_small", "dass_large", "darts_v2_small_k1", "dass_small")
SMALL = {
    "keep": 0.2,
    "order": "first",
    "search_pretrain_epochs": 1,
    "search_prune_epochs": 1,
    "search_finetune_epochs": 1,
    "search_batch_size": 8,
    "search_channels": 4,
    "search_cells": 3,
    "pretrain_epochs": 1,
    "prune_epochs": 1,
    "finetune_epochs": 1,
    "batch_size": 16,
    "logit_lr": 0.05,
    "lr": 0.05,
    "score_lr": 0.1,
}


def searcher(**changes):
    return Searcher(
        family=small_family(), task=small_task(), seed=changes.pop("seed", 1), settings=Settings(**{**SMALL, **changes})
    )


def snapshot(network):
    return {name: tensor.detach().clone() for name, tensor in network.named_parameters()}


def test_it_is_listed_and_has_the_published_defaults():
    row, module = load_method("pr-darts")
    assert row["slug"] == "dass" and module.SYSTEM["arxiv"] == "2207.06968"
    plan = plan_of(Settings())
    assert [(p.name, p.epochs, p.lr, p.logits) for p in plan.search] == [
        ("search/pretrain", 100, 0.025, True),
        ("search/prune", 50, 0.1, False),
        ("search/finetune", 100, 0.025, True),
    ]
    assert {(p.batch_size, p.momentum, p.weight_decay, p.lr_min, p.clip_norm) for p in plan.search} == {
        (32, 0.0, 1e-3, 0.001, 5.0)
    }
    assert {(p.batch_size, p.momentum, p.weight_decay, p.lr_min) for p in plan.final} == {(128, 0.9, 4e-4, 0.0)}
    assert Settings().keep == 0.01 and (plan.logit_lr, plan.logit_decay) == (3e-4, 1e-3)
    assert preset_settings((3, 32, 32)) == {} and Settings(**preset_settings((3, 16, 16))).keep == 0.1


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c["name"], marks=pytest.mark.slow if c["name"] in SLOW else ()) for c in NETWORKS],
)
def test_published_networks_have_their_exact_counts(case):
    given, expected = case["input"], case["expected"]
    cells = given["genotype"]
    outputs = {"normal_concat": cells["concat"], "reduce_concat": cells["concat"]}
    genotype = Genotype.from_json({**{k: v for k, v in cells.items() if k != "concat"}, **outputs})
    family = DartsFamily(image=(3, 32, 32), num_classes=10, channels=given["init_channels"], cells=given["layers"])
    with torch.device("meta"):
        network = family.network(genotype, layers=SparseLayers(given["keep_fraction_k"]))
        counted = nonzeros(network, (3, 32, 32))
    assert counted["layers"] == expected["n_layers"]
    assert counted["weights"] == expected["masked_weights"]
    assert counted["kept"] == expected["kept_at_k"]
    assert counted["macs"] == expected["dense_macs_32"]
    assert counted["kept_macs"] < 0.2 * counted["macs"]
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    affine = sum(p.numel() for m in norms for p in m.parameters())
    biases = sum(m.bias.numel() for m in network.modules() if isinstance(m, SparseLinear))
    assert (affine, biases) == (expected["bn_affine"], expected["bias"])
    assert counted["weights"] + affine + biases == expected["total_dense"]


def test_published_cells_are_those_of_the_counts():
    by_name = {case["name"]: case["input"]["genotype"] for case in NETWORKS}
    for name, genotype in (("dass_small", DASS_99), ("dass_k10_small", DASS_90), ("darts_v2_small_k1", DARTS_V2)):
        assert genotype.to_json()["normal"] == by_name[name]["normal"]
        assert genotype.to_json()["reduce"] == by_name[name]["reduce"]
    sizes = {(case["input"]["init_channels"], case["input"]["layers"]) for case in NETWORKS}
    assert sizes == {SIZES[name] for name in ("Tiny", "Small", "Large")}


@pytest.mark.parametrize("order", ["first", pytest.param("second", marks=pytest.mark.slow)])
def test_keeping_everything_without_pruning_is_darts(order):
    """Same logits after every step: scores draw no random numbers and hide nothing."""
    shared = {"order": order, "search_batch_size": 8, "search_channels": 4, "search_cells": 3, "logit_lr": 0.05}
    plain = darts.Searcher(
        family=small_family(),
        task=small_task(),
        seed=1,
        settings=darts.Settings(
            **shared,
            search_epochs=11,
            epochs=1,
            batch_size=16,
            momentum=0.9,
            weight_decay=1e-3,
            auxiliary_weight=0,
            search_lr=0.025,
        ),
    )
    own = searcher(
        **shared,
        keep=1.0,
        search_pretrain_epochs=11,
        search_prune_epochs=0,
        search_finetune_epochs=0,
        search_momentum=0.9,
        search_lr=0.025,
    )
    for _ in range(20 if order == "first" else 3):
        before = {name: tensor.detach().clone() for name, tensor in plain.supernet.logits.items()}
        stop_after(plain, 1)
        stop_after(own, 1)
        for name, logits in plain.supernet.logits.items():
            assert not torch.equal(logits, before[name])
            torch.testing.assert_close(own.supernet.logits[name], logits, rtol=0, atol=1e-6)


def test_what_is_frozen_in_each_phase():
    search = searcher()
    network, logits = search.supernet.network, search.supernet.logits
    steps = search.halves[0].steps_per_epoch(8)
    moved = {}
    for phase in ("pretrain", "prune", "finetune"):
        assert search.phases[search.index].name == f"search/{phase}"
        before, alphas = snapshot(network), {name: tensor.detach().clone() for name, tensor in logits.items()}
        hidden = {name: mask == 0 for name, mask in masks(network).items()}
        stop_after(search, steps - 1)
        now = dict(network.named_parameters())
        changed = {name for name, tensor in before.items() if not torch.equal(tensor, now[name])}
        moved[phase] = {
            "scores": any(name.endswith(".score") for name in changed),
            "weights": any(
                name.endswith(".weight") and "norm" not in name and "stem.1" not in name for name in changed
            ),
            "logits": any(not torch.equal(tensor, alphas[name]) for name, tensor in logits.items()),
            "dropped": any(
                not torch.equal(before[f"{name}.weight"][mask], now[f"{name}.weight"][mask])
                for name, mask in hidden.items()
            ),
        }
        stop_after(search, 1)
    none = {"scores": False, "weights": False, "logits": False, "dropped": False}
    assert moved["pretrain"] == {**none, "weights": True, "logits": True}
    assert moved["prune"] == {**none, "scores": True}
    assert moved["finetune"] == {**none, "weights": True, "logits": True}


def test_masks_start_at_the_magnitudes_and_then_learn():
    search = searcher(search_score_lr=1.0)
    stop_after(search, search.halves[0].steps_per_epoch(8))
    network = search.supernet.network
    assert {layer.keep for layer in sparse_layers(network).values()} == {0.2}
    first = masks(network)
    for name, layer in sparse_layers(network).items():
        kept = int(first[name].sum())
        smallest = layer.weight.abs().flatten().topk(kept).values[-1]
        assert torch.equal(first[name], (layer.weight.abs() >= smallest).float())
    stop_after(search, search.halves[0].steps_per_epoch(8))
    learned = masks(network)
    assert any(not torch.equal(mask, first[name]) for name, mask in learned.items())
    assert search.phases[search.index].name == "search/finetune"  # has begun, and ranks nothing anew
    assert any(not torch.equal(mask, masks_by_magnitude(network)[name]) for name, mask in learned.items())


def masks_by_magnitude(network):
    return {name: top_mask(layer.weight, layer.keep) for name, layer in sparse_layers(network).items()}


def test_a_search_delivers_a_dense_network_that_is_sparse():
    search = searcher()
    figures = to_the_end(search)
    assert [f["phase"].split("/") for f in figures] == [
        [part, kind] for part in ("search", "final") for kind in ("pretrain", "prune", "finetune")
    ]
    delivered = search.deliver()
    x = torch.rand(4, 3, 8, 8)
    torch.testing.assert_close(delivered.network(x), search.network.eval()(x), rtol=0, atol=1e-6)
    assert type(delivered.network.layers) is DenseLayers
    counted = {name: int(value) for name, value in delivered.figures.items() if name in ("kept", "weights", "layers")}
    layers = [m for m in delivered.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == counted["layers"]
    assert sum(m.weight.numel() for m in layers) == counted["weights"]
    assert sum(int(m.weight.count_nonzero()) for m in layers) == counted["kept"] < 0.3 * counted["weights"]


@pytest.mark.parametrize("steps", [3, *(pytest.param(n, marks=pytest.mark.slow) for n in (5, 9, 11))])
def test_a_stopped_search_goes_on_bit_for_bit(steps, finished):
    whole, figures = finished
    halted, again = searcher(), searcher()
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    again.load(tensors, json.loads(json.dumps(state)))
    left = to_the_end(again)
    assert left == figures[-len(left) :]
    ours, theirs = again.network.state_dict(), whole.network.state_dict()
    assert again.chosen == whole.chosen
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


@pytest.fixture(scope="module")
def finished():
    search = searcher()
    return search, to_the_end(search)


def test_a_path_of_the_sparse_supernet_is_delivered_before_the_end():
    search = searcher()
    stop_after(search, 2 * search.halves[0].steps_per_epoch(8))  # masks have been learned
    delivered = search.deliver()
    layers = [m for m in delivered.network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert sum(int(m.weight.count_nonzero()) for m in layers) < 0.3 * sum(m.weight.numel() for m in layers)


def test_the_architecture_gradient_sees_the_masks():
    supernet = small_family().supernet(seed=0, layers=SparseLayers()).double()
    with torch.no_grad():
        for logits in supernet.logits.values():
            logits.mul_(300)  # away from the uniform start
    x, y = torch.rand(6, 3, 8, 8, dtype=torch.float64), torch.arange(6) % 3

    def loss(weights, logits):
        return functional.cross_entropy(supernet.functional(x, weights, logits), y)

    gradients = {}
    for keep in (1.0, 0.1):
        set_keep_(supernet.network, keep)
        weights, logits = supernet.weights(), {name: t.detach().clone() for name, t in supernet.logits.items()}
        gradients[keep] = first_order(loss, weights, logits)
        for name, row, column in (("normal", 0, 3), ("reduce", 2, 2), ("normal", 4, 1)):
            sides = []
            for sign in (1, -1):
                moved = {**logits, name: logits[name].clone()}
                moved[name][row, column] += sign * 1e-5
                sides.append(loss(weights, moved).item())
            expected = (sides[0] - sides[1]) / 2e-5
            assert gradients[keep][name][row, column].item() == pytest.approx(expected, rel=1e-4, abs=1e-9)
    assert not torch.allclose(gradients[1.0]["normal"], gradients[0.1]["normal"], rtol=0.05)


def small_cnn(seed):
    """24-32-48-48 sparse convolutions on 16x16 images."""
    torch.manual_seed(seed)
    blocks = []
    for before, after, stride in ((3, 24, 1), (24, 32, 2), (32, 48, 2), (48, 48, 1)):
        blocks += [SparseConv2d(before, after, 3, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), SparseLinear(48, 10))


def test_phases_can_train_any_sparse_network():
    torch.manual_seed(0)
    network = nn.Sequential(
        SparseConv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        SparseLinear(8, 3),
    )  # fmt: skip
    phases = phases_of((4, 4, 4), (0.1, 0.3, 0.05), batch_size=8)
    scores = train_sparse(network, small_task(), phases, 0.1, seed=0)
    assert list(scores) == ["pretrain", "magnitude", "prune", "finetune"]
    assert all(math.isfinite(value["loss"]) for value in scores.values())
    assert scores["magnitude"]["loss"] > scores["finetune"]["loss"]
    assert sum(int(mask.sum()) for mask in masks(network).values()) == 22 + 3


@pytest.mark.slow
@pytest.mark.parametrize("keep", [0.1, 0.02])
@pytest.mark.parametrize("seed", [0, 1])
def test_scores_beat_magnitudes_and_finetuning_beats_scores_on_real_images(keep, seed):
    arrays = cifar10_arrays()
    pooled = arrays["x_train"][:3000].reshape(3000, 3, 16, 2, 16, 2).mean((3, 5)).astype("f4") / 255
    task = ImageClassification.from_arrays(pooled, arrays["y_train"][:3000], valid_fraction=0.02, test_fraction=0.02)
    phases = phases_of((3, 2, 2), (0.05, 0.1, 0.02), batch_size=64, momentum=0.9)
    scores = train_sparse(small_cnn(seed), task, phases, keep, seed=seed)
    print(keep, seed, {name: round(value["loss"], 3) for name, value in scores.items()})
    assert scores["magnitude"]["loss"] > scores["prune"]["loss"] > scores["finetune"]["loss"]


def test_dense_networks_keep_their_structure():
    network = DartsFamily(image=(3, 8, 8), num_classes=3, channels=4, cells=3).network(
        DASS_99, seed=0, layers=SparseLayers(0.1)
    )
    assert dense(network).constructor() == {k: v for k, v in network.constructor().items() if k != "layers"}


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_in_the_same_files(tmp_path):
    lengths = ("search_pretrain", "search_prune", "search_finetune", "pretrain", "prune", "finetune")
    settings = {**{f"{name}_epochs": 1 for name in lengths}, "search_batch_size": 16, "search_cells": 3}

    def started(name, **more):
        return archsmith.search(
            "digits",
            method="dass",
            family="darts",
            out=tmp_path / name,
            threads=1,
            quiet=True,
            family_options={"channels": 4, "cells": 3, "nodes": 2},
            task_options={"limit": 12},
            settings={**settings, "batch_size": 16},
            **more,
        )

    whole, stopped = started("whole"), started("stopped", time_limit=0.1)
    assert stopped.status == "stopped"
    while stopped.status == "stopped":
        stopped = archsmith.resume(tmp_path / "stopped", time_limit=5.0, quiet=True)
    for file in ("weights.safetensors", "model.py", "architecture.json"):
        assert (stopped.folder / file).read_bytes() == (whole.folder / file).read_bytes()
    assert stopped.result["figures"] == whole.result["figures"]
    assert stopped.result["figures"]["kept"] < 0.2 * stopped.result["figures"]["weights"]
