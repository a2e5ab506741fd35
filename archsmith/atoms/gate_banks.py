"""Gates of a whole model, kept beside it: what a shrinker trains where a model has no scales of its own.

Both kinds act through hooks (``gate_sites``), so that the model and its ``state_dict`` stay as they are. Gates that a
user placed in the model by hand (``LogisticGate`` layers) are taken over where there are some.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from archsmith.atoms.gate_sites import SiteHooks, fold_, gate_sites, require_sites
from archsmith.atoms.gates import GateOptions, LogisticGate, any_alive, draw_noise, joined
from archsmith.atoms.units import IntArray, UnitGroup


class MagnitudeGates:
    """One factor for each unit, 1 at the start: what a normalisation scale would be.

    Args:
        model: The network; hooks are put on it.
        groups: Groups that should have gates.

    Attributes:
        values: Factors (units,) by group name, parameters.
        sites: Where they act, by group name.
        refused: Why a group has none, by name.
    """

    def __init__(self, model: nn.Module, groups: Sequence[UnitGroup]) -> None:
        self._model = model
        self.sites, self.refused = gate_sites(model, groups)
        self._instead: Mapping[str, Tensor] | None = None
        device = _device_of(model)
        self.values = {
            group.name: nn.Parameter(torch.ones(group.size, device=device))
            for group in groups
            if group.name in self.sites
        }
        self._hooks = SiteHooks(model, self.sites, self.multiplier)

    def multiplier(self, name: str) -> Tensor | None:
        """Return the factors of a group that act now; also for hooks on another network of the same make."""
        return (self.values if self._instead is None else self._instead).get(name)

    @contextmanager
    def using(self, values: Mapping[str, Tensor]) -> Iterator[None]:
        """Let other factors act for a while: the network as a function of them."""
        before, self._instead = self._instead, values
        try:
            yield
        finally:
            self._instead = before

    def parameters(self) -> list[nn.Parameter]:
        """Return what is trained."""
        return list(self.values.values())

    @torch.no_grad()
    def fold_(self) -> None:
        """Multiply the gates into the weights and set them to 1: the function stays."""
        fold_(self._model, self.sites, self.values)
        for value in self.values.values():
            value.fill_(1.0)

    def follow(self, groups: Sequence[UnitGroup], kept: Mapping[str, IntArray]) -> None:
        """Go on with the units that survived a cut.

        Args:
            groups: The groups after it.
            kept: Surviving positions by group name.
        """
        self._hooks.remove()
        self.sites, _ = gate_sites(self._model, [group for group in groups if group.name in self.values])
        for name, value in self.values.items():
            _keep(value, kept[name])
        self._hooks = SiteHooks(self._model, self.sites, self.multiplier)

    def remove(self) -> None:
        """Take the hooks off, gates included: fold them before, if they matter."""
        self._hooks.remove()


class LogisticGates:
    """Stochastic gates of all groups, sampled once for each step.

    Args:
        model: The network. Where units of a group lie in the ``logits`` of ``LogisticGate`` layers, these are its gates
            (several of them, on both sides of a residual sum for instance); other groups get one by hooks.
        groups: Groups that should have gates.
        options: Of the gates by hooks; layers have their own.
        generator: Source of the noise; the same seed on all ranks samples the same masks.

    Attributes:
        logits: Log odds of the gates by hooks, (units,) by group name.
        layers: ``(gate, positions)`` of the layers of each group, by name.
        refused: Why a group has no gate, by name.
        steps: Masks sampled so far.
    """

    def __init__(
        self,
        model: nn.Module,
        groups: Sequence[UnitGroup],
        *,
        options: GateOptions | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.options = options or GateOptions()
        self._model = model
        self._generator = generator or torch.Generator().manual_seed(0)
        self.layers = _layers(model, groups)
        hooked = [group for group in groups if group.name not in self.layers]
        self._sites, self.refused = gate_sites(model, hooked)
        require_sites({**self._sites, **self.layers}, self.refused, "model")
        device = _device_of(model)
        self.logits = {
            group.name: nn.Parameter(torch.full((group.size,), self.options.log_odds, device=device))
            for group in hooked
            if group.name in self._sites
        }
        self.steps = 0
        self._noise: dict[str, Tensor] = {}
        self._put_away: dict[int, Tensor] = {}
        self._hooks = SiteHooks(model, self._sites, self._multiplier)
        self.sample()

    @property
    def names(self) -> tuple[str, ...]:
        """Groups that have gates."""
        return (*self.logits, *self.layers)

    def parameters(self) -> list[nn.Parameter]:
        """Return all log odds; no weight decay belongs on them."""
        own = {id(gate.logits): gate.logits for each in self.layers.values() for gate, _ in each}
        return [*self.logits.values(), *own.values()]

    def sample(self) -> None:
        """Draw the masks of the next step: one number for each gate."""
        for name, logits in self.logits.items():
            self._noise[name] = draw_noise(logits.shape, self._generator).to(logits.device)
        for gate in self._gates():
            gate.noise = draw_noise(gate.logits.shape, self._generator).to(gate.logits.device)
            gate.steps = self.steps
        self.steps += 1

    def _gates(self) -> list[LogisticGate]:
        return list({id(gate): gate for each in self.layers.values() for gate, _ in each}.values())

    def _multiplier(self, name: str) -> Tensor | None:
        noise = self._noise[name] if self._model.training else None
        return self.options.mask(self.logits[name], noise, self.steps - 1)

    def _members(self, name: str) -> list[tuple[Tensor, Tensor, GateOptions]]:
        """Return logits, noise and options of every gate of a group, unit by unit."""
        if name in self.logits:
            return [(self.logits[name], self._noise[name], self.options)]
        found = []
        for gate, positions in self.layers[name]:
            assert gate.noise is not None
            index = positions.to(gate.logits.device)
            found.append((gate.logits[index], gate.noise[index], gate.options))
        return found

    def regularisation(self, name: str, on: Literal["mask", "probability"] = "mask") -> Tensor:
        """Return the regularisation vector of a group, (units,): the sampled mask, or the keep probability.

        Several gates are joined by ``1 - prod(1 - r)``.
        """
        vectors = []
        for logits, noise, options in self._members(name):
            gate = options.mask(logits, noise, self.steps - 1) if on == "mask" else torch.sigmoid(logits)
            vectors.append(gate)
        return vectors[0] if len(vectors) == 1 else joined(vectors)

    @torch.no_grad()
    def alive(self, name: str, of: Literal["mask", "probability"] = "mask", threshold: float = 0.1) -> Tensor:
        """Return which units are alive in the regulariser, (units,) boolean: at least one gate at ``threshold``."""
        found = []
        for logits, noise, options in self._members(name):
            gate = options.mask(logits, noise, self.steps - 1) if of == "mask" else torch.sigmoid(logits)
            found.append(gate >= threshold)
        return any_alive(found)

    @torch.no_grad()
    def final(self, name: str) -> Tensor:
        """Return which units are kept at the end, (units,) boolean: any gate with ``a > 0``, and the first."""
        return any_alive([self._alive_of(*member) for member in self._members_with_first(name)])

    def _members_with_first(self, name: str) -> list[tuple[Tensor, Tensor, GateOptions]]:
        if name in self.logits:
            first = torch.zeros(len(self.logits[name]), dtype=torch.bool, device=self.logits[name].device)
            first[0] = True
            return [(self.logits[name], first, self.options)]
        return [
            (gate.logits[positions.to(gate.logits.device)], (positions == 0).to(gate.logits.device), gate.options)
            for gate, positions in self.layers[name]
        ]

    @staticmethod
    def _alive_of(logits: Tensor, first: Tensor, options: GateOptions) -> Tensor:
        living = logits.detach() > 0
        return living | first if options.keep_first else living

    @torch.no_grad()
    def probability(self, name: str) -> Tensor:
        """Return the keep probability of every unit, (units,)."""
        return self.regularisation(name, on="probability").detach()

    def state(self) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the state of the generator and the noise of the present step."""
        noise = dict(self._noise)
        for number, gate in enumerate(self._gates()):
            if gate.noise is not None:
                noise[f"layer/{number}"] = gate.noise
        return self._generator.get_state(), {name: value.clone() for name, value in noise.items()}

    def load(self, generator: Tensor, noise: Mapping[str, Tensor], steps: int) -> None:
        """Go on from a state."""
        self._generator.set_state(generator)
        self.steps = steps
        self._noise = {name: noise[name].to(logits.device) for name, logits in self.logits.items()}
        for number, gate in enumerate(self._gates()):
            gate.noise = noise[f"layer/{number}"].to(gate.logits.device)
            gate.steps = steps - 1

    @torch.no_grad()
    def fold_(self) -> None:
        """Multiply the gates of inference into the weights; afterwards the gates by hooks do nothing more.

        Layers in the model stay: they are part of the user's network.
        """
        fold_(
            self._model,
            self._sites,
            {name: self.options.mask(logits, None, self.steps) for name, logits in self.logits.items()},
        )
        self._hooks.remove()

    def follow(self, groups: Sequence[UnitGroup], kept: Mapping[str, IntArray]) -> None:
        """Go on with the units that survived a cut; logits of layers were cut with the model."""
        self._hooks.remove()
        self._sites, _ = gate_sites(self._model, [group for group in groups if group.name in self.logits])
        for name, value in self.logits.items():
            _keep(value, kept[name])
            self._noise[name] = self._noise[name][torch.from_numpy(kept[name]).to(self._noise[name].device)]
        names = set(self.layers)
        self.layers = _layers(self._model, [group for group in groups if group.name in names])
        for gate in self._gates():
            noise = self._put_away.pop(id(gate), gate.noise)
            if noise is None or noise.shape != gate.logits.shape:
                noise = draw_noise(gate.logits.shape, self._generator).to(gate.logits.device)
            gate.noise = noise
        self._hooks = SiteHooks(self._model, self._sites, self._multiplier)

    def remove(self) -> None:
        """Take the hooks off, gates included; ``follow`` goes on."""
        self._hooks.remove()
        for gate in self._gates():
            if gate.noise is not None:
                self._put_away[id(gate)] = gate.noise
            gate.noise = None


def _layers(model: nn.Module, groups: Sequence[UnitGroup]) -> dict[str, list[tuple[LogisticGate, Tensor]]]:
    """Return the gate layers of every group that has some, with the position of each unit in them."""
    gates = {f"{name}.logits": m for name, m in model.named_modules() if isinstance(m, LogisticGate)}
    found: dict[str, list[tuple[LogisticGate, Tensor]]] = {}
    for group in groups:
        for place in group.places:
            if place.tensor in gates and place.index.shape[1] == 1:
                positions = torch.from_numpy(np.ascontiguousarray(place.index[:, 0]))
                found.setdefault(group.name, []).append((gates[place.tensor], positions))
    return found


def _device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def _keep(value: nn.Parameter, kept: IntArray) -> None:
    """Let a parameter go on with some of its entries; the object stays the same."""
    index = torch.from_numpy(kept).to(value.device)
    gradient = None if value.grad is None else value.grad[index]
    value.grad = None
    value.data = value.data[index].clone()
    value.grad = gradient
