"""RARTS: two copies of the weights, one for each half of the data, share one architecture; first order, single level.

Xue, Xin, "RARTS: An Efficient First-Order Relaxed Architecture Search Method", IEEE Access 2022, arXiv 2008.03901.

DARTS has two levels: weights on one half of the images, logits on the other. Here they become one function of the
weights ``w`` (training half), their copy ``y`` (validation half) and the logits ``a``,

    L_valid(y, a) + train_weight * L_train(w, a) + coupling / 2 * |y - w|^2,

and a step goes down it in ``w``, ``y`` and ``a`` in turn (Gauss-Seidel). The logits learn from both halves, without
second derivatives. ``passes="fused"`` takes their gradients in the passes of the weights: 2 forward and backward passes
a step, where second-order DARTS needs 5. The selection and the training from scratch are those of DARTS.

The paper searches widths by the same scheme, with one factor for each channel as the architecture: that is
``archsmith.methods.rarts_width``.

Reconstructed from the abstracts of both versions of the paper; its body and code were not at hand. The abstracts say:
data and network split, two networks with related weights and a shared architecture, Gauss-Seidel, single level, 60 %
less computation than second order (which 2 of 5 passes are). Chosen here: weight 1, coupling 0.01, clipping of the
loss's gradient but not of the spring's, the optimiser of the second copy as that of the first.
"""

from __future__ import annotations

from typing import Any, Literal, final

from pydantic import Field

from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import RelaxedSettings, recipe_for
from archsmith.supernet.split import Relaxed
from archsmith.train.two_copies import TwoCopies

SYSTEM = {
    "slug": "rarts",
    "title": "RARTS: relaxed first-order architecture search",
    "year": 2022,
    "arxiv": "2008.03901",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed."""


class Settings(RelaxedSettings):
    """Hyper-parameters; those of DARTS, and the relaxation.

    Attributes:
        order: "first", because no gradient looks through a step.
        passes: "fused" (2 passes a step) or "gauss-seidel" (4: every gradient at the newest values).
        train_weight: Weight of the training loss, lambda.
        coupling: Strength of the spring between the copies, beta.
    """

    order: Literal["first"] = "first"
    passes: Literal["fused", "gauss-seidel"] = "fused"
    train_weight: float = Field(1.0, gt=0)
    coupling: float = Field(1e-2, gt=0)


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the published size."""
    return recipe_for(image, paper={})


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One RARTS run: search with two copies, selection, training from scratch.

    Arguments as of ``ConfiguredSearcher``.
    """

    def make_updater(self) -> TwoCopies:
        """Return the relaxed single-level step."""
        s = self.settings
        return TwoCopies(Relaxed(train_weight=s.train_weight, coupling=s.coupling), s.passes)
