"""Networks with closed-form weights, as the facts in ``golden/eas.json`` describe them."""

import json
from pathlib import Path

import numpy as np
import torch

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden/eas.json").read_text())["cases"]


def closed_form(count, p):
    """Return h(i, p) for i < count: the fraction of a large sine, minus a half."""
    x = np.sin(12.9898 * np.arange(count, dtype=np.float64) + 78.233 * p) * 43758.5453
    return torch.from_numpy(x - np.floor(x) - 0.5)


def images():
    return (2 * closed_form(2 * 32 * 32 * 3, 0)).reshape(2, 32, 32, 3).permute(0, 3, 1, 2).contiguous()


def weight_(tensor, s):
    """Fill (out, in, k, k) or (out, in) from the closed form of (k, k, in, out) or (in, out)."""
    shape = (*tuple(tensor.shape[2:]), tensor.shape[1], tensor.shape[0])
    values = (2 * (6 / (np.prod(shape[:-1]))) ** 0.5 * closed_form(tensor.numel(), s)).reshape(shape)
    tensor.copy_(values.permute(3, 2, 0, 1) if tensor.dim() == 4 else values.T)


def norm_(norm, s):
    count = norm.num_features
    norm.bias.copy_(0.2 * closed_form(count, s + 0.1))
    norm.weight.copy_(1 + 0.4 * closed_form(count, s + 0.2))
    norm.running_mean.copy_(0.2 * closed_form(count, s + 0.3))
    norm.running_var.copy_(1 + 0.6 * closed_form(count, s + 0.4))


def classifier_(linear, s):
    weight_(linear.weight, s)
    linear.bias.copy_(0.2 * closed_form(len(linear.bias), s + 0.5))


@torch.no_grad()
def filled_plain(network):
    network, s = network.double().eval(), 0
    for number, block in enumerate(network.blocks):
        for layer in block:
            s += 1
            weight_(layer.linear.weight, s)
            norm_(layer.norm, s)
        s += number < len(network.convs)  # the pool behind the block
    classifier_(network.classifier, s + 1)
    return network


@torch.no_grad()
def filled_dense(network):
    network, s = network.double().eval(), 1
    weight_(network.stem.weight, s)
    for number, block in enumerate(network.blocks):
        for miniblock in block:
            for norm, conv in ((miniblock.norm1, miniblock.conv1), (miniblock.norm2, miniblock.conv2)):
                s += 1
                norm_(norm, s)
                weight_(conv.weight, s)
        s += 1
        if number < len(network.transitions):
            norm_(network.transitions[number].norm, s)
            weight_(network.transitions[number].conv.weight, s)
            s += 1  # its pool
        else:
            norm_(network.norm, s)
    classifier_(network.classifier, s + 1)
    return network


def params(network):
    return sum(parameter.numel() for parameter in network.parameters())
