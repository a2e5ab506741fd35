"""sharpDARTS: DARTS with balanced operations, a winner that cannot grow, and a bent learning rate; and a grid search.

Hundt, Jain, Hager, "sharpDARTS: Faster and More Accurate Differentiable Architecture Search", 2019, arXiv 1903.09900.

It is the first-order search of DARTS with three changes. (1) All convolutions of a cell are one block of two rounds
with a middle width of its own (family "sharpdarts"), so that no operation is cheaper by accident. (2) Max-W: candidates
are weighted by ``1 - max(w) + w``, so that the strongest always counts fully and gains nothing by shrinking the others.
(3) Cosine power annealing of the learning rate, behind a warm-up.

On the family "hypercuboid" the same search is a differentiable hyper-parameter grid search: every step of a chain
chooses width and operation in one softmax over all combinations, and the result is a path through the grid.

What differs: the derivation ranks by softmax probabilities, which Max-W shifts alike on an edge and therefore cannot
rank edges by. ``path="priced"`` is our reading of the paper's minimum cost with measured times. AutoAugment is not
part of the tasks.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, final

from pydantic import Field
from torch import Tensor

from archsmith.core.errors import UserError
from archsmith.families.hypercuboid_supernet import HyperCuboidSupernet, Rule
from archsmith.run import relaxed_settings
from archsmith.run.relaxed_search import ConfiguredSearcher
from archsmith.run.relaxed_settings import TINY, Phase, Plan, RelaxedSettings, recipe_for
from archsmith.space import Architecture
from archsmith.supernet.grid_paths import GridCosts
from archsmith.supernet.max_w import MaxW
from archsmith.supernet.relaxed import SearchSupernet
from archsmith.train.schedules import cosine_power

SYSTEM = {
    "slug": "sharpdarts",
    "title": "sharpDARTS: Faster and More Accurate Differentiable Architecture Search",
    "year": 2019,
    "arxiv": "1903.09900",
    "kind": "search",
    "aliases": ["sharp-darts"],
}

WORKS_ON = "relaxed"
"""It searches every family with a supernet that can be relaxed; "sharpdarts" and "hypercuboid" are its own."""


class Settings(RelaxedSettings):
    """Hyper-parameters; the defaults are those of the published CIFAR-10 runs. Others as of ``RelaxedSettings``.

    Attributes:
        max_w: Whether candidates are weighted by Max-W; else by the softmax.
        detached_max: Whether its maximum is a constant to the gradient.
        search_power: Of cosine power annealing in the search, from 1, a cosine.
        search_lr_warmup: Epochs at the beginning of the search in which the learning rate rises linearly.
        power: The same in the final training.
        lr_warmup: The same in the final training.
        lr_min: Learning rate at the end of the final training.
        final_weight_decay: L2 on the weights in the final training; ``weight_decay`` if None.
        path: How a path is taken out of the grid of the family "hypercuboid": "longest" (the largest sum of
            probabilities), greedily "bottom_up" or "top_down", or "priced", the largest sum less what the path costs.
        path_cost: What is priced: "latency_ms", measured step by step on this machine, or "macs".
        path_price: How much probability, summed over all steps, the cost of the dearest path is worth.
        search_batch_size: Examples of a batch (published: 48 with eight candidates, 16 to 32 with more, 64 for grids).
    """

    max_w: bool = True
    detached_max: bool = False
    search_power: float = Field(2.0, ge=1)
    search_lr_warmup: int = Field(5, ge=0)
    search_epochs: int = Field(120, ge=1)
    search_batch_size: int = Field(32, ge=2)
    search_lr_min: float = Field(1e-4, ge=0)
    epochs: int = Field(2000, ge=1)
    batch_size: int = Field(64, ge=2)
    power: float = Field(2.0, ge=1)
    lr_warmup: int = Field(5, ge=0)
    final_weight_decay: float | None = Field(None, ge=0)
    lr_min: float = Field(1e-8, ge=0)
    path: Rule = "longest"
    path_cost: Literal["latency_ms", "macs"] = "latency_ms"
    path_price: float = Field(1.0, ge=0)


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "imagenet": {
        "epochs": 300,
        "lr": 0.05,
        "lr_min": 7.5e-4,
        "power": 10.0,
        "lr_warmup": 10,
        "final_weight_decay": 1e-4,
    },
    "grid": {"search_batch_size": 64, "batch_size": 512, "lr": 0.1},
    "tiny": {**TINY, "search_lr_min": 1e-4, "search_lr_warmup": 1, "lr_warmup": 1},
}
"""Published recipes: cells on CIFAR-10, the final training on ImageNet, the grid search; and ours for small images."""


def preset_settings(image: tuple[int, int, int]) -> dict[str, Any]:
    """Return the recipe for an image size: "tiny" below 24 pixels, which one CPU can do, else the paper's."""
    return recipe_for(image, PRESETS["paper"], PRESETS["tiny"])


