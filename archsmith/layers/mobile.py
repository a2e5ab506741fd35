"""Mixed-kernel inverted residual blocks and the network made of them.

The unit of everything here is the **atom** (AtomNAS, arXiv 1912.09640): one hidden channel of an inverted residual
block with its own kernel size. A block holds one branch for each kernel size and adds the branches before its last
normalisation. That is the same function as one wide expansion, a channel split, one depthwise convolution for each
part, a concatenation and one projection, because nothing between expansion and projection mixes channels; the branched
form needs no copies for split and concatenation and was the fastest one in the channels-last format.
"""

# B batch, C channels, H height, W width

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def make_activation(name: str) -> nn.Module:
    """Return the activation called ``name``: "relu", "relu6" (at most 6) or "swish" (x * sigmoid(x), or SiLU)."""
    if name == "relu":
        return nn.ReLU(inplace=True)
    if name == "relu6":
        return nn.ReLU6(inplace=True)
    if name == "swish":
        return nn.SiLU(inplace=True)
    raise ValueError(f"activation: got {name!r}; allowed: 'relu', 'relu6', 'swish'.")


class ConvNormAct(nn.Module):
    """Convolution without bias, batch normalisation, activation.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        kernel: Odd kernel size; the padding is ``(kernel - 1) / 2``.
        stride: Stride of the convolution.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of the normalisation.
        norm_momentum: Momentum of its running statistics.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        stride: int,
        activation: str,
        norm_eps: float,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, stride, padding=(kernel - 1) // 2, bias=False)
        self.norm = nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        return self.activation(self.norm(self.conv(x)))


class ChannelShift(nn.Module):
    """Add one learned constant to each channel: what is left of a residual block whose atoms have all died."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x + bias`` for ``x`` of shape (B, C, H, W)."""
        return x + self.bias.view(1, -1, 1, 1)


