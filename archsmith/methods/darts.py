"""DARTS: a cell found by gradient descent on a softmax over the operations of every edge.

Liu, Simonyan, Yang, "DARTS: Differentiable Architecture Search", ICLR 2019, arXiv 1806.09055.

Every edge of a cell computes the mixture of all candidate operations, weighted by the softmax of its logits, which all
cells of a kind share. The search is bilevel: the logits minimise the loss on one half of the training images, the
weights minimise it on the other. A step on the logits sees the weights as they are ("first" order), or looks through
one step of momentum SGD on them ("second" order, its mixed derivative a central difference). At the end every node
keeps its two strongest edges, each with its strongest operation other than ``none``; the network of these cells is
trained from scratch, wider and deeper, with an auxiliary classifier and dropped paths.

What differs: the initial logits are 1e-3 N(0, 1), as in the released code (zeros in the paper). The recurrent cell is
not here. ``order="exact"`` replaces the central difference by a second backward pass; with ReLU and max pooling the two
differ strongly, because the difference crosses kinks.
"""

from __future__ import annotations

from typing import Any, Literal, final

from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import RelaxedSettings, recipe_for

SYSTEM = {
    "slug": "darts",
    "title": "DARTS: Differentiable Architecture Search",
    "year": 2019,
    "arxiv": "1806.09055",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed."""


class Settings(RelaxedSettings):
    """Hyper-parameters; the defaults are those of the published CIFAR-10 runs, second order.

    Attributes:
        order: Gradient of the logits: "first", "second", or "exact" (see the module).
    """

    order: Literal["first", "second", "exact"] = "second"


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the paper's."""
    return recipe_for(image, paper={})


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One DARTS run: search, selection, training from scratch.

    Arguments as of ``ConfiguredSearcher``.
    """
