"""The contract of a family: inherit ``FamilyContract`` in a test file and override the fixture ``family``.

A family turns points of its space into networks. The suite builds ``SAMPLES`` sampled architectures, and holds the
networks against what the family says of them: shapes, seeds, JSON, costs, and a finished result that stands alone.
Attach a family of small networks, the suite runs them.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from archsmith.cost import count
from archsmith.run.constructor import build, call_of
from archsmith.run.export import export_network
from archsmith.run.onnx_file import missing_onnx_packages
from archsmith.space import Architecture

SAMPLES = 3
COSTS = ("macs", "params")


class FamilyContract:
    """Laws of a family (see ``archsmith.families.mobile.MobileFamily`` for its methods); override ``family``."""

    @pytest.fixture
    def family(self) -> Any:
        """Return the family under test, with small networks."""
        raise NotImplementedError("override the fixture 'family'")

    def predicted_costs(self, family: Any, architecture: Architecture) -> Mapping[str, int]:
        """Return "macs" and "params" as the family predicts them without building this network; {} predicts nothing."""
        return family.exact_costs(architecture)

    @pytest.fixture
    def samples(self, family: Any) -> list[Architecture]:
        """Return sampled architectures, one per seed, and the two ends of the family."""
        drawn = [family.space.sample(np.random.default_rng(seed)) for seed in range(SAMPLES)]
        return [*drawn, family.smallest(), family.largest()]

    def test_the_ends_belong_to_the_space(self, family: Any) -> None:
        """``largest`` and ``smallest`` are valid architectures."""
        assert family.space.contains(family.largest())
        assert family.space.contains(family.smallest())

    def test_networks_run_and_train(self, family: Any, samples: list[Architecture]) -> None:
        """Every network gives logits for each example, one for each class, and every parameter gets a finite gradient.

        Networks for sequences have an axis of time between the two.
        """
        for sample in samples:
            network = family.build(sample, seed=0).train()
            logits = network(images(family))
            assert (len(logits), logits.shape[-1]) == (4, family.num_classes)
            logits.square().sum().backward()
            for name, parameter in network.named_parameters():
                assert parameter.grad is not None, name
                assert bool(parameter.grad.isfinite().all()), name

    def test_an_image_does_not_depend_on_its_batch(self, family: Any, samples: list[Architecture]) -> None:
        """In evaluation mode the logits of an image are the same alone and in company."""
        batch = images(family)
        for sample in samples:
            network = family.build(sample, seed=0).eval()
            with torch.no_grad():
                alone = torch.cat([network(image) for image in batch.split(1)])
                torch.testing.assert_close(network(batch), alone, rtol=1e-5, atol=1e-5)

    def test_the_seed_decides_the_weights(self, family: Any) -> None:
        """Same seed, same weights; another seed, other weights."""
        first, again, other = (family.build(family.largest(), seed=seed).state_dict() for seed in (1, 1, 2))
        assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
        assert any(not torch.equal(tensor, other[name]) for name, tensor in first.items())

    def test_architectures_come_back(self, family: Any, samples: list[Architecture]) -> None:
        """An architecture survives JSON and the way through its network; the rebuilt network is the same function."""
        for sample in samples:
            network = family.build(sample, seed=0)
            assert family.architecture_of(network) == sample
            again = family.build(Architecture.from_json(json.dumps(sample.to_json())), seed=0)
            assert call_of(again) == call_of(network)
            self._same_function(build(call_of(network)), network, images(family))

    def test_the_family_comes_back(self, family: Any) -> None:
        """``family_from_json`` of its module restores what ``to_json`` wrote."""
        restore = importlib.import_module(type(family).__module__).family_from_json
        assert restore(json.loads(json.dumps(family.to_json()))) == family

    def test_predicted_costs_are_counted_costs(self, family: Any, samples: list[Architecture]) -> None:
        """Predicted MACs and parameters are exactly those of the built network, and lie between the family's ends."""
        low, high = (measured_costs(family, end) for end in (family.smallest(), family.largest()))
        for sample in samples:
            counted = measured_costs(family, sample)
            predicted = self.predicted_costs(family, sample)
            for cost in COSTS:
                assert predicted.get(cost, counted[cost]) == counted[cost]
                assert low[cost] <= counted[cost] <= high[cost]

    def test_results_stand_alone(self, family: Any, samples: list[Architecture], tmp_path: Path) -> None:
        """``model.py`` in a fresh process, and ONNX where its extra is installed, equal the network.

        ``export_network`` compares both with the network and raises when one differs.
        """
        network = worn_(family.build(samples[0], seed=0))
        channels = family.image[0]
        files = export_network(
            network,
            tmp_path / "result",
            family=family.to_json()["name"],
            input_shape=family.image,
            normalisation={"mean": [0.0] * channels, "std": [1.0] * channels},
            class_names=[str(number) for number in range(family.num_classes)],
            examples=images(family),
            space={"name": family.space.name},
            decisions=dict(samples[0]),
            digest=samples[0].digest,
        )
        assert {"architecture.json", "model.py", "weights.safetensors"} <= set(files)
        assert ("model.onnx" in files) == (not missing_onnx_packages())

    @staticmethod
    def _same_function(rebuilt: nn.Module, network: nn.Module, batch: Tensor) -> None:
        rebuilt.load_state_dict(network.state_dict())
        with torch.no_grad():
            assert torch.equal(rebuilt.eval()(batch), network.eval()(batch))


def images(family: Any, count: int = 4) -> Tensor:
    """Return ``count`` random images for a family, always the same ones; its own ``examples`` where it has some."""
    if hasattr(family, "examples"):
        drawn: Tensor = family.examples(count)
        return drawn
    return torch.randn(count, *family.image, generator=torch.Generator().manual_seed(0))


def measured_costs(family: Any, architecture: Architecture) -> dict[str, int]:
    """Return "macs" and "params" counted on the built network; nothing is computed."""
    with torch.device("meta"):
        counted = count(family.build(architecture), torch.zeros(1, *family.image))
    return {"macs": counted.macs, "params": counted.params}


def worn_(network: nn.Module) -> nn.Module:
    """Give all parameters and statistics values as after training, so that no layer is an identity by chance."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*network.parameters(), *network.buffers()]:
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return network
