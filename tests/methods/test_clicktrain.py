"""ClickTrain: the published counts, the stages in a loop of one's own and in ours, limits, resuming, agreement."""

from __future__ import annotations

import copy
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from clicktrain_samples import digits, small_network
from shared_data import cifar10_arrays
from torch import nn
from two_processes import in_processes

from archsmith.atoms.pattern_choice import choose, masks_of
from archsmith.atoms.pattern_file import dense_weights, load_packed
from archsmith.atoms.weight_masks import all_patterns, importance
from archsmith.core.errors import UserError
from archsmith.layers.plain_nets import VGG, PlainResNet, PlainVgg
from archsmith.methods.clicktrain import (
    PUBLISHED,
    ClickTrain,
    PrunedTraining,
    Recipe,
    Settings,
    plan,
    published_settings,
    train,
)
from archsmith.tasks.vision import ImageClassification
from archsmith.train.compute import Compute
from archsmith.train.workers import Workers

CASES = {
    case["name"]: case
    for case in json.loads((Path(__file__).parents[1] / "golden" / "clicktrain.json").read_text())["cases"]
}
NETWORKS = {
    "ratio_vgg11_10.3x": ("vgg11-10.3x", lambda: PlainVgg(VGG["vgg11"], 3, 10)),
    "ratio_vgg11_8.7x": ("vgg11-8.7x", lambda: PlainVgg(VGG["vgg11"], 3, 10)),
    "ratio_vgg16": ("vgg16", lambda: PlainVgg(VGG["vgg16"], 3, 10)),
    "ratio_resnet32_8.6x": (
        "resnet32-8.6x",
        lambda: PlainResNet((3, 4, 5, 3), (64, 128, 256, 512), False, False, 3, 10),
    ),
    "ratio_imagenet_resnet50": (
        "resnet50-imagenet",
        lambda: PlainResNet((3, 4, 6, 3), (64, 128, 256, 512), True, True, 3, 1000),
    ),
}


@pytest.mark.parametrize("case", NETWORKS)
def test_published_ratios_by_counting(case: str) -> None:
    name, build = NETWORKS[case]
    with torch.device("meta"):
        network = build()
    settings, _ = published_settings(name, network)
    found, expected = plan(network, settings), CASES[case]["expected"]
    assert (found["weights"], found["nonzero"]) == (expected["conv_weights"], expected["nonzero"])
    assert found["ratio"] == pytest.approx(expected["ratio_all_convs"], abs=1e-9)
    table = CASES[case]["input"]
    if "ratio_without_shortcuts" in expected:
        assert found["ratio_without_shortcuts"] == pytest.approx(expected["ratio_without_shortcuts"], abs=1e-9)
    assert round(found["ratio_without_shortcuts"], 3) == PUBLISHED[name]["ratio"]
    if isinstance(table.get("prune_percent"), dict):
        assert settings.kernels == {
            key.removeprefix("module.").removesuffix(".weight"): value for key, value in table["prune_percent"].items()
        }


def test_the_published_tables_are_those_of_the_oracles() -> None:
    for case in ("ratio_vgg11_10.3x", "ratio_vgg11_8.7x"):
        percent = CASES[case]["input"]["kernel_prune_percent_per_remaining_conv"]
        assert list(PUBLISHED[NETWORKS[case][0]]["kernels"]) == percent


# A loop of one's own -------------------------------------------------------------------------------------------------


class Loop:
    """A user's loop on random data, with momentum and weight decay."""

    def __init__(self, settings: Settings, *, seed: int = 0, wrap=lambda model: model) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 8, 1),
            nn.ReLU(),
            nn.Conv2d(8, 6, 3, stride=2, padding=1),
            nn.Flatten(),
            nn.Linear(6 * 9, 4),
        )
        self.wrapped = wrap(self.model)
        self.optimizer = torch.optim.SGD(self.wrapped.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-2)
        self.click = ClickTrain(self.wrapped, self.optimizer, settings, steps_per_epoch=3)
        self.number = 0

    def gradients(self) -> None:
        generator = torch.Generator().manual_seed(self.number)
        self.number += 1
        x = torch.randn(8, 3, 6, 6, generator=generator)
        y = torch.randint(0, 4, (8,), generator=generator)
        self.optimizer.zero_grad()
        F.cross_entropy(self.wrapped(x), y).backward()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.gradients()
            self.click.before_step()
            self.optimizer.step()
            self.click.after_step()


