import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from archsmith.core.errors import UserError
from archsmith.cost import count
from archsmith.families.module_spaces import SPACES, published_module, training_hyperparameters
from archsmith.families.modules import ModuleFamily, family_from_json, open_family
from archsmith.run.constructor import call_of
from archsmith.run.export import export_network
from archsmith.run.onnx_file import missing_onnx_packages
from archsmith.space import Recording, Replay, Uniform, first_allowed
from archsmith.space.module_space import ModuleSpace
from archsmith.space.modules import (
    Affine,
    AvgPooling2D,
    BatchNormalization,
    Concat,
    Conv2D,
    MaxPooling2D,
    Optional,
    ReLU,
    Repeat,
    RepeatTied,
    Residual,
    Tanh,
)
from archsmith.space.trial import Architecture
from archsmith.testing.families import images, worn_

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "deeparchitect.json").read_text())["cases"]
SIZES = GOLDEN["number of models in the three published search spaces"]["expected"]


def opened(space="tfref_convnet", image=(3, 8, 8), **options):
    return open_family("deeparchitect", image=image, num_classes=10, space=space, **{"divisor": 8, **options})


@pytest.mark.parametrize("name", SPACES)
def test_sizes_are_the_published_ones_exactly(name):
    assert published_module(name, num_classes=10).size == SIZES[name]
    assert opened(name).space.size == SIZES[name]
    r = 17496
    chain = r + r**2 + r**4 + r**8
    closed = {"tfref_convnet": 2025, "deepconv": 18 * 432 * 18 * 432, "resnet": chain * (1 + 2 * chain)}
    assert SIZES[name] == closed[name]


def test_the_small_space_is_as_large_as_its_enumeration():
    space = opened().space
    assert len({each.network_digest for each in space.enumerate()}) == 2025


def test_training_hyperparameters_have_the_published_sizes_and_ends():
    assert training_hyperparameters("heavy").size == 4096
    assert training_hyperparameters("light").size == 128
    heavy = dict(training_hyperparameters("heavy").hyperparameters)
    assert (heavy["lr"][0], heavy["lr"][-1], len(heavy["lr"])) == (0.01, 1e-7, 32)
    assert (heavy["rate_mult"][0], heavy["rate_mult"][-1], len(heavy["rate_mult"])) == (0.01, 0.9, 8)
    assert heavy["rate_patience"] == tuple(range(4, 33, 4))
    family = opened(training="heavy")
    assert family.space.size == 2025 * 4096
    sample = family.space.sample(np.random.default_rng(0))
    assert set(family.space.published(sample)) == {"optimizer", "lr", "rate_mult", "rate_patience"}
    assert family.build(sample)(torch.randn(2, 3, 8, 8)).shape == (2, 10)


@pytest.mark.parametrize("name", SPACES)
def test_costs_are_counted_costs_and_the_ends_are_ends(name):
    family = opened(name, image=(3, 32, 32))
    low, high = family.exact_costs(family.smallest()), family.exact_costs(family.largest())
    rng = np.random.default_rng(1)
    for index in range(200):
        sample = family.space.sample(rng)
        costs = family.exact_costs(sample)
        for cost, value in costs.items():
            assert value <= high[cost]
            assert low[cost] <= value or (name == "resnet" and cost == "params")
        if index < 2:
            with torch.device("meta"):
                counted = count(family.build(sample), torch.zeros(1, 3, 32, 32))
            assert costs == {"macs": counted.macs, "params": counted.params}


@pytest.mark.parametrize("name", SPACES)
def test_replaying_a_history_rebuilds_the_network(name):
    family = opened(name)
    for seed in range(3):
        recording = Recording(Uniform(np.random.default_rng(seed)))
        first = family.space.walk(recording)
        history = {each.path: each.choice for each in recording.decisions}
        again = family.space.walk(Replay(history, first_allowed))
        one, two = (family.build(each, seed=5) for each in (first, again))
        assert family.space.tokens(first) == family.space.tokens(again)
        assert call_of(one) == call_of(two) and one.output_shape == two.output_shape == (10,)
        names, others = one.state_dict(), two.state_dict()
        assert list(names) == list(others)
        assert all(torch.equal(tensor, others[key]) for key, tensor in names.items())


