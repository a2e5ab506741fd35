"""Time-delay networks: convolutions over time on sequences of features, one layer of which lowers the frame rate.

Source: the acoustic models of ST-NAS, arXiv 2011.05649.
"""

# B batch, P planes, M bands, T time, F features, K outputs

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class TimeDelay(nn.Module):
    """Convolution over time, ReLU, layer normalisation over the features, dropout; in this order.

    Args:
        in_features: Features of a frame of the input (B, T, F).
        out_features: Features of a frame of the output (B, T', F').
        context: C: the kernel has 2 C + 1 taps.
        dilation: D: they are D frames apart; the padding is C D on both sides.
        dropout: Probability of a zero behind the normalisation.
        stride: Frames between two frames of the output; T' = ceil(T / stride).
    """

    def __init__(
        self, in_features: int, out_features: int, context: int, dilation: int, dropout: float, stride: int = 1
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            in_features, out_features, 2 * context + 1, stride, padding=context * dilation, dilation=dilation
        )
        self.relu = nn.ReLU()
        self.norm = nn.LayerNorm(out_features)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, F) to (B, T', F')."""
        y = self.relu(self.conv(x.transpose(1, 2)))
        return self.dropout(self.norm(y.transpose(1, 2)))


def context_and_dilation(name: str) -> tuple[int, int]:
    """Return (C, D) of a candidate's name, ``C2D1`` say.

    Raises:
        ValueError: No such name.
    """
    digits = name[1::2]
    if len(name) != 4 or name[::2] != "CD" or not digits.isdecimal() or "0" in digits:
        raise ValueError(f"block: got {name!r}; allowed: 'C<half context>D<dilation>', 'C2D1' say.")
    return int(digits[0]), int(digits[1])


class TdnnNetwork(nn.Module):
    """From features over time to log-probabilities of tokens, at a third of the frame rate.

    Blocks of one width; behind some of them one fixed layer with kernel 3 and stride 3 ("mixed frame rate"); a linear
    layer and the logarithm of the softmax. Frames behind the end of a shorter example are computed like all others:
    whoever uses the output takes its first ``length * T' / T`` frames.

    Args:
        in_features: Features of a frame, P M.
        num_classes: K, the tokens with the blank among them.
        width: Features behind every block.
        blocks: ``C<half context>D<dilation>`` of each block.
        stride_after: Number of blocks in front of the layer with stride 3; 0 puts it first.
        dropout: Of all layers.
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        width: int,
        blocks: tuple[str, ...],
        stride_after: int = 3,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.names = tuple(blocks)
        self.stride_after = stride_after
        self.drop_probability = dropout
        self.in_features = in_features
        self.blocks = nn.ModuleList()
        features = width if stride_after == 0 else in_features
        for name in self.names:
            self.blocks.append(TimeDelay(features, width, *context_and_dilation(name), dropout))
            features = width
        self.slower = TimeDelay(width if stride_after else in_features, width, 1, 1, dropout, 3)
        self.classifier = nn.Linear(width, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return log-probabilities (B, ceil(T / 3), K) for features (B, P, M, T)."""
        x = x.flatten(1, 2).transpose(1, 2)
        for number, block in enumerate(self.blocks):
            x = self.slower(x) if number == self.stride_after else x
            x = block(x)
        x = self.slower(x) if self.stride_after == len(self.blocks) else x
        return torch.log_softmax(self.classifier(x), dim=-1)

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        return {
            "in_features": self.in_features,
            "num_classes": self.classifier.out_features,
            "width": self.classifier.in_features,
            "blocks": self.names,
            "stride_after": self.stride_after,
            "dropout": self.drop_probability,
        }