class SqueezeExcite(nn.Module):
    """Squeeze-and-excitation over the concatenated atoms of all branches (Hu et al. 2018, arXiv 1709.01507).

    Args:
        channels: Atoms of all branches together.
        hidden: Width of the bottleneck.
        activation: Activation of the bottleneck; the gates are sigmoids.
    """

    def __init__(self, channels: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.reduce = nn.Conv2d(channels, hidden, 1)
        self.activation = make_activation(activation)
        self.expand = nn.Conv2d(hidden, channels, 1)

    def forward(self, branches: list[Tensor]) -> list[Tensor]:
        """Return the branches, each (B, n, H, W), scaled by the gates computed from all of them."""
        pooled = torch.cat([self.pool(branch) for branch in branches], dim=1)
        gates = torch.sigmoid(self.expand(self.activation(self.reduce(pooled))))
        parts = gates.split([branch.shape[1] for branch in branches], dim=1)
        return [branch * part for branch, part in zip(branches, parts, strict=True)]


class AtomBranch(nn.Module):
    """The atoms of one kernel size: expansion, depthwise convolution, projection.

    Args:
        in_channels: Channels of the block's input.
        out_channels: Channels of the block's output.
        atoms: Number of atoms (hidden channels); ``in_channels`` when ``expand`` is false.
        kernel: Depthwise kernel size, odd.
        stride: Stride of the depthwise convolution.
        expand: Whether there is a 1x1 expansion in front; without it the atoms are the input channels.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of both normalisations.
        norm_momentum: Momentum of their running statistics.

    ``norm.weight`` holds the scale of every atom: the gate that AtomNAS penalises.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        atoms: int,
        kernel: int,
        stride: int,
        expand: bool,
        activation: str,
        norm_eps: float,
        norm_momentum: float,
    ) -> None:
        super().__init__()
        self.expand = (
            ConvNormAct(in_channels, atoms, 1, 1, activation, norm_eps, norm_momentum) if expand else nn.Identity()
        )
        self.depthwise = nn.Conv2d(atoms, atoms, kernel, stride, padding=(kernel - 1) // 2, groups=atoms, bias=False)
        self.norm = nn.BatchNorm2d(atoms, eps=norm_eps, momentum=norm_momentum)
        self.activation = make_activation(activation)
        self.project = nn.Conv2d(atoms, out_channels, 1, bias=False)

    def hidden(self, x: Tensor) -> Tensor:
        """Return the activated atoms (B, atoms, H', W') in front of the projection."""
        return self.activation(self.norm(self.depthwise(self.expand(x))))

    def forward(self, x: Tensor) -> Tensor:
        """Return this branch's part of the block's sum, (B, C', H', W')."""
        return self.project(self.hidden(x))


class MixedInvertedResidual(nn.Module):
    """Inverted residual block whose hidden channels (atoms) have kernel sizes of their own.

    ``y = norm(sum_k project_k(act(norm_k(depthwise_k(expand_k(x))))))``, plus ``x`` when the shape stays the same.

    Args:
        in_channels: Channels of the input (B, C, H, W).
        out_channels: Channels of the output.
        stride: 1 or 2.
        atoms: One ``(kernel, number of atoms)`` pair for each branch, kernels distinct. Empty: the block is dead and
            only adds a constant for each channel, which needs a residual connection.
        expand: Whether atoms come from a 1x1 expansion (else each branch takes the input channels as its atoms).
        squeeze: Bottleneck width of squeeze-and-excitation, 0 for none.
        activation: "relu", "relu6" or "swish".
        norm_eps: Epsilon of all normalisations.
        norm_momentum: Momentum of their running statistics.
        shortcut: Whether the input is added where the shape stays the same.

    Raises:
        ValueError: No atoms although the block has no residual connection, or a kernel given twice.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int,
        atoms: tuple[tuple[int, int], ...],
        expand: bool = True,
        squeeze: int = 0,
        activation: str = "relu",
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
        shortcut: bool = True,
    ) -> None:
        super().__init__()
        self.residual = shortcut and stride == 1 and in_channels == out_channels
        if not atoms and not self.residual:
            raise ValueError("a block that changes the shape needs at least one atom; it has no residual connection.")
        if len({kernel for kernel, _ in atoms}) != len(atoms):
            raise ValueError(f"atoms: every kernel size may occur once, got {atoms}.")
        self.branches = nn.ModuleDict(
            {
                f"k{kernel}": AtomBranch(
                    in_channels, out_channels, count, kernel, stride, expand, activation, norm_eps, norm_momentum
                )
                for kernel, count in atoms
            }
        )
        total = sum(count for _, count in atoms)
        self.squeeze = SqueezeExcite(total, squeeze, activation) if squeeze and atoms else None
        self.norm: nn.Module = (
            nn.BatchNorm2d(out_channels, eps=norm_eps, momentum=norm_momentum) if atoms else ChannelShift(out_channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, C, H, W) to (B, C', H', W')."""
        branches = self.atom_branches()
        if not branches:
            return self.norm(x)
        if self.squeeze is None:
            parts = [branch(x) for branch in branches]
        else:
            hidden = self.squeeze([branch.hidden(x) for branch in branches])
            parts = [branch.project(h) for branch, h in zip(branches, hidden, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        y = self.norm(total)
        return y + x if self.residual else y

    def atom_branches(self) -> list[AtomBranch]:
        """Return the living branches in their order."""
        return [branch for branch in self.branches.values() if isinstance(branch, AtomBranch)]

    def atoms(self) -> tuple[tuple[int, int], ...]:
        """Return the living ``(kernel, atoms)`` pairs, read from the weights."""
        return tuple((b.depthwise.kernel_size[0], b.depthwise.weight.shape[0]) for b in self.atom_branches())

    def out_channels(self) -> int:
        """Return the channels of the output; the last normalisation has them, dead block or not."""
        bias = self.norm.bias
        assert isinstance(bias, Tensor)
        return bias.shape[0]


class MobileNet(nn.Module):
    """Image classifier of mixed-kernel inverted residual blocks.

    Stem 3x3, blocks, 1x1 convolution, global average pooling, dropout, linear.

    Args:
        in_channels: Channels of the images, (B, C, H, W).
        num_classes: Width of the output (B, num_classes).
        stem_channels: Width of the first convolution.
        stem_stride: Its stride.
        blocks: One ``(out_channels, stride, ((kernel, atoms), ...), expand)`` for each block.
        last_channels: Width of the 1x1 convolution before pooling.
        squeeze_ratio: Squeeze-and-excitation width relative to each block's input channels, 0 for none.
        activation: "relu", "relu6" or "swish", everywhere.
        dropout: Drop probability in front of the classifier.
        norm_eps: Epsilon of every normalisation.
        norm_momentum: Momentum of every running statistic.

    Source: AtomNAS, arXiv 1912.09640; MobileNetV2, arXiv 1801.04381, is the case of one kernel.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        stem_channels: int,
        stem_stride: int,
        blocks: tuple[tuple[int, int, tuple[tuple[int, int], ...], bool], ...],
        last_channels: int,
        squeeze_ratio: float = 0.0,
        activation: str = "relu",
        dropout: float = 0.2,
        norm_eps: float = 1e-3,
        norm_momentum: float = 0.01,
    ) -> None:
        super().__init__()
        self.settings = {
            "squeeze_ratio": squeeze_ratio,
            "activation": activation,
            "dropout": dropout,
            "norm_eps": norm_eps,
            "norm_momentum": norm_momentum,
        }
        norm = (norm_eps, norm_momentum)
        self.stem = ConvNormAct(in_channels, stem_channels, 3, stem_stride, activation, *norm)
        self.blocks = nn.ModuleList()
        self.strides = tuple(stride for _, stride, _, _ in blocks)
        self.expansions = tuple(expand for _, _, _, expand in blocks)
        channels = stem_channels
        for out_channels, stride, atoms, expand in blocks:
            squeeze = round(squeeze_ratio * channels)
            self.blocks.append(
                MixedInvertedResidual(channels, out_channels, stride, atoms, expand, squeeze, activation, *norm)
            )
            channels = out_channels
        self.last = ConvNormAct(channels, last_channels, 1, 1, activation, *norm)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(last_channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes) for images (B, C, H, W)."""
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        x = self.pool(self.last(x)).flatten(1)
        return self.classifier(self.dropout(x))

    def inverted_residuals(self) -> list[MixedInvertedResidual]:
        """Return the blocks in order."""
        return [block for block in self.blocks if isinstance(block, MixedInvertedResidual)]

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure, read from the present weights."""
        return {
            "in_channels": self.stem.conv.in_channels,
            "num_classes": self.classifier.out_features,
            "stem_channels": self.stem.conv.out_channels,
            "stem_stride": self.stem.conv.stride[0],
            "blocks": tuple(
                (block.out_channels(), stride, block.atoms(), expand)
                for block, stride, expand in zip(self.inverted_residuals(), self.strides, self.expansions, strict=True)
            ),
            "last_channels": self.last.conv.out_channels,
            **self.settings,
        }