def test_tied_copies_have_weights_of_their_own():
    module = Concat([RepeatTied(Conv2D([2, 3], [3]), [2]), Affine([4])])
    family = ModuleFamily(image=(2, 4, 4), num_classes=4, module=module)
    first, second = family.build({"0-RepeatTied/copy0/filters": 2}, seed=0).body[0]
    assert first.conv.weight.shape == second.conv.weight.shape
    assert not torch.equal(first.conv.weight, second.conv.weight)
    untied = ModuleFamily(
        image=(2, 4, 4), num_classes=4, module=Concat([Repeat(Conv2D([2, 3], [3]), [1, 2]), Affine([4])])
    )
    sample = untied.space.validate({"0-Repeat/times": 2, "0-Repeat/copy0/filters": 3, "0-Repeat/copy1/filters": 2})
    assert untied.architecture_of(untied.build(sample)) == sample


def test_equal_programs_give_the_first_decisions():
    module = Concat([Optional(ReLU()), Optional(ReLU()), Affine([2])])
    family = ModuleFamily(image=(1, 2, 2), num_classes=2, module=module)
    for sample in family.space.enumerate():
        assert family.architecture_of(family.build(sample)) == sample
    foreign = ModuleFamily(image=(1, 2, 2), num_classes=2, module=Concat([Tanh(), Affine([2])]))
    with pytest.raises(UserError, match="network: got one with another program; allowed: a network of the space mod"):
        family.architecture_of(foreign.build({}))


@pytest.mark.parametrize("name", SPACES)
def test_families_pickle_and_survive_json(name):
    family = opened(name, training="light")
    assert pickle.loads(pickle.dumps(family)) == family  # noqa: S301
    again = family_from_json(json.loads(json.dumps(family.to_json())))
    assert again == family and again.space.size == family.space.size
    sample = family.space.sample(np.random.default_rng(2))
    assert again.architecture_of(family.build(Architecture.from_json(sample.to_json()))) == sample


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"space": "vgg"}, "space: got 'vgg'; allowed: tfref_convnet or deepconv or resnet"),
        ({"divisor": 0}, "divisor: got 0; allowed: an integer from 1"),
        ({"divisor": 64}, r"divisor: got 64; allowed: one that keeps the widths \[32, 48, 64, 96, 128\] apart"),
        ({"training": "some"}, "training: got 'some'; allowed: none or light or heavy"),
    ],
)
def test_wrong_options_are_refused(options, text):
    with pytest.raises(UserError, match=text):
        opened(**options)
    with pytest.raises(UserError, match="family: got 'darts'; allowed: deeparchitect"):
        open_family("darts", image=(3, 8, 8), num_classes=10)


def test_uneven_windows_and_residuals_survive_export(tmp_path):
    # Even sides at stride 2: every window pads at the end only; the residual pads all axes and changes the rank.
    module = Concat(
        [
            Conv2D([4], [2], [2]),
            MaxPooling2D([3], [2]),
            AvgPooling2D([2], [1]),
            Residual(Conv2D([6], [3], [2])),
            BatchNormalization(),
            Residual(Affine([20])),
            BatchNormalization(),
            Affine([3]),
        ]
    )
    family = ModuleFamily(image=(2, 16, 12), num_classes=3, module=module)
    files = export_network(
        worn_(family.build({}, seed=0)),
        tmp_path / "result",
        family="deeparchitect",
        input_shape=family.image,
        normalisation={"mean": [0.0] * 2, "std": [1.0] * 2},
        class_names=["a", "b", "c"],
        examples=images(family),
        space={"name": family.space.name},
        decisions={},
        digest=family.largest().digest,
    )
    assert ("model.onnx" in files) == (not missing_onnx_packages())  # export_network compares both with the network


def test_an_expression_has_to_end_with_the_classes():
    with pytest.raises(UserError, match=r"outputs of shape \(4, 8, 8\); allowed: one that ends with 10 features"):
        ModuleFamily(image=(3, 8, 8), num_classes=10, module=Conv2D([4], [3]))
    assert isinstance(opened().space, ModuleSpace)
