"""Counts of published AtomNAS networks: the numbers that the reference profiler prints and the paper rounds.

Origin: the reference implementation at a3ea885, run once; rows are (out channels, stride, kernels, atoms per kernel,
whether the block expands). The networks are rebuilt here from plain layers, so that only the counting is tested.
"""

import pytest
import torch
from torch import nn

from archsmith.cost import count

LAST, CLASSES = 1280, 1000
SUPERNET = (
    [(16, 1, (3,), (32,), False)]
    + [(24, 2 if i == 0 else 1, (3, 5, 7), None, True) for i in range(4)]
    + [(40, 2 if i == 0 else 1, (3, 5, 7), None, True) for i in range(4)]
    + [(80, 2 if i == 0 else 1, (3, 5, 7), None, True) for i in range(4)]
    + [(96, 1, (3, 5, 7), None, True) for _ in range(4)]
    + [(192, 2 if i == 0 else 1, (3, 5, 7), None, True) for i in range(4)]
    + [(320, 1, (3, 5, 7), None, True)]
)
ATOMS_A = [
    (16,), (16, 12, 9), (19, 2, 1), (9, 7, 1), (14, 1), (46, 49, 50), (27, 19, 14), (22, 11, 3), (30, 14, 3),
    (127, 130, 111), (33, 25, 45), (38, 12, 34), (53, 23, 19), (344, 196, 168), (44, 18, 27), (37, 29, 18),
    (52, 21, 24), (381, 364, 342), (123, 76, 162), (179, 107, 212), (238, 111, 171), (654, 495, 546),
]  # fmt: skip
NETWORK_A = [(out, s, k[: len(a)], a, e) for (out, s, k, _, e), a in zip(SUPERNET, ATOMS_A, strict=True)]


class MixedBlock(nn.Module):
    """Inverted residual with one branch per kernel size: expand, depthwise, project, sum."""

    def __init__(self, ins, out, stride, kernels, atoms, expand):
        super().__init__()
        self.residual = stride == 1 and ins == out
        self.branches = nn.ModuleList()
        for kernel, width in zip(kernels, atoms, strict=True):
            layers = [nn.Conv2d(ins, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()] if expand else []
            layers += [
                nn.Conv2d(width, width, kernel, stride, kernel // 2, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU(inplace=True),
                nn.Conv2d(width, out, 1, bias=False),
            ]
            self.branches.append(nn.Sequential(*layers))
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x):
        y = self.norm(sum(branch(x) for branch in self.branches))
        return x + y if self.residual else y


def network(stem, rows):
    layers = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), nn.ReLU()]
    ins = stem
    for out, stride, kernels, atoms, expand in rows:
        layers.append(MixedBlock(ins, out, stride, kernels, atoms or [6 * ins] * len(kernels), expand))
        ins = out
    layers += [nn.Conv2d(ins, LAST, 1, bias=False), nn.BatchNorm2d(LAST), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(LAST, CLASSES))


@pytest.mark.parametrize(
    ("stem", "rows", "resolution", "macs", "paper_macs", "params_conv_linear", "params"),
    [
        (16, NETWORK_A, 224, 258230561, 258293281, 3853848, 3885272),
        (32, SUPERNET, 224, 1520973056, 1521035776, 11109768, 11242152),
    ],
    ids=["AtomNAS-A at 224", "supernet at 224"],
)
def test_published_counts(stem, rows, resolution, macs, paper_macs, params_conv_linear, params):
    with torch.device("meta"):
        net, x = network(stem, rows), torch.zeros(2, 3, resolution, resolution)
    standard, paper = count(net, x), count(net, x, convention="paper")
    assert (standard.macs, paper.macs) == (macs, paper_macs)
    assert (standard.params_conv_linear, standard.params) == (params_conv_linear, params)
