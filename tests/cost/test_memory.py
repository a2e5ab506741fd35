"""Peak activation and weight bytes of whole networks against hand computation."""

import torch
from torch import nn

from archsmith.cost import peak_activation_bytes, weight_bytes


def test_convolutional_network_by_hand():
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),  # input 3*64, output 16*64
        nn.BatchNorm2d(16),  # 16*64 + 16*64: the peak
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 8, 3, stride=2, padding=1),  # 16*64 + 8*16
    )
    assert peak_activation_bytes(net, torch.zeros(1, 3, 8, 8)) == 4 * 2 * 16 * 64
    assert peak_activation_bytes(net, torch.zeros(5, 3, 8, 8)) == 5 * 4 * 2 * 16 * 64
    assert peak_activation_bytes(net.bfloat16(), torch.zeros(1, 3, 8, 8, dtype=torch.bfloat16)) == 2 * 2 * 16 * 64


def test_meta_network_and_mode():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(10, 10_000_000), nn.Dropout(0.5), nn.Linear(10_000_000, 1))
    assert peak_activation_bytes(net.train(), torch.zeros(1, 10)) == 4 * (10_000_000 + 10)
    assert all(module.training for module in net.modules())


def test_weight_bytes_count_parameters_and_buffers_once():
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), nn.BatchNorm1d(4))
    net[1].weight = net[0].weight
    assert weight_bytes(net) == 4 * (16 + 4 * 4) + 8
    assert weight_bytes(net.half()) == 2 * (16 + 4 * 4) + 8
