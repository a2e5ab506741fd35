"""Encoders for text in which every layer has its own operator, width, heads and feed-forward stack.

Six operators mix the positions of a sequence: self-attention by scaled dot products ("sdp") or with a weight matrix
between queries and keys ("wma"), a linear transform ("dft", "dct"), and a convolution whose kernels depend on the text,
beside attention (kernel size 5, 9, 13, ...).

Source: Tuli et al. 2022, "FlexiBERT", arXiv 2205.11656; the operators as trained for the benchmark of arXiv 2306.00288;
the convolution from ConvBERT, arXiv 2008.02496.
"""

# B batch, T positions, N heads, D features of a head, H hidden features, K kernel positions

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

NORM_EPS = 1e-12
PADDING = 0
"""Number of the padding token: no attention looks at it, and pooling leaves it out."""


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Return (B, T, H) as (B, N, T, D)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """Return (B, N, T, D) as (B, T, H)."""
    return x.transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    """Attention of all positions to all; no output projection.

    Args:
        hidden: H, of input and output.
        heads: N, a divisor of H.
        weighted: With one more matrix on the queries ("wma"): scores are ``(W q)^T k / sqrt(D)``. With W = 1 it is the
            plain product ("sdp").
        dropout: Probability that a weight of the mixture is zero.
    """

    def __init__(self, hidden: int, heads: int, weighted: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"heads: got {heads}; allowed: a divisor of the hidden size {hidden}.")
        self.heads = heads
        self.out_features = hidden
        self.query = nn.Linear(hidden, hidden)
        self.key = nn.Linear(hidden, hidden)
        self.value = nn.Linear(hidden, hidden)
        self.multiply = nn.Linear(hidden, hidden, bias=False) if weighted else nn.Identity()
        self.softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to the same shape.

        Args:
            x: The sequence.
            bias: Added to the scores, broadcast to (B, N, T, T): large negative numbers hide positions.
        """
        query = split_heads(self.multiply(self.query(x)), self.heads)
        key, value = split_heads(self.key(x), self.heads), split_heads(self.value(x), self.heads)
        scores = query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])
        if bias is not None:
            scores = scores + bias
        return merge_heads(self.dropout(self.softmax(scores)) @ value)


def written_as_graph() -> bool:
    """Return whether the call is being exported, to ONNX say, and not computed."""
    return torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export()


def fourier_matrices(size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine parts (size, size) of the discrete Fourier transform, ``exp(-2 pi i j k / size)``."""
    steps = torch.arange(size, device=like.device)
    angles = (2 * math.pi / size) * ((steps[:, None] * steps) % size).to(like.dtype)
    return angles.cos(), -angles.sin()


def fourier_real(x: Tensor) -> Tensor:
    """Return the real part of the unnormalised two-dimensional Fourier transform over the last two axes.

    Graphs that are exported have products with its matrices in place of the fast transform, which ONNX has no real
    part of.
    """
    if not written_as_graph():
        return torch.fft.fft2(x).real
    rows_cos, rows_sin = fourier_matrices(x.shape[-2], x)
    columns_cos, columns_sin = fourier_matrices(x.shape[-1], x)
    return rows_cos @ x @ columns_cos - rows_sin @ x @ columns_sin


def cosine_transform(x: Tensor) -> Tensor:
    """Return the unnormalised cosine transform of type II over the last axis: ``2 sum_n x_n cos(pi k (2n + 1) / 2N)``.

    By one Fourier transform of the even positions followed by the odd ones backwards (Makhoul 1980).
    """
    size = x.shape[-1]
    steps = torch.arange(size, device=x.device)
    if written_as_graph():
        angles = (math.pi / (2 * size)) * (((2 * steps[:, None] + 1) * steps) % (4 * size)).to(x.dtype)
        return 2 * x @ angles.cos()
    order = torch.cat([steps[::2], steps[1::2].flip(0)])
    spectrum = torch.fft.fft(x[..., order])
    angles = (math.pi / (2 * size)) * steps.to(x.dtype)
    return 2 * (spectrum.real * angles.cos() + spectrum.imag * angles.sin())


