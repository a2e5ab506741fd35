"""The search network of time-delay networks: every block holds all candidates, one row of logits for each block.

Source: ST-NAS, arXiv 2011.05649.
"""

# B batch, P planes, M bands, T time, K outputs

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.layers.tdnn import TdnnNetwork, TimeDelay, context_and_dilation
from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.mixed import MixedOp, Relaxation
from archsmith.supernet.relaxed import SearchSupernet
from archsmith.supernet.selection import strongest

GROUP = "blocks"
"""The one group of logits, (blocks, candidates)."""


class MixedTdnn(nn.Module):
    """A time-delay network whose blocks are mixed operations; called with the mixing weights of "blocks".

    Args:
        skeleton: The network; its blocks are replaced.
        candidates: Names of the candidates of every block.
    """

    def __init__(self, skeleton: TdnnNetwork, candidates: tuple[str, ...]) -> None:
        super().__init__()
        self.skeleton = skeleton
        for number, block in enumerate(skeleton.blocks):
            assert isinstance(block, TimeDelay)
            shape, dropout = (block.conv.in_channels, block.conv.out_channels), skeleton.drop_probability
            skeleton.blocks[number] = MixedOp(
                {name: TimeDelay(*shape, *context_and_dilation(name), dropout) for name in candidates}
            )

    def forward(self, x: Tensor, mixing: Mapping[str, Tensor]) -> Tensor:
        """Return log-probabilities (B, ceil(T / 3), K) for features (B, P, M, T)."""
        net = self.skeleton
        x = x.flatten(1, 2).transpose(1, 2)
        for number, block in enumerate(net.blocks):
            x = net.slower(x) if number == net.stride_after else x
            x = block(x, mixing[GROUP][number])
        x = net.slower(x) if net.stride_after == len(net.blocks) else x
        return torch.log_softmax(net.classifier(x), dim=-1)


class TdnnSupernet(SearchSupernet):
    """The mixed network with its logits "blocks".

    Made by ``TdnnFamily.relaxed``.

    Args:
        network: The mixed network.
        space: Its architectures; the paths are ``block/<number>``.
        candidates: Names of the candidates of every block.
        build: Returns the standalone network of an architecture.
        relaxation: From logits to mixing weights; softmax if None.
        seed: Seed of the initial logits.
    """

    def __init__(
        self,
        network: MixedTdnn,
        space: ProductSpace,
        candidates: tuple[str, ...],
        build: Callable[[Architecture], nn.Module],
        relaxation: Relaxation | None,
        seed: int,
    ) -> None:
        count = len(network.skeleton.blocks)
        super().__init__(
            network,
            {GROUP: (candidates,) * count},
            space=space,
            labels={GROUP: tuple(f"block {number}" for number in range(count))},
            targets={GROUP: tuple(range(count))},
            relaxation=relaxation,
            seed=seed,
        )
        self._build = build

    def path(self, architecture: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the mixing weights of an architecture: one on its candidates, zero everywhere else.

        Raises:
            UserError: It is not of the space.
        """
        chosen = self.space.validate(architecture)
        return self.one_hot({GROUP: [str(chosen[f"block/{number}"]) for number in range(len(self.options[GROUP]))]})

    def derive(self, mixing: Mapping[str, Tensor] | None = None) -> Architecture:
        """Return the architecture of the strongest candidate of every block.

        Args:
            mixing: Strength of every candidate; the logits' probabilities if None.
        """
        names = strongest(self.strengths(mixing)[GROUP], self.options[GROUP])
        return self.space.validate({f"block/{number}": name for number, name in enumerate(names)})

    def places(self) -> dict[str, tuple[str, int]]:
        """Return the group and the number of every block, by its name in ``network``."""
        return {f"skeleton.blocks.{number}": (GROUP, number) for number in range(len(self.options[GROUP]))}

    def weightless(self, architecture: Mapping[str, Any]) -> dict[str, int]:
        """Return how many blocks have no weights: none can be without."""
        return {GROUP: 0}

    def extract(self, architecture: Mapping[str, Any]) -> nn.Module:
        """Return a network of its own with a copy of the path's weights, in the supernet's mode.

        Raises:
            UserError: It is not of the space.
        """
        chosen = self.space.validate(architecture)
        state: dict[str, Tensor] = {}
        for name, tensor in self.network.state_dict().items():
            block, inside, rest = name.removeprefix("skeleton.").partition(".candidates.")
            if not inside:
                state[block] = tensor
                continue
            candidate, _, leaf = rest.partition(".")
            if candidate == chosen[f"block/{block.rpartition('.')[2]}"]:
                state[f"{block}.{leaf}"] = tensor
        network = self._build(chosen)
        network.load_state_dict(state)
        example = next(self.network.parameters())
        return network.to(example.device, example.dtype).train(self.training)