SETTINGS = Settings(regularise_from=1, prune_from=2, strength=1e-2, kernels=40, patterns=4)


def check_pruned(model: nn.Module, click: ClickTrain) -> None:
    """Assert that every pruned kernel is zero and every other 3x3 kernel stays inside one pattern of the pool."""
    assert click.decision is not None
    for name, choice in click.decision.choices.items():
        weight = model.get_submodule(name).weight.detach()
        total = weight.shape[0] * weight.shape[1]
        assert int((~choice.kept).sum()) == -(-40 * total // 100)
        for o in range(weight.shape[0]):
            for i in range(weight.shape[1]):
                places = weight[o, i].flatten().nonzero()[:, 0].tolist()
                if not choice.kept[o, i]:
                    assert not places
                elif weight.shape[2] == 3:
                    assert choice.patterns is not None
                    assert {*places} <= {*click.decision.pool[int(choice.patterns[o, i])]}
                    assert 0 < len(places) <= 4


def test_three_lines_in_a_loop_prune_in_three_stages() -> None:
    loop = Loop(SETTINGS)
    stages = []
    for _ in range(9):
        stages.append((loop.click.stage, loop.click.decision is not None, loop.click.mixup))
        loop.steps(1)
    assert stages[:4] == [("plain", False, 0.0)] * 3 + [("regularise", False, 0.0)]
    assert stages[4:] == [("regularise", True, 0.0)] * 2 + [("prune", True, 0.3)] * 3
    assert list(loop.click.layers) == ["2", "5", "7"]  # neither the first convolution nor the linear layer
    check_pruned(loop.model, loop.click)
    loop.steps(5)  # momentum and weight decay do not move them
    check_pruned(loop.model, loop.click)
    report = loop.click.report()
    assert report["removed_but_not_zero"] == 0 and report["layers"]["0"]["nonzero"] == 3 * 6 * 9
    assert report["layers"]["2"]["nonzero"] == 4 * (48 - 20)
    assert report["ratio"] == pytest.approx(plan(loop.model, SETTINGS)["ratio"])
    pixels = {"0": 36, "2": 36, "5": 36, "7": 9}
    nonzero = 6 * 9 * 4 + sum(report["layers"][name]["nonzero"] * count for name, count in pixels.items())
    assert loop.click.macs(torch.zeros(1, 3, 6, 6))["nonzero"] == nonzero
    assert loop.click.macs(torch.zeros(1, 3, 6, 6))["dense"] == 36 * (162 + 432 + 64) + 9 * 432 + 6 * 9 * 4


def test_the_choice_uses_the_clean_gradients_of_its_batch_and_takes_a_plain_step() -> None:
    loop, plain = Loop(SETTINGS), Loop(SETTINGS)
    loop.steps(3)
    for _ in range(3):
        plain.gradients()
        plain.optimizer.step()
    loop.gradients()
    scores = {
        name: importance(loop.model.get_submodule(name).weight, loop.model.get_submodule(name).weight.grad)
        for name in loop.click.layers
    }
    loop.click.before_step()
    loop.optimizer.step()
    loop.click.after_step()
    expected, found = choose(scores, SETTINGS), loop.click.decision
    assert found is not None
    for name, choice in expected.choices.items():
        assert torch.equal(choice.kept, found.choices[name].kept)
    plain.gradients()
    plain.optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(loop.model.parameters(), plain.model.parameters(), strict=True))
    # From the next step on the lasso is felt.
    loop.steps(1)
    plain.gradients()
    plain.optimizer.step()
    assert not torch.equal(loop.model[2].weight, plain.model[2].weight)


