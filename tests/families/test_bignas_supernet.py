"""The supernet: children are its slices; extraction, gradients and calibration."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.bignas import bignas_family
from archsmith.families.bignas_supernet import parts_of
from archsmith.layers.bignas import InvertedResidual
from archsmith.supernet import Supernet
from archsmith.supernet.elastic_slices import Slices
from archsmith.testing.families import images, worn_
from archsmith.train.calibration import calibrate_
from archsmith.train.children import train_mode_

GOLDEN = {
    case["name"]: case
    for case in json.loads((Path(__file__).parent.parent / "golden" / "bignas.json").read_text())["cases"]
}
BLOCKS = [name for name in GOLDEN if name.startswith("elastic-mbconv-")]


@pytest.fixture(params=["plain", "mixed"])
def family(request):
    """A small family with odd sides; "mixed" has the head of AttentiveNAS and equal widths in neighbouring stages."""
    own = {}
    if request.param == "mixed":
        stages = (((8, 16), (1, 2), (3, 5), (1,), 1, False), ((8, 16), (1, 3), (3, 5), (2, 4), 2, True))
        own = {"last_expansion": 3, "stages": stages}
    return bignas_family("tiny", image=(3, 9, 12), num_classes=5, **own)


def children(family, count=4):
    drawn = [family.space.sample(np.random.default_rng(seed)) for seed in range(count)]
    return [family.largest(), family.smallest(), *drawn]


def worn_supernet(family, dtype=torch.float32):
    return worn_(family.supernet(seed=0)).to(dtype)


def test_it_is_a_supernet(family):
    assert isinstance(family.supernet(), Supernet)


@pytest.mark.parametrize("training", [False, True])
def test_a_child_alone_computes_what_it_computes_inside(family, training):
    """The extracted network has the slices as weights of its own: equal to 1e-12 in float64."""
    supernet, batch = worn_supernet(family, torch.float64), images(family).double()
    train_mode_(supernet, regularised=False) if training else supernet.eval()
    supernet.activate(family.smallest())
    for child in children(family):
        alone = supernet.extract(child)
        assert supernet.active == family.smallest()
        train_mode_(alone, regularised=False) if training else alone.eval()
        assert family.architecture_of(alone) == child
        supernet.activate(child)
        torch.testing.assert_close(alone(batch), supernet(batch), rtol=0, atol=1e-12)
        supernet.activate(family.smallest())


def test_a_calibrated_child_is_the_calibrated_network(family):
    """Check 6 of the published system: statistics inside and outside, float32, 1e-5."""
    supernet, batches = worn_supernet(family), [images(family, 8), images(family, 6)]
    for child in children(family):
        alone = calibrate_(supernet.extract(child), batches)
        supernet.activate(child)
        calibrate_(supernet, batches)
        assert (alone(batches[0]) - supernet(batches[0])).abs().max() < 1e-5


def test_statistics_of_one_child_are_not_those_of_another(family):
    supernet, batches = worn_supernet(family), [images(family, 8)]
    small, large = family.smallest(), family.largest()
    supernet.activate(small)
    own = calibrate_(supernet, batches)(batches[0])
    supernet.activate(large)
    calibrate_(supernet, batches)
    supernet.activate(small)
    assert (supernet(batches[0]) - own).abs().max() > 1e-3


def test_training_leaves_no_statistics(family):
    supernet = worn_supernet(family).train()
    before = {name: buffer.clone() for name, buffer in supernet.named_buffers() if buffer.is_floating_point()}
    supernet(images(family))
    assert all(torch.equal(dict(supernet.named_buffers())[name], buffer) for name, buffer in before.items())


def test_the_largest_child_is_the_whole_network(family):
    supernet, batch = worn_supernet(family).eval(), images(family)
    supernet.activate(family.largest())
    assert torch.equal(supernet(batch), supernet.network(batch))


def test_what_is_not_active_gets_no_gradient(family):
    supernet = worn_supernet(family).train()
    supernet.activate(family.smallest())
    supernet(images(family)).square().sum().backward()
    touched = {name: tuple(tensor.shape) for name, tensor in supernet.extract(family.smallest()).named_parameters()}
    for name, parameter in supernet.network.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        inside = torch.zeros_like(parameter, dtype=torch.bool)
        if name in touched:
            shape = touched[name]
            margins = [(have - want) // 2 for have, want in zip(parameter.shape[2:], shape[2:], strict=True)]
            corner = tuple(slice(0, n) for n in shape[:2])
            centre = tuple(slice(m, m + n) for m, n in zip(margins, shape[2:], strict=True))
            inside[corner + centre] = True
        assert not gradient[~inside].any(), name


def test_depths_of_a_fresh_supernet_agree_where_shortcuts_are_identities(family):
    """At the start blocks are their shortcuts, so blocks behind a stage's first add nothing."""
    supernet, batch = family.supernet(seed=1).eval(), images(family)
    supernet.activate(family.largest())
    logits = supernet(batch)
    depths = {path: family.space.dimension(path).options[0] for path in family.space.paths if path.endswith("depth")}
    supernet.activate(family.space.validate({**family.largest(), **depths}))
    assert torch.equal(supernet(batch), logits)


