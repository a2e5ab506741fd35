"""Heterogeneous text encoders with a classifier: how points of the space become networks, and pass on weights.

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise, product
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import Shown, UserError
from archsmith.families.flexibert_graph import leading_overlap
from archsmith.families.flexibert_space import FlexiSpace, Layer, encoder_params, layer_params, split_operator
from archsmith.layers.flexibert import FlexiClassifier
from archsmith.space import Architecture, ProductSpace

FAMILIES = (
    {
        "name": "flexibert",
        "title": "text encoders whose layers differ in operator, width, heads and feed-forward layers",
        "task": "text",
    },
)


@dataclass(frozen=True, kw_only=True)
class FlexiBertFamily:
    """Heterogeneous encoders for sequences of one length.

    Attributes:
        image: Shape of one example, (positions,) or (1, 1, positions); its values are token numbers, 0 is padding.
        num_classes: Number of classes.
        vocabulary: Number of tokens.
        settings: What may be chosen.
        embedding: Features of the embeddings.
        dropout: Of all layers.
        transform_output: Whether linear transforms have an output projection, a residual and a normalisation, as the
            paper's graphs do; the encoders that were published as trained have none.
        pooling: "mean" or "first".

    Raises:
        UserError: A size is out of its range.
    """

    image: tuple[int, ...]
    num_classes: int
    vocabulary: int = 30_522
    settings: FlexiSpace = field(default_factory=FlexiSpace)
    embedding: int = 128
    dropout: float = 0.1
    transform_output: bool = False
    pooling: str = "mean"

    def __post_init__(self) -> None:
        if set(self.image[:-1]) - {1} or self.positions < 1:
            raise UserError("image", self.image, allowed="(positions,) or (1, 1, positions), at least one position")
        for name, least in (("num_classes", 2), ("vocabulary", 2), ("embedding", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"family.{name}", value, allowed=f"an integer of at least {least}")
        if not 0 <= self.dropout < 1:
            raise UserError("family.dropout", self.dropout, allowed="0 or more, below 1")
        if self.pooling not in ("mean", "first"):
            raise UserError("family.pooling", self.pooling, allowed="'mean' or 'first'")

    @property
    def positions(self) -> int:
        """Longest sequence."""
        return prod(self.image)

    @property
    def space(self) -> ProductSpace:
        """The space of the settings."""
        return self.settings.space()

    def examples(self, count: int) -> Tensor:
        """Return random sequences (count, 1, 1, positions) for checks: tokens that its networks take."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(1, self.vocabulary, (count, *self.image), generator=generator).float()

    def largest(self) -> Architecture:
        """Return the deepest encoder of the layer with most parameters."""
        return self._uniform(max(self.settings.depths), max(self._layers(), key=self._size))

    def smallest(self) -> Architecture:
        """Return the shallowest encoder of the layer with fewest parameters."""
        return self._uniform(min(self.settings.depths), min(self._layers(), key=self._size))

    def _layers(self) -> list[Layer]:
        s = self.settings
        choices = product(s.operators, s.hidden, s.heads, s.sizes, s.counts)
        return [Layer(*split_operator(o), h, n, (f,) * count) for o, h, n, f, count in choices]

    def _size(self, layer: Layer) -> int:
        return layer_params(layer, transform_output=self.transform_output)

    def _uniform(self, depth: int, layer: Layer) -> Architecture:
        return self.settings.architecture([layer] * depth)

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> FlexiClassifier:
        """Return the network of a point of the space, matrices normal with deviation 0.02 as in BERT.

        Args:
            architecture: Decisions by path.
            seed: Seed of the initialisation; None leaves torch's own, for weights loaded next.
        """
        network = FlexiClassifier(
            self.vocabulary,
            self.positions,
            self.embedding,
            self.settings.layers(architecture),
            self.num_classes,
            self.dropout,
            self.transform_output,
            self.pooling,
        )
        if seed is not None:
            initialise_(network, torch.Generator().manual_seed(seed))
        return network

    def architecture_of(self, network: FlexiClassifier) -> Architecture:
        """Return the point of the space that ``network`` is."""
        return self.settings.architecture([Layer(*row) for row in network.encoder.plan])

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` (one example of full length) and ``params`` in closed form; nothing is built.

        Fourier and cosine transforms have no multiply-accumulates in the standard convention.
        """
        layers, positions = self.settings.layers(architecture), self.positions
        params = encoder_params(
            layers,
            vocabulary=self.vocabulary,
            positions=positions,
            embedding=self.embedding,
            transform_output=self.transform_output,
        )
        width, macs = self.embedding, 0
        for layer in layers:
            macs += positions * width * layer.hidden if width != layer.hidden else 0
            width = layer.hidden
            macs += layer_macs(layer, positions, transform_output=self.transform_output)
        head = width * width + width * self.num_classes
        return {"macs": macs + head, "params": params + head + width + self.num_classes}

    def overlap(self, child: Mapping[str, Any], parent: Mapping[str, Any]) -> float:
        """Return which share of the layers is the same from the front, see ``leading_overlap``."""
        return leading_overlap(self.settings.layers(child), self.settings.layers(parent))

    def inherit(
        self,
        weights: Mapping[str, Tensor],
        parent: Mapping[str, Any],
        child: Mapping[str, Any],
        *,
        edits: Sequence[tuple[Any, ...]] | None = None,
        examples: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> dict[str, Tensor]:
        """Return the weights of a network that takes over all it has in common with a trained one.

        Embeddings, and the leading layers that are equal, with the projections before them, are copied; the head is,
        where the last hidden size is equal. All else is drawn anew.

        Args:
            weights: The parent's ``state_dict``.
            parent: Its architecture.
            child: The other network's.
            edits: None: nothing but the leading layers decides what passes on.
            examples: Not used.
            generator: Source of what is drawn; seeded with 0 if None.

        Raises:
            UserError: The weights are not the parent's.
        """
        before, after = self.settings.layers(parent), self.settings.layers(child)
        same = round(leading_overlap(before, after) * max(len(before), len(after)))
        heads = ("pooler.", "classifier.") if before[-1].hidden == after[-1].hidden else ()
        starts = ("encoder.embeddings.", *heads)
        starts += tuple(f"encoder.{part}.{i}." for i in range(same) for part in ("layers", "projections"))
        if edits is not None:
            raise UserError("edits", edits, allowed="None, for the family flexibert")
        network = self.build(child)
        initialise_(network, torch.Generator().manual_seed(0) if generator is None else generator)
        found = network.state_dict()
        for name, tensor in found.items():
            if name.startswith(starts):
                if name not in weights or weights[name].shape != tensor.shape:
                    raise UserError(
                        "weights",
                        Shown(f"tensors without a {name} of shape {tuple(tensor.shape)}"),
                        allowed="the state_dict of the parent's network",
                    )
                found[name] = weights[name].detach().clone()
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name != "settings"}
        return {"name": "flexibert", **own, "image": list(self.image), "settings": asdict(self.settings)}


def layer_macs(layer: Layer, positions: int, *, transform_output: bool = False) -> int:
    """Return the multiply-accumulates of one layer for one sequence: linear layers, attention and convolutions."""
    h, n, t = layer.hidden, layer.heads, positions
    if layer.operation == "l":
        found, mixed = t * h * h, h
    elif layer.operation == "sa":
        found, mixed = t * h * h * (4 if layer.parameter == "wma" else 3) + 2 * t * t * h, h
    else:
        heads, kernel = max(1, n // 2), int(layer.parameter)
        own = heads * (h // n)
        found = 5 * t * h * own + t * h * kernel + t * own * heads * kernel + t * own * kernel + 2 * t * t * own
        mixed = 2 * own
    if layer.operation != "l" or transform_output:
        found += t * mixed * h
    sizes = (h, *layer.sizes, h)
    return found + t * sum(a * b for a, b in pairwise(sizes))


def initialise_(network: nn.Module, generator: torch.Generator) -> None:
    """Draw matrices from a normal distribution of deviation 0.02, as BERT does; biases are zeros."""
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Embedding | nn.Conv1d):
            with torch.no_grad():
                module.weight.normal_(0.0, 0.02, generator=generator)
                if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                    module.weight[module.padding_idx] = 0.0
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()  # type: ignore[union-attr, operator]


def family_from_json(data: Mapping[str, Any]) -> FlexiBertFamily:
    """Return the family that ``FlexiBertFamily.to_json`` described."""
    own = {key: value for key, value in data.items() if key not in ("name", "image", "settings")}
    return FlexiBertFamily(image=tuple(data["image"]), settings=FlexiSpace(**data["settings"]), **own)


def open_family(name: str, *, image: tuple[int, ...], num_classes: int, **settings: Any) -> FlexiBertFamily:
    """Return the family called ``name`` for a task's sequences.

    Args:
        name: "flexibert".
        image: (positions,) or (1, 1, positions).
        num_classes: Number of classes.
        settings: Attributes of ``FlexiBertFamily`` and of ``FlexiSpace``.

    Raises:
        UserError: Another name, or an unknown setting.
    """
    if name != "flexibert":
        raise UserError("family", name, allowed="flexibert", hint="See archsmith families.")
    choices = {each.name for each in fields(FlexiSpace)}
    own = set(FlexiBertFamily.__dataclass_fields__) - {"image", "num_classes", "settings"}
    if unknown := sorted(set(settings) - choices - own):
        raise UserError("option of family flexibert", unknown[0], allowed=", ".join(sorted(own | choices)))
    space = FlexiSpace(**{key: value for key, value in settings.items() if key in choices})
    rest = {key: value for key, value in settings.items() if key in own}
    return FlexiBertFamily(image=tuple(image), num_classes=num_classes, settings=space, **rest)
