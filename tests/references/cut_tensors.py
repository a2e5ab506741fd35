"""Cutting atoms on paper: what every tensor of a mobile network must be after a cut, by its name alone."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

BRANCH = re.compile(r"(blocks\.\d+\.branches\.k\d)\.(.+)")
SQUEEZE = re.compile(r"(blocks\.\d+)\.squeeze\.(.+)")


def cut_by_name(name: str, tensor: Tensor, keep: Mapping[str, Tensor]) -> Tensor | None:
    """Return the rows or columns of ``tensor`` that stay, or None when the tensor vanishes."""
    if branch := BRANCH.match(name):
        mask = keep.get(branch[1])
        if mask is None or tensor.dim() == 0:
            return tensor if mask is None or mask.any() else None
        if not mask.any():
            return None
        return tensor[:, mask] if branch[2] == "project.weight" else tensor[mask]
    block = re.match(r"blocks\.\d+", name)
    masks = [mask for group, mask in keep.items() if block and group.startswith(f"{block[0]}.branches.")]
    if masks and not torch.cat(masks).any():
        return tensor if name == f"{block[0]}.norm.bias" else None
    if (squeeze := SQUEEZE.match(name)) and masks and tensor.dim():
        mask = torch.cat(masks)
        if squeeze[2] == "reduce.weight":
            return tensor[:, mask]
        if squeeze[2] in ("expand.weight", "expand.bias"):
            return tensor[mask]
    return tensor


def cut_table(table: Mapping[str, Tensor], keep: Mapping[str, Tensor], *, eps: float = 1e-3) -> dict[str, Tensor]:
    """Return a whole table of network tensors after a cut with ReLU constants absorbed."""
    table = {name: tensor.detach().clone() for name, tensor in table.items()}
    for block in {group.split(".branches.")[0] for group in keep}:
        constant = torch.zeros_like(table[f"{block}.norm.running_mean"])
        masks = {group: mask for group, mask in keep.items() if group.startswith(f"{block}.branches.")}
        for group, mask in masks.items():
            for i in torch.nonzero(~mask).flatten().tolist():
                constant += table[f"{group}.project.weight"][:, i, 0, 0] * table[f"{group}.norm.bias"][i].clamp_min(0)
        mean = table[f"{block}.norm.running_mean"] - constant
        table[f"{block}.norm.running_mean"] = mean
        if not torch.cat(list(masks.values())).any():  # what the normalisation makes of zero is all that is left
            weight, var = table[f"{block}.norm.weight"], table[f"{block}.norm.running_var"]
            table[f"{block}.norm.bias"] = table[f"{block}.norm.bias"] - weight * mean / (var + eps).sqrt()
    cut = {name: cut_by_name(name, tensor, keep) for name, tensor in table.items()}
    return {name: tensor for name, tensor in cut.items() if tensor is not None}
