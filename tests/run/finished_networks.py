"""Small trained-looking networks and their export, shared by the tests of export and verify."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from archsmith.layers.mobile import MobileNet
from archsmith.run.export import export_network
from archsmith.run.rebuild import execute_source

NORMALISATION = {"mean": [0.5], "std": [0.25]}
CLASSES = tuple(str(digit) for digit in range(10))


def mixed_network(seed: int = 0) -> MobileNet:
    """Every kind of block: without expansion, three kernels, dead, with residual; squeeze-and-excitation and swish."""
    blocks = (
        (8, 1, ((3, 8),), False),
        (12, 2, ((3, 6), (5, 4), (7, 2)), True),
        (12, 1, (), True),
        (12, 1, ((5, 3),), True),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _worn(MobileNet(1, 10, 8, 1, blocks, 16, squeeze_ratio=0.5, activation="swish"), seed)


def plain_network(seed: int = 0) -> MobileNet:
    """The plain variant: ReLU, no squeeze-and-excitation."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _worn(MobileNet(1, 10, 4, 2, ((4, 1, ((3, 4), (5, 2)), True),), 8), seed)


def examples(count: int = 6) -> Tensor:
    return torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(7))


def export(network: MobileNet, folder: Path, inputs: Tensor | None = None) -> dict[str, str]:
    return export_network(
        network,
        folder,
        family="mobile",
        input_shape=(1, 8, 8),
        normalisation=NORMALISATION,
        class_names=CLASSES,
        examples=examples() if inputs is None else inputs,
    )


def run_here(text: str, weights: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Do what ``run_fresh`` does, without the seconds that a fresh process takes to import torch."""
    network = execute_source(text, weights)
    with torch.no_grad():
        singles = {f"{name}/single": torch.cat([network(x) for x in batch.split(1)]) for name, batch in inputs.items()}
        return {name: network(batch) for name, batch in inputs.items()} | singles


def _worn(network: MobileNet, seed: int) -> MobileNet:
    """Give weights and statistics values that no initialisation gives."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in [*network.parameters(), *network.buffers()]:
        if tensor.is_floating_point():
            tensor.data += 0.2 * torch.rand(tensor.shape, generator=generator)
    return network