def test_other_architectures_are_refused(family):
    supernet = family.supernet()
    with pytest.raises(UserError, match="mb1/width"):
        supernet.activate({**family.largest(), "mb1/width": 999})
    assert supernet.active == family.largest()


def closed_form_(body):
    """Give the largest layer of the published cases its weights."""
    with torch.no_grad():
        for module in body.modules():
            if isinstance(module, nn.Conv2d):
                indices = torch.arange(module.weight.numel(), dtype=torch.float64)
                module.weight.copy_((0.2 * torch.sin(0.37 * indices + 0.5)).reshape(module.weight.shape))
                if module.bias is not None:
                    module.bias.copy_(0.1 * torch.cos(torch.arange(len(module.bias), dtype=torch.float64)))
    return body.eval()


@pytest.mark.parametrize("name", BLOCKS)
def test_sliced_blocks_are_as_published(name):
    """Check 3: the supernet's own parts on the largest block; the block alone agrees to 1e-12 (above)."""
    given, expected = GOLDEN[name]["input"], GOLDEN[name]["expected"]
    active = given["active"]
    row = ((8, given["max_out"]), (1,), tuple(given["kernels"]), tuple(given["expands"]), given["stride"], True)
    stem = tuple(sorted({8, given["max_in"]}))
    own = {"stem_widths": stem, "stages": (row,), "resolutions": (9,)}
    family = bignas_family("tiny", image=(3, 9, 9), num_classes=2, **own)
    values = {
        "stem/width": active["cin"],
        "mb1/width": active["cout"],
        "mb1/kernel": active["kernel"],
        "mb1/expansion": active["expand"],
    }
    space = family.space
    supernet = family.supernet().double()
    body = supernet.network.stages[0][0].body
    assert isinstance(body, InvertedResidual)
    closed_form_(body)
    supernet.activate(space.validate({path: values.get(path, family.smallest()[path]) for path in space.paths}))
    shape = (2, given["max_in"], 9, 9)
    x = torch.cos(0.11 * torch.arange(math.prod(shape), dtype=torch.float64)).reshape(shape)[:, : active["cin"]]
    with torch.no_grad(), supernet.slices.active():
        y = body(x)
        params = sum(tensor.numel() for tensor in body.parameters())
    assert list(y.shape) == expected["shape"]
    assert params == expected["params"]
    found = {"sum": y.sum(), "abs_sum": y.abs().sum(), "first": y.flatten()[0], "last": y.flatten()[-1]}
    for key, value in found.items():
        assert float(value) == pytest.approx(expected[key], abs=1e-6)


def test_every_tensor_that_shrinks_has_a_part():
    """Whatever is smaller in the smallest network than in the largest one follows some size."""
    family = bignas_family("attentivenas", image=(3, 224, 224), num_classes=10)
    with torch.device("meta"):
        largest, smallest = family.build(family.largest(), idle=True), family.build(family.smallest(), idle=True)
    cut = {part.tensor for part in parts_of(largest) if hasattr(part, "tensor")}
    shapes = dict(largest.named_parameters())
    shrunk = {name for name, tensor in smallest.named_parameters() if tensor.shape != shapes[name].shape}
    assert shrunk <= cut
    assert isinstance(Slices(largest, list(parts_of(largest))), Slices)


def test_calibration_averages_the_unbiased_variances_of_the_batches():
    """Check 5: every batch counts the same."""
    case = GOLDEN["bn-calibration-cumulative"]["expected"]
    norm = nn.BatchNorm2d(2).double()
    batches = [torch.tensor([[[[b + 1, 2], [3, 4]], [[0, b], [1, -1]]]], dtype=torch.float64) for b in range(3)]
    calibrate_(norm, batches)
    assert norm.running_mean.tolist() == pytest.approx(case["running_mean"], abs=1e-9)
    assert norm.running_var.tolist() == pytest.approx(case["running_var"], abs=1e-9)
