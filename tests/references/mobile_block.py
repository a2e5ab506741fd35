"""The inverted residual block of mixed kernels, written out twice: one wide pass, and atom by atom.

Both take a ``MixedInvertedResidual`` only as a holder of weights and never call its forward.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from archsmith.layers.mobile import MixedInvertedResidual


def normalised(x: Tensor, norm: nn.Module, channel: slice, training: bool) -> Tensor:
    """Return the batch normalisation of (B, C, H, W) by its formula."""
    if training:
        mean = x.mean((0, 2, 3))
        var = ((x - mean[:, None, None]) ** 2).mean((0, 2, 3))
    else:
        mean, var = norm.running_mean[channel], norm.running_var[channel]
    z = (x - mean[:, None, None]) / torch.sqrt(var + norm.eps)[:, None, None]
    return z * norm.weight[channel][:, None, None] + norm.bias[channel][:, None, None]


def activated(block: MixedInvertedResidual, x: Tensor) -> Tensor:
    """Return ReLU or swish, as the block has it."""
    swish = isinstance(block.atom_branches()[0].activation, nn.SiLU)
    return x * torch.sigmoid(x) if swish else x.clamp_min(0)


ALL = slice(None)


def fused(block: MixedInvertedResidual, x: Tensor, *, training: bool) -> Tensor:
    """One wide 1x1 convolution, split, a depthwise convolution for each part, concatenation, one projection."""
    branches = block.atom_branches()
    widths = [branch.project.in_channels for branch in branches]
    if isinstance(branches[0].expand, nn.Identity):
        wide = torch.cat([x] * len(branches), 1)
    else:
        wide = F.conv2d(x, torch.cat([branch.expand.conv.weight for branch in branches]))
        parts = [
            normalised(part, branch.expand.norm, ALL, training)
            for part, branch in zip(wide.split(widths, 1), branches, strict=True)
        ]
        wide = activated(block, torch.cat(parts, 1))
    outputs = []
    for part, branch in zip(wide.split(widths, 1), branches, strict=True):
        conv = branch.depthwise
        y = F.conv2d(part, conv.weight, stride=conv.stride, padding=conv.kernel_size[0] // 2, groups=part.shape[1])
        outputs.append(normalised(y, branch.norm, ALL, training))
    hidden = activated(block, torch.cat(outputs, 1))
    if block.squeeze is not None:
        se = block.squeeze
        pooled = hidden.mean((2, 3), keepdim=True)
        bottleneck = activated(block, F.conv2d(pooled, se.reduce.weight, se.reduce.bias))
        hidden = hidden * torch.sigmoid(F.conv2d(bottleneck, se.expand.weight, se.expand.bias))
    y = F.conv2d(hidden, torch.cat([branch.project.weight for branch in branches], 1))
    y = normalised(y, block.norm, ALL, training)
    return y + x if block.residual else y


def atom_by_atom(block: MixedInvertedResidual, x: Tensor, *, training: bool) -> Tensor:
    """``BN(sum_i p_i act(BN2_i(d_i * act(BN1_i(<e_i, x>)))))``, plus x: the definition of the atom."""
    total = torch.zeros(())
    for branch in block.atom_branches():
        conv = branch.depthwise
        for i in range(branch.project.in_channels):
            one = slice(i, i + 1)
            if isinstance(branch.expand, nn.Identity):
                h = x[:, one]
            else:
                h = torch.einsum("c,bchw->bhw", branch.expand.conv.weight[i, :, 0, 0], x)[:, None]
                h = activated(block, normalised(h, branch.expand.norm, one, training))
            h = F.conv2d(h, conv.weight[one], stride=conv.stride, padding=(conv.kernel_size[0] - 1) // 2)
            h = activated(block, normalised(h, branch.norm, one, training))
            total = total + torch.einsum("o,bhw->bohw", branch.project.weight[:, i, 0, 0], h[:, 0])
    y = normalised(total, block.norm, ALL, training)
    return y + x if block.residual else y
