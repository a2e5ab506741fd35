"""Weights of a plain network, layer by layer, that grow with it and keep its function.

Source: Cai et al. 2018, arXiv 1707.04873; Chen et al., "Net2Net", arXiv 1511.05641.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Generator, Tensor

from archsmith.atoms.morphisms import (
    Copies,
    divided,
    identity_conv,
    identity_linear,
    identity_norm,
    repeated,
    repeated_norm,
)
from archsmith.core.errors import Shown, UserError

Tensors = dict[str, Tensor]


def tensors_below(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors whose names begin with ``prefix`` and a dot, without these."""
    return {name[len(prefix) + 1 :]: value for name, value in tensors.items() if name.startswith(f"{prefix}.")}


def tensors_under(prefix: str, tensors: Mapping[str, Tensor]) -> Tensors:
    """Return the tensors with ``prefix`` and a dot before their names."""
    return {f"{prefix}.{name}": value for name, value in tensors.items()}


class PlainWeights:
    """The ``state_dict`` of an ``archsmith.layers.plain.PlainNetwork``, by block and layer.

    Args:
        tensors: The ``state_dict``; read only.

    Attributes:
        blocks: By block, the tensors of each layer ("linear.weight", "norm.weight", ...); linear layers last.
        classifier: "weight" and "bias".

    Raises:
        UserError: The tensors are no plain network's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.blocks: list[list[Tensors]] = []
        while block := tensors_below(f"blocks.{len(self.blocks)}", tensors):
            layers: list[Tensors] = []
            while layer := tensors_below(str(len(layers)), block):
                layers.append(layer)
            self.blocks.append(layers)
        self.classifier = tensors_below("classifier", tensors)
        if not self.blocks or not self.classifier:
            raise UserError(
                "weights", Shown(f"tensors named {sorted(tensors)[:4]}"), allowed="the state_dict of a PlainNetwork"
            )

    def state_dict(self) -> Tensors:
        """Return the tensors by the names they have in the network that they belong to now."""
        found: Tensors = {}
        for number, block in enumerate(self.blocks):
            for at, layer in enumerate(block):
                found |= tensors_under(f"blocks.{number}.{at}", layer)
        return found | tensors_under("classifier", self.classifier)

    def widen_(
        self, block: int, layer: int, copies: Copies, *, noise: float = 0.0, generator: Generator | None = None
    ) -> None:
        """Repeat the units of a layer and divide what the next one reads; pools and the global average pass it on.

        Args:
            block: Number of the block.
            layer: Number of the layer in it.
            copies: Which units are repeated.
            noise: Size of the noise on repeated units, see ``repeated``.
            generator: Source of the noise.
        """
        own = self.blocks[block][layer]
        own["linear.weight"] = repeated(own["linear.weight"], copies, noise=noise, generator=generator)
        own |= tensors_under("norm", repeated_norm(tensors_below("norm", own), copies))
        name, reader = self._reader(block, layer)
        reader[name] = divided(reader[name], copies)

    def _reader(self, block: int, layer: int) -> tuple[str, Tensors]:
        following = [*self.blocks[block][layer + 1 :], *(each for rows in self.blocks[block + 1 :] for each in rows)]
        return ("linear.weight", following[0]) if following else ("weight", self.classifier)

    def deepen_(
        self,
        block: int,
        layer: int,
        kernel: int | None,
        statistics: tuple[Tensor, Tensor],
        *,
        eps: float,
        noise: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        """Put an identity behind a layer.

        Args:
            block: Number of the block.
            layer: Number of the layer in it.
            kernel: Kernel size of the new convolution; None for a linear layer.
            statistics: Mean and biased variance of each output of the layer (``channel_statistics``).
            eps: Epsilon of the normalisations.
            noise: Size of the noise on the new weights, see ``identity_conv``.
            generator: Source of the noise.
        """
        before = self.blocks[block][layer]["linear.weight"]
        counter = {"norm.num_batches_tracked": self.blocks[block][layer]["norm.num_batches_tracked"].clone()}
        if kernel is None:
            weight = identity_linear(len(before), noise=noise, generator=generator, dtype=before.dtype)
        else:
            weight = identity_conv(len(before), kernel, noise=noise, generator=generator, dtype=before.dtype)
        norm = tensors_under("norm", identity_norm(*statistics, eps=eps))
        self.blocks[block].insert(layer + 1, {"linear.weight": weight, **norm, **counter})
