"""A supernet whose children are slices of the largest network of a family, each extracted as a network of its own."""

# B batch, C channels, H height, W width

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from archsmith.space import Architecture, ProductSpace
from archsmith.supernet.elastic_slices import Slices

N = TypeVar("N", bound=nn.Module)
N_co = TypeVar("N_co", bound=nn.Module, covariant=True)


class SlicedFamily(Protocol[N_co]):
    """What a sliced supernet asks of its family."""

    @property
    def space(self) -> ProductSpace:
        """The architectures."""

    def largest(self) -> Architecture:
        """Return the architecture that contains all others."""

    def build(self, architecture: Mapping[str, Any]) -> N_co:
        """Return the network of an architecture."""


class SlicedSupernet(nn.Module, Generic[N]):
    """The largest network of a family, of which a forward pass computes the active child.

    A subclass makes ``network`` and hands over what follows which size; it says in ``sizes`` which sizes a child has.

    Attributes:
        network: The largest network; its parameters are all there is to train.
        slices: What follows which size.
        active: The child that is computed.
    """

    network: N
    slices: Slices
    active: Architecture

    def begin_(self, family: SlicedFamily[N], slices: Slices) -> None:
        """Make the largest child the active one; called once, when ``network`` is made.

        Normalisations hold no running statistics while training: those of one child say nothing of another.
        """
        self._family = family
        for module in self.network.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.momentum = 0.0
        self.slices = slices
        self._whole = self.sizes(family.largest())
        self.activate(family.largest())

    @abstractmethod
    def sizes(self, architecture: Mapping[str, Any]) -> dict[str, Any]:
        """Return the size of everything that a child reaches, by the genes of the slices."""

    @property
    def space(self) -> ProductSpace:
        """The space whose architectures are slices."""
        return self._family.space

    def activate(self, architecture: Mapping[str, Any]) -> None:
        """Make a child the one that the next forward passes compute.

        Raises:
            UserError: It is not of the space.
        """
        self.active = self.space.validate(architecture)
        # What a child does not reach stays whole, so that nothing has to be done about it.
        self.slices.choose(self._whole | self.sizes(self.active))

    def extract(self, architecture: Mapping[str, Any]) -> N:
        """Return a child as a network of its own, with copies of weights and running statistics.

        Its running statistics are those that the supernet holds: recalibrate it.

        Raises:
            UserError: It is not of the space.
        """
        before, example = self.active, next(self.network.parameters())
        # Cast before the weights are copied, which may be products of matrices in a wider type.
        network = self._family.build(self.space.validate(architecture)).to(example.device, example.dtype)
        self.activate(architecture)
        try:
            with self.slices.active():
                own = self.network.state_dict()
                network.load_state_dict({name: own[name] for name in network.state_dict()})
        finally:
            self.activate(before)
        return network.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        """Return the active child's logits (B, num_classes) for images (B, C, H, W)."""
        with self.slices.active():
            logits: Tensor = self.network(x)
        return logits
