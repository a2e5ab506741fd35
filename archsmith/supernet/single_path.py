"""Weight sharing by single paths: every choice is a switch between candidates, one of which runs.

Source: Guo et al. 2020, arXiv 1904.00420; Li and Talwalkar 2019 (random search with parameter sharing), 1902.07638.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from archsmith.core.errors import UserError
from archsmith.space import Architecture, Space


class Switch(nn.Module):
    """Candidates of one choice; ``forward`` runs the active one and touches no other.

    Args:
        candidates: Module by option, at least one; the first is active.
    """

    def __init__(self, candidates: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.candidates = nn.ModuleDict(candidates)
        self.active = next(iter(candidates))

    def activate(self, option: str) -> None:
        """Make ``option`` the candidate that runs.

        Raises:
            UserError: There is no such candidate.
        """
        if option not in self.candidates:
            raise UserError("option", option, allowed=", ".join(self.candidates))
        self.active = option

    def forward(self, x: Tensor) -> Tensor:
        """Return the active candidate's output for ``x``."""
        return self.candidates[self.active](x)


class SinglePathSupernet(nn.Module):
    """A network with switches in it, and the choices that set them.

    Args:
        network: Network that contains ``Switch`` modules.
        space: Its architectures; every path is a choice.
        switches: For each path of the space the qualified names, in ``network``, of the switches it sets.
        build: Returns the standalone network of an architecture. Its tensors are called as in ``network``, without
            ``candidates.<option>``; it may have affine normalisations where ``network`` has none.

    Raises:
        UserError: A path without switches, or a switch no path sets.

    Weights are shared between architectures that agree on a choice. A path runs alone: its cost in time and memory is
    that of its own network.
    """

    def __init__(
        self,
        network: nn.Module,
        space: Space,
        switches: Mapping[str, Sequence[str]],
        build: Callable[[Architecture], nn.Module],
    ) -> None:
        super().__init__()
        self.network = network
        self.space = space
        self._build = build
        self._names = {path: tuple(names) for path, names in switches.items()}
        found = {name for name, module in network.named_modules() if isinstance(module, Switch)}
        named = [name for names in self._names.values() for name in names]
        if set(named) != found or len(named) != len(found) or not all(self._names.values()):
            raise UserError("switches", self._names, allowed=f"every one of {sorted(found)} under one path")

    def activate(self, architecture: Mapping[str, Any]) -> None:
        """Make this architecture's path the one that the next forward passes take.

        Raises:
            UserError: It is not of the space.
        """
        for path, option in self.space.validate(architecture).items():
            for name in self._names[path]:
                self._switch(name).activate(str(option))

    def forward(self, x: Tensor) -> Tensor:
        """Return the active path's output for ``x``."""
        return self.network(x)

    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return a network of its own with a copy of the path's weights and statistics, in the supernet's mode.

        Normalisations that have no scale and shift here get the neutral ones there, where the built network has them.

        Raises:
            UserError: It is not of the space.
        """
        architecture = self.space.validate(architecture)
        chosen = {name: str(option) for path, option in architecture.items() for name in self._names[path]}
        state: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            switch, inside, rest = name.partition(".candidates.")
            if not inside:
                state[name] = tensor
            elif rest.startswith(f"{chosen[switch]}."):
                state[f"{switch}.{rest.removeprefix(f'{chosen[switch]}.')}"] = tensor
        network = self._build(architecture)
        missing, unexpected = network.load_state_dict(state, strict=False)
        norms = {
            f"{name}.{leaf}"
            for name, module in network.named_modules()
            if isinstance(module, _BatchNorm)
            for leaf in ("weight", "bias")
        }
        assert not unexpected and set(missing) <= norms, (missing, unexpected)
        for name, module in network.named_modules():
            if isinstance(module, _BatchNorm) and f"{name}.weight" in missing:
                nn.init.ones_(module.weight)
                nn.init.zeros_(module.bias)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)

    def _switch(self, name: str) -> Switch:
        switch = self.network.get_submodule(name)
        assert isinstance(switch, Switch)
        return switch