class LinearTransform(nn.Module):
    """A linear layer, then a fixed transform of every head over positions and features.

    Args:
        hidden: H, of input and output.
        heads: N, a divisor of H.
        kind: "dft" (the real part) or "dct" (type II); both unnormalised, padding is transformed like all else.
    """

    def __init__(self, hidden: int, heads: int, kind: str) -> None:
        super().__init__()
        if hidden % heads:
            raise ValueError(f"heads: got {heads}; allowed: a divisor of the hidden size {hidden}.")
        if kind not in ("dft", "dct"):
            raise ValueError(f"kind: got {kind!r}; allowed: 'dft' or 'dct'.")
        self.heads = heads
        self.kind = kind
        self.out_features = hidden
        self.input = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to the same shape; ``bias`` has no effect."""
        y = split_heads(self.input(x), self.heads)
        if self.kind == "dft":
            return merge_heads(fourier_real(y))
        return merge_heads(cosine_transform(cosine_transform(y).transpose(-1, -2)).transpose(-1, -2))


class SpanConvolution(nn.Module):
    """Half of the heads attend, as many convolve over neighbouring positions with kernels made from the text.

    Args:
        hidden: H, of the input.
        heads: N, a divisor of H; max(1, N // 2) heads attend and as many convolve, so the output has H features where
            N is even.
        kernel: K, odd.
        dropout: Probability that a weight of the attention's mixture is zero.
    """

    def __init__(self, hidden: int, heads: int, kernel: int, dropout: float = 0.0) -> None:
        super().__init__()
        if hidden % heads or kernel % 2 == 0 or kernel < 1:
            raise ValueError(f"heads, kernel: got {heads}, {kernel}; allowed: a divisor of {hidden}, an odd number.")
        self.heads = max(1, heads // 2)
        self.kernel = kernel
        features = self.heads * (hidden // heads)
        self.out_features = 2 * features
        self.query = nn.Linear(hidden, features)
        self.key = nn.Linear(hidden, features)
        self.value = nn.Linear(hidden, features)
        self.key_depthwise = nn.Conv1d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden, bias=False)
        self.key_pointwise = nn.Conv1d(hidden, features, 1)
        self.kernels = nn.Linear(features, self.heads * kernel)
        self.spans = nn.Linear(hidden, features)
        self.softmax = nn.Softmax(dim=-1)
        self.kernel_softmax = nn.Softmax(dim=-1)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to (B, T, out_features); ``bias`` as for ``SelfAttention``."""
        query = self.query(x)
        local = self.key_pointwise(self.key_depthwise(x.transpose(1, 2))).transpose(1, 2)
        weights = self.kernel_softmax(self.kernels(local * query).unflatten(-1, (self.heads, self.kernel)))
        padded = functional.pad(self.spans(x), (0, 0, self.kernel // 2, self.kernel // 2), value=0.0)
        shifted = [padded[:, k : k + x.shape[1]] for k in range(self.kernel)]
        windows = torch.stack(shifted, dim=-1).unflatten(2, (self.heads, -1))  # (B, T, N, D, K)
        convolved = (windows @ weights.unsqueeze(-1)).flatten(2)
        heads = split_heads(query, self.heads)
        scores = heads @ split_heads(self.key(x), self.heads).transpose(-1, -2) / math.sqrt(heads.shape[-1])
        if bias is not None:
            scores = scores + bias
        attended = self.dropout(self.softmax(scores)) @ split_heads(self.value(x), self.heads)
        return torch.cat([merge_heads(attended), convolved], dim=-1)


def text_operator(operation: str, parameter: str | int, hidden: int, heads: int, dropout: float = 0.0) -> nn.Module:
    """Return an operator: "sa" with "sdp" or "wma", "l" with "dft" or "dct", "c" with a kernel size.

    Raises:
        ValueError: No such combination.
    """
    if operation == "sa" and parameter in ("sdp", "wma"):
        return SelfAttention(hidden, heads, parameter == "wma", dropout)
    if operation == "l":
        return LinearTransform(hidden, heads, str(parameter))
    if operation == "c" and isinstance(parameter, int):
        return SpanConvolution(hidden, heads, parameter, dropout)
    raise ValueError(
        f"operation: got {operation!r} with {parameter!r}; allowed: sa (sdp, wma), l (dft, dct), c (5, 9)."
    )


class FeedForward(nn.Module):
    """Linear layers with GELU between, one for each size and one back to H; added to the input and normalised.

    Args:
        hidden: H.
        sizes: Features behind each layer, at least one.
        dropout: Probability of a zero in front of the sum.
    """

    def __init__(self, hidden: int, sizes: Sequence[int], dropout: float = 0.0) -> None:
        super().__init__()
        if not sizes:
            raise ValueError("sizes: got none; allowed: at least one size.")
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip((hidden, *sizes), sizes, strict=False))
        self.output = nn.Linear(sizes[-1], hidden)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """Map (B, T, H) to the same shape."""
        y = x
        for layer in self.layers:
            y = functional.gelu(layer(y))
        return cast(Tensor, self.norm(x + self.dropout(self.output(y))))


class FlexiLayer(nn.Module):
    """One encoder layer: an operator and a feed-forward stack.

    Args:
        hidden: H.
        operation: "sa", "l" or "c".
        parameter: See ``text_operator``.
        heads: N, a divisor of H.
        sizes: Of the feed-forward stack.
        dropout: Of the operator's mixture and of both sums.
        transform_output: Whether linear transforms too have an output projection, the sum and the normalisation, as the
            paper's graph draws them. The networks that were published as trained have none (False).
    """

    def __init__(
        self,
        hidden: int,
        operation: str,
        parameter: str | int,
        heads: int,
        sizes: Sequence[int],
        dropout: float = 0.0,
        transform_output: bool = False,
    ) -> None:
        super().__init__()
        self.operator = text_operator(operation, parameter, hidden, heads, dropout)
        self.output: nn.Linear | None = None
        if operation != "l" or transform_output:
            self.output = nn.Linear(int(self.operator.out_features), hidden)  # type: ignore[arg-type]
            self.dropout = nn.Dropout(dropout)
            self.norm = nn.LayerNorm(hidden, eps=NORM_EPS)
        self.feed_forward = FeedForward(hidden, sizes, dropout)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map (B, T, H) to the same shape; ``bias`` as for ``SelfAttention``."""
        y = self.operator(x, bias)
        if self.output is not None:
            y = self.norm(x + self.dropout(self.output(y)))
        return cast(Tensor, self.feed_forward(y))


class TextEmbedding(nn.Module):
    """Token, position and segment embeddings, normalised.

    Args:
        vocabulary: Number of tokens.
        positions: Longest sequence.
        features: Of the output.
        dropout: Behind the normalisation.
    """

    def __init__(self, vocabulary: int, positions: int, features: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, features, padding_idx=PADDING)
        self.positions = nn.Embedding(positions, features)
        self.segments = nn.Embedding(2, features)
        self.norm = nn.LayerNorm(features, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor, segments: Tensor | None = None) -> Tensor:
        """Return (B, T, features) for token numbers (B, T); ``segments`` are zeros where not given."""
        if tokens.shape[1] > self.positions.num_embeddings:
            raise ValueError(f"tokens: got {tokens.shape[1]} positions; allowed: {self.positions.num_embeddings}.")
        places = torch.arange(tokens.shape[1], device=tokens.device)
        kinds = torch.zeros_like(tokens) if segments is None else segments
        return cast(
            Tensor, self.dropout(self.norm(self.tokens(tokens) + self.segments(kinds) + self.positions(places)))
        )


class FlexiEncoder(nn.Module):
    """Embeddings and encoder layers of any sizes; a linear layer stands wherever the hidden size changes.

    Args:
        vocabulary: Number of tokens.
        positions: Longest sequence.
        embedding: Features of the embeddings.
        layers: For each layer (operation, parameter, hidden, heads, feed-forward sizes), at least one.
        dropout: Of all layers.
        transform_output: See ``FlexiLayer``.
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        embedding: int,
        layers: Sequence[tuple[str, str | int, int, int, Sequence[int]]],
        dropout: float = 0.0,
        transform_output: bool = False,
    ) -> None:
        super().__init__()
        self.plan = tuple((o, p, h, n, tuple(f)) for o, p, h, n, f in layers)
        self.out_features = self.plan[-1][2]
        self.embeddings = TextEmbedding(vocabulary, positions, embedding, dropout)
        self.projections = nn.ModuleList()
        self.layers = nn.ModuleList()
        width = embedding
        for operation, parameter, hidden, heads, sizes in self.plan:
            self.projections.append(nn.Linear(width, hidden) if width != hidden else nn.Identity())
            self.layers.append(FlexiLayer(hidden, operation, parameter, heads, sizes, dropout, transform_output))
            width = hidden

    def forward(self, tokens: Tensor, mask: Tensor | None = None, segments: Tensor | None = None) -> Tensor:
        """Return the hidden states (B, T, H of the last layer) of token numbers (B, T).

        Args:
            tokens: Whole numbers from 0.
            mask: (B, T), true where attention may look; everywhere but on padding if None.
            segments: (B, T) of 0 and 1; zeros if None.
        """
        mask = tokens != PADDING if mask is None else mask
        x = self.embeddings(tokens, segments)
        bias = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask.bool(), torch.finfo(x.dtype).min)[:, None, None]
        for projection, layer in zip(self.projections, self.layers, strict=True):
            x = layer(projection(x), bias)
        return x


