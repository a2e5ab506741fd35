"""DARTS-PT: the architecture is chosen by what the supernet loses without an operation, not by the size of its weight.

Wang, Cheng, Chen, Tang, Hsieh, "Rethinking Architecture Selection in Differentiable NAS", ICLR 2021, arXiv 2108.04392.

A supernet is trained as in first-order DARTS. Then its edges are decided one by one in random order: with every
operation taken away in turn (its mixing weight zero, the others as they were) the supernet is evaluated on all
validation images by batch statistics, and the operation without which it does worst gets the edge. Behind each decision
the supernet is fine-tuned for a few epochs at a tenth of the learning rate. When all operations are decided, the nodes
keep the two edges without which the supernet does worst. With ``fixed_alpha`` the architecture logits are never
trained: near-uniform mixing weights serve as well, or better, since the size of a weight is no measure of strength (the
better the supernet, the larger the weight of a skip: ``archsmith.supernet.perturbation.optimal_mixture``).

The rule is a setting of every differentiable search (``selection="perturbation"``); this file is its combination with
DARTS. Own decisions: in spaces whose nodes leave edges out, ``none`` is neither asked about nor chosen; all kinds of
cells ask about the supernet as it was when an event began, and decide together.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, final

from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import TINY, Plan, RelaxedSettings, perturbation_of, plan_of, recipe_for

SYSTEM = {
    "slug": "darts-pt",
    "title": "Rethinking Architecture Selection in Differentiable NAS",
    "year": 2021,
    "arxiv": "2108.04392",
    "kind": "search",
    "aliases": ["perturbation-selection"],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed."""


class Settings(RelaxedSettings):
    """Hyper-parameters; the defaults are those of the published CIFAR-10 runs.

    Attributes:
        selection: How the architecture is chosen.
        fixed_alpha: Whether the logits stay at their initial values, also in the fine-tuning.
    """

    selection: Literal["magnitude", "perturbation"] = "perturbation"
    fixed_alpha: bool = False


PRESETS: dict[str, dict[str, Any]] = {"paper": {}, "tiny": {**TINY, "selection_interval": 1}}


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the paper's."""
    return recipe_for(image, PRESETS["paper"], PRESETS["tiny"])


def search_plan(s: Settings) -> Plan:
    """Return the phases of DARTS and the selection; with ``fixed_alpha`` no phase trains logits."""
    plan = plan_of(s)
    learn = not s.fixed_alpha
    search = tuple(replace(phase, logits=phase.logits and learn) for phase in plan.search)
    return replace(plan, search=search, perturbation=perturbation_of(s, logits=learn))


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One DARTS-PT run: search, selection by perturbation, training from scratch.

    Arguments as of ``ConfiguredSearcher``.
    """

    def planned(self, settings: Settings) -> Plan:
        """Return the phases of DARTS and the selection."""
        return search_plan(settings)