def plan_of(s: Settings) -> Plan:
    """Return the search and the final training as one phase each."""
    plan = relaxed_settings.plan_of(s)
    decay = s.weight_decay if s.final_weight_decay is None else s.final_weight_decay
    return replace(plan, final=tuple(replace(phase, lr_min=s.lr_min, weight_decay=decay) for phase in plan.final))


@final
class Searcher(ConfiguredSearcher[Settings]):
    """One sharpDARTS run: search, selection, training from scratch.

    Arguments as of ``ConfiguredSearcher``.

    Attributes:
        times: Measured cost of every step of a grid, once "priced" paths have asked for them. A checkpoint keeps them.

    Raises:
        UserError: A warm-up as long as a training, or a rule for paths where the family has none.
    """

    times: GridCosts | None = None

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        path = self.settings.path
        if path != "longest" and not isinstance(self.supernet, HyperCuboidSupernet):
            raise UserError("settings.path", path, allowed="'longest' for families other than 'hypercuboid'")

    def planned(self, settings: Settings) -> Plan:
        """Return the phases, and work out the learning rates of their epochs."""
        plan = plan_of(settings)
        bent = {"search": (settings.search_power, settings.search_lr_warmup)}
        self._rates = {}
        for phase in (*plan.search, *plan.final):
            power, warmup = bent.get(phase.name, (settings.power, settings.lr_warmup))
            self._rates[phase.name] = cosine_power(
                phase.epochs, peak=phase.lr, floor=phase.lr_min, power=power, warmup=warmup
            )
        return plan

    def relaxation(self) -> MaxW | None:
        """Return Max-W, unless the settings leave it out."""
        return MaxW(detached=self.settings.detached_max) if self.settings.max_w else None

    def rate(self, phase: Phase, epoch: int) -> float:
        """Return the annealed learning rate of an epoch (from 0)."""
        return self._rates[phase.name][epoch]

    def begin_epoch_(self, phase: Phase, epoch: int) -> None:
        """Measure the steps of a grid at the beginning of the run, if their times will be asked for."""
        s = self.settings
        if self.supernet is not None and self.times is None and (s.path, s.path_cost) == ("priced", "latency_ms"):
            self.times = self.small.measured_times()

    def select(self, supernet: SearchSupernet) -> Architecture:
        """Return the strongest edges and operations, or the path that the settings ask for."""
        if not isinstance(supernet, HyperCuboidSupernet):
            return supernet.derive()
        return supernet.derive_by(self.settings.path, costs=self.times, price=self.settings.path_price)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint needs, the measured times among it."""
        tensors, values = super().state()
        return tensors, {**values, "times": None if self.times is None else self.times.to_json()}

    def load(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Continue from a checkpoint, bit for bit."""
        self.times = None if state["times"] is None else GridCosts.from_json(state["times"])
        super().load(tensors, state)
