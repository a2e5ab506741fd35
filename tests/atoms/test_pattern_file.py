"""Pruned networks as files: what is stored, reload, and files that are not sound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from archsmith.atoms.pattern_file import KernelChoice, dense_weights, load_packed, packed_model, save_packed
from archsmith.atoms.weight_masks import FIXED_POOL, Kernels, Patterns
from archsmith.core.errors import UserError
from archsmith.layers.pattern_conv import PatternConv2d
from archsmith.layers.plain_nets import PlainResNet

POOL = FIXED_POOL[:4]


def pruned() -> tuple[nn.Module, dict[str, KernelChoice]]:
    torch.manual_seed(0)
    net = PlainResNet((1, 1), (4, 8), True, False, 3, 5).eval()
    choices = {}
    for name in ("layer1.0.conv2", "layer2.0.conv1", "layer2.0.conv2"):
        weight = net.get_submodule(name).weight
        scores = weight.detach().double().square()
        kept = Kernels(40).choose_kernels(scores)
        ids = Patterns(POOL).choose_ids(scores) if weight.shape[2] == 3 else None
        mask = kept[:, :, None, None] & (torch.tensor(True) if ids is None else Patterns(POOL).mask_of(ids))
        weight.data.mul_(mask)
        choices[name] = KernelChoice(kept, ids)
    return net, choices


def test_saved_and_loaded_it_is_the_same_network(tmp_path: Path) -> None:
    net, choices = pruned()
    packed = packed_model(net, choices, POOL)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = net(x)
        assert torch.allclose(packed(x), expected, atol=1e-5)
        save_packed(tmp_path / "new" / "pruned", packed)
        torch.manual_seed(1)
        loaded = load_packed(tmp_path / "new" / "pruned", PlainResNet((1, 1), (4, 8), True, False, 3, 5)).eval()
        assert torch.equal(loaded(x), packed(x))
    again = PlainResNet((1, 1), (4, 8), True, False, 3, 5).eval()
    again.load_state_dict(dense_weights(tmp_path / "new" / "pruned"))
    for name, tensor in net.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor)
    assert isinstance(net.get_submodule("layer1.0.conv2"), nn.Conv2d)  # the original is not touched
    assert isinstance(packed.get_submodule("layer1.0.conv2"), PatternConv2d)


def test_the_files_say_what_a_code_generator_needs(tmp_path: Path) -> None:
    net, choices = pruned()
    save_packed(tmp_path, packed_model(net, choices, POOL))
    described = json.loads((tmp_path / "patterns.json").read_text())
    assert described["format"] == "archsmith.patterns/1"
    layer = described["layers"]["layer2.0.conv2"]
    assert layer["patterns"] == [list(pattern) for pattern in POOL] and layer["stride"] == [2, 2]
    tensors = load_file(tmp_path / "patterns.safetensors")
    kept = int(choices["layer2.0.conv2"].kept.sum())
    assert tensors["layer2.0.conv2.values"].shape == (kept, 4)
    assert tensors["layer2.0.conv2.pattern"].shape == tensors["layer2.0.conv2.channel"].shape == (kept,)
    counts = tensors["layer2.0.conv2.filters"].diff().tolist()
    assert counts == choices["layer2.0.conv2"].kept.sum(1).tolist()
    assert tensors["layer2.0.conv1.values"].shape[1] == 1  # a 1x1 kernel has one weight
    assert "layer2.0.conv2.weight" not in tensors and "linear.weight" in tensors


def test_unsound_files_and_other_networks_are_refused(tmp_path: Path) -> None:
    net, choices = pruned()
    packed = packed_model(net, choices, POOL)
    save_packed(tmp_path, packed)
    with pytest.raises(UserError, match="model: got a network without the convolution"):
        load_packed(tmp_path, nn.Linear(2, 2))
    with pytest.raises(UserError, match=r"model: got Error\(s\) in loading.*allowed: the network that was saved"):
        load_packed(tmp_path, PlainResNet((1, 1), (8, 8), True, False, 3, 5))
    with pytest.raises(UserError, match="allowed: a folder that save_packed wrote"):
        dense_weights(tmp_path / "elsewhere")
    path = tmp_path / "patterns.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(UserError, match=r"allowed: patterns.safetensors as it was written"):
        dense_weights(tmp_path)
    (tmp_path / "patterns.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match=r"allowed: files of the format archsmith.patterns/1"):
        dense_weights(tmp_path)
    with pytest.raises(UserError, match="model: got a network without pattern convolutions"):
        save_packed(tmp_path, net)
    with pytest.raises(UserError, match="layer: got 'linear'; allowed: the qualified name of a Conv2d"):
        packed_model(net, {"linear": choices["layer1.0.conv2"]}, POOL)
    same = nn.Sequential(nn.Conv2d(2, 2, 3, padding="same"))
    with pytest.raises(UserError, match=r"0: got padding: got 'same'.*; allowed: zero padding in numbers"):
        packed_model(same, {"0": KernelChoice(torch.ones(2, 2, dtype=torch.bool))}, POOL)
