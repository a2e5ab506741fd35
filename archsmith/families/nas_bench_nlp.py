"""Recurrent language models whose cell is searched: random cells, and those of the NAS-Bench-NLP recipes.

The family has no row in ``FAMILIES``: there is no task of language modelling to search with from the command line yet.

Source: Klyuchnikov et al. 2020, NAS-Bench-NLP, arXiv 2006.07116.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.families.nas_bench_nlp_space import (
    CHOICES,
    SLOTS,
    Recipe,
    architecture_of,
    cell_space,
    recipe_macs,
    recipe_of,
    recipe_params,
)
from archsmith.layers.recurrent_cells import RecurrentLanguageModel
from archsmith.space import Architecture, ProductSpace, Value


@dataclass(frozen=True, kw_only=True)
class RecurrentFamily:
    """Language models of one cell.

    Attributes:
        image: Shape of one example, (steps,) or (1, 1, steps); its values are token numbers.
        num_classes: Number of tokens, the vocabulary.
        embedding: Features of the embedding and of the last layer.
        hidden: Units of the layers before.
        layers: Their number.
        nodes: Places of a cell, see ``cell_space``.
        states: Most states of a cell, 1 to 3.
        dropout: Behind the embedding and every layer.

    The sizes are the benchmark's. Its training (weight dropping, activation regularisation, averaged SGD) is not here.

    Raises:
        UserError: A size is out of its range.
    """

    image: tuple[int, ...]
    num_classes: int
    embedding: int = 400
    hidden: int = 600
    layers: int = 3
    nodes: int = 8
    states: int = 2
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if set(self.image[:-1]) - {1} or self.steps < 1:
            raise UserError("image", self.image, allowed="(steps,) or (1, 1, steps), at least one step")
        for name, least in (("num_classes", 2), ("embedding", 1), ("hidden", 1), ("layers", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise UserError(f"family.{name}", value, allowed=f"an integer of at least {least}")
        if not 0 <= self.dropout < 1:
            raise UserError("family.dropout", self.dropout, allowed="0 or more, below 1")
        cell_space(self.nodes, self.states)

    @property
    def steps(self) -> int:
        """Tokens of one example."""
        return prod(self.image)

    @property
    def space(self) -> ProductSpace:
        """The random cells."""
        return cell_space(self.nodes, self.states)

    def examples(self, count: int) -> Tensor:
        """Return random texts (count, *image) for checks: tokens that its networks take."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, self.num_classes, (count, *self.image), generator=generator).float()

    def smallest(self) -> Architecture:
        """Return one linear node of x and the state."""
        return architecture_of((("h_new_0", "linear", ("x", "h_prev_0")),), self.space)

    def largest(self) -> Architecture:
        """Return a chain of the linear nodes with most weights."""
        options = ("linear_x2", "linear_3")
        last = max(options, key=lambda option: self._weights(option))
        decisions: dict[str, Value] = {}
        for i in range(self.nodes):
            decisions[f"node/{i}/op"] = last if i else "linear_x2"
            before = f"node_{i - 1}" if i else "h_prev_0"
            decisions |= {f"node/{i}/{slot}": before if slot == "a" else "h_prev_0" for slot in SLOTS}
        decisions |= {f"state/{k}": f"node_{k - 1}" for k in range(1, self.states)}
        return self.space.validate(decisions)

    def _weights(self, option: str) -> int:
        operation, arity, takes_x = CHOICES[option]
        inputs = ("x",) * takes_x + ("h_prev_0",) * arity
        return recipe_params((("h_new_0", operation, inputs),), vocabulary=0, **self._sizes)

    @property
    def _sizes(self) -> dict[str, int]:
        return {"embedding": self.embedding, "hidden": self.hidden, "layers": self.layers}

    def build(self, architecture: Mapping[str, Any], *, seed: int | None = None) -> RecurrentLanguageModel:
        """Return the network of a point of the space; arguments as for ``build_recipe``."""
        return self.build_recipe(recipe_of(architecture), seed=seed)

    def build_recipe(self, recipe: Recipe, *, seed: int | None = None) -> RecurrentLanguageModel:
        """Return the network of any recipe, those of ``parse_recipe`` too.

        Args:
            recipe: The cell.
            seed: Seed of the initialisation; None draws from torch's global generator.
        """
        with torch.random.fork_rng(devices=[], enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            return RecurrentLanguageModel(
                self.num_classes, self.embedding, self.hidden, self.layers, recipe, self.dropout
            )

    def architecture_of(self, network: RecurrentLanguageModel) -> Architecture:
        """Return a point of the space with this cell; its idle places are not those of the point it came from."""
        return architecture_of(network.recipe, self.space)

    def exact_costs(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return ``macs`` (one example) and ``params`` in closed form; nothing is built."""
        recipe, sizes = recipe_of(architecture), {"vocabulary": self.num_classes, **self._sizes}
        return {"macs": recipe_macs(recipe, steps=self.steps, **sizes), "params": recipe_params(recipe, **sizes)}

    def to_json(self) -> dict[str, Any]:
        """Return the family as plain JSON values; ``family_from_json`` is the way back."""
        return {"name": "nas-bench-nlp", **asdict(self), "image": list(self.image)}


def family_from_json(data: Mapping[str, Any]) -> RecurrentFamily:
    """Return the family that ``to_json`` wrote."""
    own = {key: value for key, value in data.items() if key != "name"}
    return RecurrentFamily(**{**own, "image": tuple(own["image"])})