def test_without_strength_it_is_train_prune_finetune() -> None:
    loop = Loop(SETTINGS.model_copy(update={"strength": 0.0}))
    loop.steps(9)
    literal = Loop(SETTINGS)
    masks: dict[str, torch.Tensor] = {}
    for step in range(9):
        literal.gradients()
        if step == 3:
            scores = {n: importance(m.weight, m.weight.grad) for n, m in literal.click.layers.items()}
            decision = choose(scores, SETTINGS)
            for name, choice in decision.choices.items():
                both = masks_of(literal.click.layers[name].weight, choice, decision.pool)
                masks[name] = torch.stack(both).all(0)
        literal.optimizer.step()
        if step >= 6:
            for name, mask in masks.items():
                literal.click.layers[name].weight.data.mul_(mask)
    for a, b in zip(loop.model.parameters(), literal.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_the_decoupled_lasso_leaves_adam_alone() -> None:
    def loop(**changes) -> Loop:
        made = Loop(SETTINGS.model_copy(update=changes))
        made.optimizer = torch.optim.AdamW(made.model.parameters(), lr=0.05)
        made.click.optimizer = made.optimizer
        made.steps(5)  # the choice in step 4, then one step with the lasso
        return made

    plain, coupled, decoupled = loop(strength=0.0), loop(strength=1.0), loop(strength=1.0, decoupled=True)
    assert plain.click.decision is not None
    for name, module in decoupled.click.layers.items():
        other = plain.model.get_submodule(name).weight.detach()
        masks = masks_of(other, plain.click.decision.choices[name], plain.click.decision.pool)
        kept = torch.stack(masks).all(0)
        assert torch.equal(module.weight.detach()[kept], other[kept])
        removed = ~masks[0][:, :, 0, 0]
        before, after = (w.flatten(2).norm(dim=-1)[removed] for w in (other, module.weight.detach()))
        assert (after <= (before - 0.05).clamp_min(0) + 1e-6).all()
        # As a gradient it is divided by its own size: about lr for every removed weight, whatever its group's norm.
        assert not torch.allclose(coupled.model.get_submodule(name).weight, module.weight, atol=1e-3)


def test_all_patterns_without_kernels_equals_the_four_best_of_every_kernel() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = {"a": torch.rand(4, 5, 3, 3, generator=generator, dtype=torch.float64)}
    decision = choose(scores, Settings(kernels=0, patterns=126, pool="frequent"))
    # Only the natural patterns that occur are in the pool, and these are all that is needed.
    assert {*decision.pool} <= {*all_patterns()}
    mask = torch.stack(masks_of(scores["a"], decision.choices["a"], decision.pool)).all(0)
    best = scores["a"].flatten(2).topk(4, dim=-1).indices
    assert torch.equal(mask.flatten(2), torch.zeros(4, 5, 9, dtype=torch.bool).scatter_(2, best, True))


def test_everything_removed_zeroes_the_layers() -> None:
    loop = Loop(SETTINGS.model_copy(update={"kernels": 100.0}))
    loop.steps(7)
    assert all(int(module.weight.count_nonzero()) == 0 for module in loop.click.layers.values())
    assert loop.click.report()["ratio_pruned"] == float("inf")


def test_percentages_by_name_and_one_ratio_for_all() -> None:
    loop = Loop(Settings(regularise_from=0, prune_from=0, kernels={"2": 50, "0": 10}))
    loop.steps(1)
    rows = loop.click.report()["layers"]
    assert rows["2"]["nonzero"] == 4 * 24 and rows["0"]["nonzero"] == 4 * 16 and rows["7"]["nonzero"] == 8 * 6 * 9
    loop = Loop(Settings(regularise_from=0, prune_from=0, ratio=3.0))
    loop.steps(1)
    report = loop.click.report()
    assert 3.0 <= report["ratio"] < 3.05
    assert report["layers"]["0"]["kept"] == "the first convolution"
    with pytest.raises(UserError, match=r"ratio: got -?\d+ weights to keep; allowed: at least"):
        Loop(Settings(ratio=50.0))


def test_frequent_patterns_come_from_the_network_itself() -> None:
    for centre in (False, True):
        settings = Settings(regularise_from=0, prune_from=0, kernels=40, pool="frequent", patterns=6, centre=centre)
        loop = Loop(settings)
        loop.steps(2)
        assert loop.click.decision is not None
        pool = loop.click.decision.pool
        assert len(pool) == 6 and (not centre or all(4 in pattern for pattern in pool))
        check_pruned(loop.model, loop.click)


def test_state_goes_to_another_process_and_back(tmp_path: Path) -> None:
    whole = Loop(SETTINGS)
    whole.steps(12)
    for cut in (2, 5, 8):
        first = Loop(SETTINGS)
        first.steps(cut)
        torch.save((first.model.state_dict(), first.optimizer.state_dict(), first.click.state_dict()), tmp_path / "s")
        model, optimizer, click = torch.load(tmp_path / "s", weights_only=True)
        second = Loop(SETTINGS, seed=1)
        second.model.load_state_dict(model)
        second.optimizer.load_state_dict(optimizer)
        second.click.load_state_dict(click)
        second.number = cut
        second.steps(12 - cut)
        for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
            assert torch.equal(a, b)
        check_pruned(second.model, second.click)
    second.click.load_state_dict({"steps": torch.tensor(1)})  # back to before the choice
    assert second.click.decision is None and second.click.stage == "plain" and second.click.lasso() == 0.0
    other = ClickTrain(
        nn.Sequential(nn.Conv2d(1, 2, 3), nn.Conv2d(2, 2, 3)), whole.optimizer, SETTINGS, steps_per_epoch=1
    )
    with pytest.raises(UserError, match=r"state: got masks of \['2', '5', '7'\]; allowed: those of \['1'\]"):
        other.load_state_dict(whole.click.state_dict())


def test_wrapped_models_have_the_same_names() -> None:
    loop = Loop(SETTINGS, wrap=lambda model: torch.compile(model, backend="eager"))
    loop.steps(7)
    check_pruned(loop.model, loop.click)
    plain = Loop(SETTINGS)
    plain.steps(7)
    assert list(plain.click.state_dict()) == list(loop.click.state_dict())


def test_loss_scaling_changes_nothing_and_an_overflow_waits() -> None:
    def scaled(first_scale: float) -> Loop:
        loop = Loop(SETTINGS)
        scaler = torch.amp.GradScaler("cpu", init_scale=first_scale, growth_interval=10**6)
        loop.click.scaler = scaler
        for _ in range(9):
            generator = torch.Generator().manual_seed(loop.number)
            loop.number += 1
            x, y = torch.randn(8, 3, 6, 6, generator=generator), torch.randint(0, 4, (8,), generator=generator)
            loop.optimizer.zero_grad()
            scaler.scale(F.cross_entropy(loop.model(x), y)).backward()
            loop.click.before_step()
            scaler.step(loop.optimizer)
            scaler.update()
            loop.click.after_step()
        return loop

    plain, with_scale = Loop(SETTINGS), scaled(1024.0)
    plain.steps(9)
    for a, b in zip(plain.model.parameters(), with_scale.model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert with_scale.click.decision is not None
    overflowing = Loop(SETTINGS)
    overflowing.steps(3)
    overflowing.gradients()
    overflowing.model[2].weight.grad.fill_(float("inf"))
    overflowing.click.before_step()
    assert overflowing.click.decision is None
    overflowing.click.after_step()
    overflowing.steps(5)
    check_pruned(overflowing.model, overflowing.click)


def test_bf16_autocast() -> None:
    loop = Loop(SETTINGS)
    for _ in range(8):
        x, y = torch.randn(8, 3, 6, 6), torch.randint(0, 4, (8,))
        loop.optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = F.cross_entropy(loop.model(x), y)
        loss.backward()
        loop.click.before_step()
        loop.optimizer.step()
        loop.click.after_step()
    check_pruned(loop.model, loop.click)


def test_all_ranks_have_the_masks_of_rank_0() -> None:
    def work(workers: Workers) -> dict[str, torch.Tensor]:
        loop = Loop(SETTINGS, seed=workers.rank)  # other weights: alone each would choose otherwise
        loop.steps(8)
        return loop.click.state_dict()

    def alone(workers: Workers) -> dict[str, torch.Tensor]:
        loop = Loop(SETTINGS, seed=workers.rank)
        loop.click._from_main = lambda make: make()
        loop.steps(4)
        return loop.click.state_dict()

    first, second = in_processes(work)
    assert list(first) == list(second) and all(torch.equal(first[name], second[name]) for name in first)
    one, other = in_processes(alone)
    assert not torch.equal(one["kept.2"], other["kept.2"])


def test_distributed_data_parallel_prunes_alike() -> None:
    def work(workers: Workers) -> list[torch.Tensor]:
        wrap = nn.parallel.DistributedDataParallel
        loop = Loop(SETTINGS, wrap=wrap)
        loop.number = 1000 * workers.rank  # each rank has its own batches
        loop.steps(8)
        check_pruned(loop.model, loop.click)
        return [parameter.detach() for parameter in loop.model.parameters()]

    first, second = in_processes(work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_export_and_packed_network(tmp_path: Path) -> None:
    loop = Loop(SETTINGS)
    with pytest.raises(
        UserError, match=r"stage: got 'plain'; allowed: a training that has chosen its masks. .* epoch 1"
    ):
        loop.click.prune_()
    loop.steps(5)
    with pytest.raises(UserError, match=r"model: got \d+ removed weights that are not zero"):
        loop.click.export(tmp_path)
    assert loop.click.lasso() > 0
    loop.click.prune_()
    check_pruned(loop.model, loop.click)
    loop.model.eval()
    loop.click.export(tmp_path)
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        for execution in ("sparse", "patterns"):
            assert torch.allclose(loop.click.packed(execution=execution)(x), loop.model(x), atol=1e-5)
        assert torch.allclose(load_packed(tmp_path, Loop(SETTINGS, seed=3).model.eval())(x), loop.model(x), atol=1e-5)
    for name, tensor in dense_weights(tmp_path).items():
        assert torch.equal(tensor, loop.model.state_dict()[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kernels": None}, "kernels: got None; allowed: percentages of kernels, or ratio in their place; one of them"),
        ({"ratio": 2.0}, "or ratio in their place; one of them"),
        ({"prune_from": 0}, r"prune_from: got 0; allowed: regularise_from \(1\) or later"),
        ({"kernels": 101.0}, "kernels: got 101.0; allowed: percentages from 0 to 100"),
        ({"kernels": {"2": -1.0}}, "kernels: got -1.0; allowed: percentages from 0 to 100"),
        ({"patterns": 13}, "patterns: got 13; allowed: 1 to 12, the fixed patterns"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_wrong_settings_are_named(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings(**{**SETTINGS.model_dump(), **change})


def test_wrong_layers_and_networks_are_named() -> None:
    with pytest.raises(UserError, match="layer: got '9'; allowed: 0, 2, 5, 7"):
        Loop(Settings(kernels={"9": 50}))
    with pytest.raises(UserError, match="steps_per_epoch: got 0"):
        ClickTrain(Loop(SETTINGS).model, Loop(SETTINGS).optimizer, SETTINGS, steps_per_epoch=0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 4, 3))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    assert list(ClickTrain(net, optimizer, SETTINGS, steps_per_epoch=1).layers) == ["2"]
    with pytest.raises(UserError, match=r"layer: got 1 \(depthwise: removing a kernel removes a channel"):
        ClickTrain(net, optimizer, Settings(kernels={"1": 50}), steps_per_epoch=1)
    with pytest.raises(UserError, match=r"name: got 'vgg12'; allowed: vgg11-10\.3x"):
        published_settings("vgg12", net)
    with pytest.raises(UserError, match=r"network: got 1 convolutions to prune; allowed: 7 for vgg11-8\.7x"):
        published_settings("vgg11-8.7x", net)
    with pytest.raises(UserError, match="kernels: got None; allowed: percentages of kernels: with ratio"):
        plan(net, Settings(ratio=2.0))
    click = ClickTrain(net, optimizer, Settings(regularise_from=0, prune_from=0, kernels=50), steps_per_epoch=1)
    with pytest.raises(UserError, match="layer: got 2, whose weight has no gradient"):
        click.before_step()


# Our own training ----------------------------------------------------------------------------------------------------

STAGES = Settings(regularise_from=2, prune_from=6, strength=4e-2, kernels=50, patterns=4)
RECIPE = Recipe(epochs=7, batch_size=16, lr=0.05, drops=(), weight_decay=0.0)


def hard_prune(training: PrunedTraining) -> tuple[float, float]:
    """Train to E2; return the accuracy right before and right after the hard step, which is then undone."""
    while training.position.epoch < training.settings.prune_from:
        training.epoch()
    before = training.scores()["accuracy"]
    kept = copy.deepcopy(training.network.state_dict())
    training.click.prune_()
    after = training.scores()["accuracy"]
    training.network.load_state_dict(kept)
    return before, after


def test_the_lasso_makes_the_hard_step_small_on_the_digits() -> None:
    drops = {}
    for strength in (0.0, STAGES.strength):
        settings = STAGES.model_copy(update={"strength": strength})
        training = PrunedTraining(small_network(1, seed=0, widths=(12, 16, 24, 24)), digits(), settings, RECIPE)
        before, after = hard_prune(training)
        drops[strength] = before - after
        assert before > 0.9
    assert drops[STAGES.strength] < 0.05
    assert drops[0.0] > 0.2


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_the_lasso_makes_the_hard_step_small_on_cifar10(seed: int) -> None:
    arrays = cifar10_arrays()
    images = {
        part: arrays[f"x_{part}"].reshape(-1, 3, 16, 2, 16, 2).mean((3, 5)).round().astype("uint8")
        for part in ("train", "test")
    }
    task = ImageClassification.from_arrays(
        images["train"],
        arrays["y_train"],
        x_valid=images["test"],
        y_valid=arrays["y_test"],
        x_test=images["test"],
        y_test=arrays["y_test"],
    )
    recipe = Recipe(epochs=9, batch_size=50, lr=0.05, drops=(), weight_decay=0.0)
    drops = {}
    for strength in (0.0, 4e-3):
        settings = Settings(regularise_from=3, prune_from=7, strength=strength, kernels=50, patterns=4)
        training = PrunedTraining(small_network(3, seed=seed), task, settings, recipe, seed=seed)
        before, after = hard_prune(training)
        drops[strength] = before - after
        training.epoch()
        training.epoch()
        end = training.scores()["accuracy"]
        print(f"strength {strength} seed {seed}: {before:.3f}, hard step {after:.3f}, end {end:.3f}")
        assert training.click.report()["ratio_pruned"] == 4.5
    assert drops[4e-3] < 0.05
    assert drops[0.0] > 0.2


def test_training_is_resumed_with_the_same_bits(tmp_path: Path) -> None:
    settings = Settings(regularise_from=1, prune_from=2, strength=4e-3, kernels=50)
    recipe = RECIPE.model_copy(update={"epochs": 3, "batch_size": 128})

    def network() -> nn.Module:
        return small_network(1, seed=0, widths=(4, 6, 6, 6))

    whole = train(network(), digits(), settings, recipe)

    class Stop(Exception):
        pass

    def stop(training: PrunedTraining) -> None:
        raise Stop

    with pytest.raises(Stop):
        train(network(), digits(), settings, recipe, folder=tmp_path, on_epoch=stop)
    resumed = train(network(), digits(), settings, recipe, folder=tmp_path)
    assert resumed.history == whole.history
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "pruned" / "patterns.json").is_file()
    with pytest.raises(UserError, match=r"folder: got .*; allowed: a new folder, or that of this very training"):
        train(network(), digits(), settings, recipe, seed=1, folder=tmp_path)
    (tmp_path / "training.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="allowed: a file that this function wrote"):
        train(network(), digits(), settings, recipe, folder=tmp_path)


KILLED = """
import os, signal, sys
from clicktrain_samples import digits, small_network
from archsmith.methods.clicktrain import Recipe, Settings, train

settings = Settings(regularise_from=1, prune_from=2, strength=4e-3, kernels=50)
recipe = Recipe(epochs=3, batch_size=128, lr=0.05, drops=(), weight_decay=0.0)

def kill(training):
    if training.position.epoch == 2:
        training.task.loss = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)  # in the first step of epoch 3

train(small_network(1, seed=0, widths=(4, 6)), digits(), settings, recipe, folder=sys.argv[1], on_epoch=kill)
"""


def test_a_killed_training_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    tests = Path(__file__).parents[1]
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    settings = Settings(regularise_from=1, prune_from=2, strength=4e-3, kernels=50)
    recipe = RECIPE.model_copy(update={"epochs": 3, "batch_size": 128})
    resumed = train(small_network(1, seed=5, widths=(4, 6)), digits(), settings, recipe, folder=tmp_path)
    whole = train(small_network(1, seed=0, widths=(4, 6)), digits(), settings, recipe)
    assert resumed.history == whole.history
    for a, b in zip(whole.network.parameters(), resumed.network.parameters(), strict=True):
        assert torch.equal(a, b)


def test_mixup_and_smoothing_are_switched(monkeypatch: pytest.MonkeyPatch) -> None:
    task, seen = digits(), []
    loss = type(task).loss

    def spy(self, *arguments):
        seen.append((self.augment.mixup, self.augment.label_smoothing))
        return loss(self, *arguments)

    monkeypatch.setattr(type(task), "loss", spy)
    settings = Settings(regularise_from=0, prune_from=1, kernels=50, label_smoothing=0.1)
    train(
        small_network(1, seed=0, widths=(4, 4)),
        task,
        settings,
        RECIPE.model_copy(update={"epochs": 2, "batch_size": 512}),
    )
    assert seen == [(0.0, 0.1)] * 2 + [(0.3, 0.1)] * 2
    assert task.augment.mixup == 0.0


def test_processes_train_alike() -> None:
    settings = Settings(regularise_from=0, prune_from=1, strength=4e-3, kernels=50)
    recipe = RECIPE.model_copy(update={"epochs": 2, "batch_size": 128})

    def work(workers: Workers) -> tuple[list[torch.Tensor], float]:
        training = PrunedTraining(
            small_network(1, seed=0, widths=(4, 6)), digits(), settings, recipe, compute=Compute(workers=workers)
        )
        training.epoch()
        training.epoch()
        return [p.detach() for p in training.network.parameters()], training.click.report()["ratio_pruned"]

    (first, ratio), (second, _) = in_processes(work)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and ratio == 4.5


def test_a_training_that_never_prunes_is_refused() -> None:
    with pytest.raises(UserError, match="prune_from: got 6; allowed: less than the 6 epochs of the recipe"):
        PrunedTraining(small_network(1, seed=0), digits(), STAGES, RECIPE.model_copy(update={"epochs": 6}))


def test_the_oracle_of_masks_through_the_method() -> None:
    case = CASES["masks_4patterns"]
    i = torch.arange(108, dtype=torch.float64)
    scores = importance(torch.sin(0.1 + 1.7 * i).view(4, 3, 3, 3), torch.cos(0.4 + 0.9 * i).view(4, 3, 3, 3))
    decision = choose({"a": scores}, Settings(kernels=55, patterns=4))
    assert decision.choices["a"].patterns is not None
    assert decision.choices["a"].patterns.tolist() == case["expected"]["best_pattern"]
    assert (~decision.choices["a"].kept).nonzero().tolist() == case["expected"]["pruned_kernels_out_in"]