class FlexiClassifier(nn.Module):
    """A heterogeneous encoder with a head that classifies whole sequences.

    Args:
        vocabulary: Number of tokens.
        positions: Longest sequence.
        embedding: Features of the embeddings.
        layers: See ``FlexiEncoder``.
        num_classes: Classes.
        dropout: Of all layers.
        transform_output: See ``FlexiLayer``.
        pooling: "mean" over the tokens that are not padding, or "first".
    """

    def __init__(
        self,
        vocabulary: int,
        positions: int,
        embedding: int,
        layers: Sequence[tuple[str, str | int, int, int, Sequence[int]]],
        num_classes: int,
        dropout: float = 0.0,
        transform_output: bool = False,
        pooling: str = "mean",
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling: got {pooling!r}; allowed: 'mean' or 'first'.")
        self.encoder = FlexiEncoder(vocabulary, positions, embedding, layers, dropout, transform_output)
        self.pooling = pooling
        self.drop_probability = dropout
        self.transform_output = transform_output
        self.pooler = nn.Linear(self.encoder.out_features, self.encoder.out_features)
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(self.encoder.out_features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, classes) of token numbers: whole numbers, as floats too, (B, T) or (B, 1, 1, T)."""
        tokens = x.flatten(1).long()
        hidden = self.encoder(tokens)
        if self.pooling == "first":
            pooled = hidden[:, 0]
        else:
            mask = (tokens != PADDING).to(hidden.dtype).unsqueeze(-1)
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
        return cast(Tensor, self.classifier(self.dropout(torch.tanh(self.pooler(pooled)))))

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        embeddings = self.encoder.embeddings
        return {
            "vocabulary": embeddings.tokens.num_embeddings,
            "positions": embeddings.positions.num_embeddings,
            "embedding": embeddings.tokens.embedding_dim,
            "layers": self.encoder.plan,
            "num_classes": self.classifier.out_features,
            "dropout": self.drop_probability,
            "transform_output": self.transform_output,
            "pooling": self.pooling,
        }
