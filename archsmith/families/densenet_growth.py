"""Weights of a DenseNet, miniblock by miniblock, that grow with it and keep its function.

What a miniblock puts out is read by all that comes later in its block, through normalisations of their own. So every
later miniblock, and the transition (or the end of the network), sees each mapping as a part of a concatenation.

Source: Cai et al. 2018, arXiv 1707.04873.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Generator, Tensor

from archsmith.atoms.morphisms import (
    Copies,
    divided,
    joined,
    neutral_norm,
    repeated,
    repeated_norm,
    unchanged,
    with_noise,
    without_inputs,
)
from archsmith.core.errors import Shown, UserError
from archsmith.families.plain_growth import Tensors, tensors_below, tensors_under


class DenseWeights:
    """The ``state_dict`` of an ``archsmith.layers.densenet.DenseNetwork``, by block and miniblock.

    Args:
        tensors: The ``state_dict``; read only.

    Attributes:
        blocks: By block, the tensors of each miniblock ("conv1.weight", "norm1.weight", ...).
        ends: Behind each block, what reads it: the transitions ("norm", "conv"), and for the last block the last
            normalisation and the classifier.

    Raises:
        UserError: The tensors are no DenseNet's.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self.blocks: list[list[Tensors]] = []
        self.ends: list[Tensors] = []
        while block := tensors_below(f"blocks.{len(self.blocks)}", tensors):
            layers: list[Tensors] = []
            while layer := tensors_below(str(len(layers)), block):
                layers.append(layer)
            self.blocks.append(layers)
        while transition := tensors_below(f"transitions.{len(self.ends)}", tensors):
            self.ends.append(transition)
        self.stem = tensors_below("stem", tensors)
        last = tensors_under("norm", tensors_below("norm", tensors))
        self.ends.append(last | tensors_under("classifier", tensors_below("classifier", tensors)))
        if not self.blocks or not self.stem or len(self.ends) != len(self.blocks):
            raise UserError(
                "weights", Shown(f"tensors named {sorted(tensors)[:4]}"), allowed="the state_dict of a DenseNetwork"
            )

    def state_dict(self) -> Tensors:
        """Return the tensors by the names they have in the network that they belong to now."""
        found = tensors_under("stem", self.stem) | self.ends[-1]
        for number, block in enumerate(self.blocks):
            for at, miniblock in enumerate(block):
                found |= tensors_under(f"blocks.{number}.{at}", miniblock)
        for number, transition in enumerate(self.ends[:-1]):
            found |= tensors_under(f"transitions.{number}", transition)
        return found

    def widths(self, block: int) -> list[int]:
        """Return the channels of the parts that are concatenated in a block: its input, then each miniblock's."""
        entering = self.stem["weight"] if block == 0 else self.ends[block - 1]["conv.weight"]
        return [len(entering), *(len(miniblock["conv2.weight"]) for miniblock in self.blocks[block])]

    def widen_(
        self,
        block: int,
        miniblock: int,
        bottleneck: Copies,
        growth: Copies,
        *,
        noise: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        """Repeat channels inside a miniblock and of its output, for all that reads it.

        Args:
            block: Number of the block.
            miniblock: Number of the miniblock in it.
            bottleneck: Which channels between its convolutions are repeated.
            growth: Which channels of its output are repeated.
            noise: Size of the noise on repeated channels, see ``repeated``.
            generator: Source of the noise.
        """
        own = self.blocks[block][miniblock]
        own["conv1.weight"] = repeated(own["conv1.weight"], bottleneck, noise=noise, generator=generator)
        own |= tensors_under("norm2", repeated_norm(tensors_below("norm2", own), bottleneck))
        inner = divided(own["conv2.weight"], bottleneck)
        widths = self.widths(block)
        own["conv2.weight"] = repeated(inner, growth, noise=noise, generator=generator)
        self._tell(block, miniblock + 1, widths, growth)

    def insert_(
        self,
        block: int,
        miniblock: int,
        source: Tensor,
        *,
        noise: float = 0.0,
        generator: Generator | None = None,
    ) -> None:
        """Put a copy of a miniblock behind it, whose outputs are copies of the old one's, in any order.

        The copy does not read what the old one puts out, which is new to it: with zeros for weights and a neutral
        normalisation.

        Args:
            block: Number of the block.
            miniblock: Number of the miniblock in it.
            source: Which output of the old one each output of the new one copies; int64 of shape (growth,).
            noise: Size of the noise on the copy's weights, in standard deviations of theirs.
            generator: Source of the noise.

        Raises:
            UserError: Not one source for each output.
        """
        old = self.blocks[block][miniblock]
        growth = len(old["conv2.weight"])
        if source.shape != (growth,):
            raise UserError("source", source.tolist(), allowed=f"{growth} outputs of the old miniblock")
        new = {name: value.clone() for name, value in old.items()}
        new |= tensors_under("norm1", neutral_norm(tensors_below("norm1", old), growth))
        new["conv1.weight"] = with_noise(without_inputs(old["conv1.weight"], growth), noise, generator=generator)
        new["conv2.weight"] = with_noise(old["conv2.weight"][source], noise, generator=generator)
        both = Copies(torch.cat([torch.arange(growth), source]), growth)
        self._tell(block, miniblock + 1, self.widths(block), both)
        self.blocks[block].insert(miniblock + 1, new)

    def widen_stem_(self, copies: Copies, *, noise: float = 0.0, generator: Generator | None = None) -> None:
        """Repeat channels of the stem, for all of the first block that reads it."""
        widths = self.widths(0)
        self.stem["weight"] = repeated(self.stem["weight"], copies, noise=noise, generator=generator)
        self._tell(0, 0, widths, copies)

    def widen_transition_(
        self, block: int, copies: Copies, *, noise: float = 0.0, generator: Generator | None = None
    ) -> None:
        """Repeat channels of the transition behind ``block``, for all of the next block that reads it."""
        own, widths = self.ends[block], self.widths(block + 1)
        own["conv.weight"] = repeated(own["conv.weight"], copies, noise=noise, generator=generator)
        self._tell(block + 1, 0, widths, copies)

    def _tell(self, block: int, part: int, widths: list[int], copies: Copies) -> None:
        """Change what reads one part of a block's concatenation: later miniblocks, and the block's end.

        Args:
            block: Number of the block.
            part: 0 for the input of the block, i + 1 for its miniblock i.
            widths: Channels of all parts before the change.
            copies: What happens to the part.
        """
        for reader, prefixes, parts in self._readers(block, part):
            seen = joined([copies if i == part else unchanged(width) for i, width in enumerate(widths[:parts])])
            norm, weight = prefixes
            reader |= tensors_under(norm, repeated_norm(tensors_below(norm, reader), seen))
            reader[weight] = divided(reader[weight], seen)

    def _readers(self, block: int, part: int) -> Iterator[tuple[Tensors, tuple[str, str], int]]:
        """Yield who reads a part: its tensors, the names of its normalisation and weight, the parts that it sees."""
        for at in range(part, len(self.blocks[block])):
            yield self.blocks[block][at], ("norm1", "conv1.weight"), at + 1
        last = block == len(self.blocks) - 1
        yield self.ends[block], ("norm", "classifier.weight" if last else "conv.weight"), len(self.blocks[block]) + 1
