"""SD-DARTS: the supernet of DARTS also learns from a vote of its own earlier selves, and settles in flatter places.

Zhu, Li, Liu, Wang, "Improving Differentiable Architecture Search via Self-Distillation", Neural Networks 2023,
arXiv 2302.05629.

Deciding for one operation on each edge costs a supernet accuracy, the more the sharper its loss. So the change of its
predictions between steps is penalised: a few earlier supernets, weights and logits of the time, answer for the batch
that the weights learn from, their probabilities are averaged into one vote, and the weights also minimise
``weight * temperature^2 * KL(vote || softmax(logits / temperature))``. All else is DARTS: logits, selection, training.

Reconstructed from the abstracts of both versions of the paper; its body and code were not at hand. The abstracts say:
earlier steps teach, several teachers, output probabilities joined by voting. Chosen here: three teachers from the last
three steps, temperature 2, weight 0.5 after a linear rise over the first tenth of the search (a random supernet is no
teacher), first order. ``majority`` votes, teachers of earlier epochs, and a term for the logits are options.
"""

from __future__ import annotations

import math
from typing import Any, Literal, final

from pydantic import Field

from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import RelaxedSettings, recipe_for
from archsmith.train.bilevel import BilevelStep
from archsmith.train.landscape import supernet_landscape
from archsmith.train.taught import Taught, Teaching

SYSTEM = {
    "slug": "sd-darts",
    "title": "SD-DARTS: self-distillation in differentiable search",
    "year": 2023,
    "arxiv": "2302.05629",
    "kind": "search",
    "aliases": [],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed."""


class Settings(RelaxedSettings):
    """Hyper-parameters; those of DARTS, first order, and the teaching.

    Attributes:
        teachers: Earlier supernets that vote; 0 for none (plain DARTS).
        teacher_every: One is kept every so many steps, or epochs.
        teacher_unit: "step" or "epoch".
        distill_weight: Weight of the distillation term; 0 for none (plain DARTS).
        temperature: Of the supernet and its teachers.
        vote: "soft", the mean of probabilities, or "majority", the share of teachers for a class.
        ramp: Share of the search's steps over which the weight rises linearly from 0.
        distill_logits: Whether the logits learn from the vote as well.
        landscape: Whether curvature and sharpness are measured at the end of the search (about 50 passes).
    """

    teachers: int = Field(3, ge=0)
    teacher_every: int = Field(1, ge=1)
    teacher_unit: Literal["step", "epoch"] = "step"
    distill_weight: float = Field(0.5, ge=0)
    temperature: float = Field(2.0, gt=0)
    vote: Literal["soft", "majority"] = "soft"
    ramp: float = Field(0.1, ge=0, le=1)
    distill_logits: bool = False
    landscape: bool = True


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the published size."""
    return recipe_for(image, paper={})


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One SD-DARTS run: search among earlier selves, selection, training from scratch.

    Arguments as of ``ConfiguredSearcher``.
    """

    def make_updater(self) -> Taught:
        """Return the step of DARTS with earlier selves as teachers of the weights."""
        s = self.settings
        steps = s.search_epochs * self.halves[0].steps_per_epoch(s.search_batch_size)
        teaching = Teaching(
            teachers=s.teachers,
            weight=s.distill_weight,
            temperature=s.temperature,
            vote=s.vote,
            ramp_steps=s.ramp * steps,
            every=s.teacher_every,
            unit=s.teacher_unit,
            logits_too=s.distill_logits,
        )
        return Taught(s.order, teaching)

    def _derive(self) -> None:
        """Select; and note how sharp the place is where the search ended."""
        assert self.supernet is not None
        found: dict[str, float] = {}
        if self.settings.landscape:
            step = BilevelStep(
                weight_task=self.halves[0],
                logit_task=self.halves[1],
                batch_size=self.settings.search_batch_size,
                seed=self.seed,
                memory_format=self.format,
            )
            found = supernet_landscape(self.supernet, step)
        super()._derive()
        self.figures.update({name: value for name, value in found.items() if math.isfinite(value)})
