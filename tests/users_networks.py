"""Networks as users bring them: factories that the command line names."""

import torch
from torch import Tensor, nn


class DigitsNet(nn.Module):
    """A residual sum and a concatenation, for images of 8 x 8."""

    def __init__(self, stem: int = 8, left: int = 12, right: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem), nn.ReLU())
        self.inner = nn.Sequential(nn.Conv2d(stem, stem, 3, padding=1, bias=False), nn.BatchNorm2d(stem))
        self.left = nn.Sequential(nn.Conv2d(stem, left, 3, stride=2, bias=False), nn.BatchNorm2d(left), nn.ReLU())
        self.right = nn.Sequential(nn.Conv2d(stem, right, 3, stride=2, bias=False), nn.BatchNorm2d(right), nn.ReLU())
        self.head = nn.Linear(left + right, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = torch.relu(x + self.inner(x))
        return self.head(torch.cat([self.left(x), self.right(x)], 1).mean((2, 3)))


def digits_net() -> nn.Module:
    return DigitsNet()


def nine_classes() -> nn.Module:
    network = DigitsNet()
    network.head = nn.Linear(22, 9)
    return network


def colour_net() -> nn.Module:
    network = DigitsNet()
    network.stem[0] = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    return network
