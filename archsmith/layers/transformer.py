"""Transformers as plain layers, each with its own attention and FFN: grouped heads, any width, one matrix, or nothing.

``DecoderTransformer`` is what Llama, Qwen, Mistral and GPT-2 compute, ``EncoderTransformer`` what BERT does. They read
token numbers and hold no key-value cache.
"""

# B batch, T tokens, E residual width, H query heads, K key-value heads, D head width, V vocabulary

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class RMSNorm(nn.Module):
    """Divide by the root mean square of the last axis, then scale.

    Args:
        width: Length of the last axis.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., E) to the same shape; the mean square is taken in float32."""
        y = x.float()
        return self.weight * (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


def activated(x: Tensor, name: str) -> Tensor:
    """Return the activation called ``name`` of ``x``.

    Raises:
        ValueError: An unknown name.
    """
    if name == "gelu_tanh":
        return functional.gelu(x, approximate="tanh")
    if name not in ("silu", "gelu", "relu"):
        raise ValueError(f"activation: got {name!r}; allowed: 'silu', 'gelu', 'gelu_tanh', 'relu'.")
    found: Tensor = getattr(functional, name)(x)
    return found


def rotated(x: Tensor, angles: Tensor, scaling: float) -> Tensor:
    """Return (B, H, T, D) turned by ``angles`` (T, D / 2): channel i and channel i + D / 2 are a pair."""
    both = torch.cat([angles, angles], -1)
    first, second = x.chunk(2, -1)
    return x * (both.cos() * scaling) + torch.cat([-second, first], -1) * (both.sin() * scaling)


class GroupedAttention(nn.Module):
    """Softmax attention in which a key-value head serves H / K query heads.

    Args:
        width: Residual width E.
        heads: Query heads H.
        kv_heads: Key-value heads K, a divisor of H.
        head_dim: Width D of a head.
        causal: Whether a token sees itself and the past only.
        scale: Factor of the scores.
        bias: Query, key and value have biases.
        out_bias: The output has.
        window: Tokens that can be seen at most, itself included; 0 for all.
        head_norm: Epsilon of RMS norms over queries and keys, head by head; 0 for none.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        causal: bool,
        scale: float,
        bias: bool = False,
        out_bias: bool = False,
        window: int = 0,
        head_norm: float = 0.0,
    ) -> None:
        super().__init__()
        self.head_dim, self.causal, self.scale, self.window = head_dim, causal, scale, window
        self.q_proj = nn.Linear(width, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(width, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, width, bias=out_bias)
        if head_norm:
            self.q_norm, self.k_norm = RMSNorm(head_dim, head_norm), RMSNorm(head_dim, head_norm)
        self.normed = bool(head_norm)

    def forward(self, x: Tensor, mask: Tensor | None, angles: Tensor | None, scaling: float) -> Tensor:
        """Map (B, T, E) to the same shape.

        Args:
            x: The residual stream.
            mask: (B, T), True at tokens that may be seen; None for all.
            angles: Of rotary positions (T, D / 2), or None.
            scaling: Factor of the rotation.
        """
        q, k, v = (f(x).unflatten(-1, (-1, self.head_dim)) for f in (self.q_proj, self.k_proj, self.v_proj))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if angles is not None:
            q, k = rotated(q, angles, scaling), rotated(k, angles, scaling)
        seen = self._seen(x.shape[1], x.device, mask)
        y = functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale, enable_gqa=True)
        output: Tensor = self.o_proj(y.transpose(1, 2).flatten(2))
        return output

    def _seen(self, tokens: int, device: torch.device, mask: Tensor | None) -> Tensor | None:
        """Return (1 or B, 1, T, T), True where a token may be seen, or None."""
        seen = None if mask is None else mask.bool()[:, None, None, :]
        if self.causal:
            at = torch.arange(tokens, device=device)
            past = at[:, None] >= at
            if self.window:
                past = past & (at[:, None] - at < self.window)
            seen = past[None, None] if seen is None else seen & past
        return seen


class TokenLinear(nn.Module):
    """One matrix in place of attention or an FFN."""

    def __init__(self, width: int, bias: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=bias)

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        """Map every token by itself."""
        output: Tensor = self.linear(x)
        return output


class FeedForward(nn.Module):
    """Two linear maps around an activation, with a gate or without.

    Args:
        width: Residual width E.
        inner: Width between the maps.
        activation: "silu", "gelu", "gelu_tanh" or "relu".
        gated: The activation goes through a map of its own and is multiplied onto the other.
        bias: All maps have biases.
    """

    def __init__(self, width: int, inner: int, activation: str, gated: bool, bias: bool) -> None:
        super().__init__()
        self.activation, self.gated = activation, gated
        if gated:
            self.gate = nn.Linear(width, inner, bias=bias)
        self.up = nn.Linear(width, inner, bias=bias)
        self.down = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, *unused: Any) -> Tensor:
        """Map every token by itself."""
        y = (
            activated(self.gate(x), self.activation) * self.up(x)
            if self.gated
            else activated(self.up(x), self.activation)
        )
        output: Tensor = self.down(y)
        return output


class SubBlock(nn.Module):
    """One residual sub-block: ``x + f(norm(x))``, ``norm(x + f(x))``, the norm of x alone, or x.

    Args:
        width: Residual width E.
        kind: "attention", "ffn", "linear", "norm" or "none".
        norm: "rms" or "layer".
        eps: Of the norm.
        post: The norm stands behind the sum.
        settings: Arguments of ``GroupedAttention``, ``FeedForward`` or ``TokenLinear`` after the width.
    """

    def __init__(self, width: int, kind: str, norm: str, eps: float, post: bool, settings: dict[str, Any]) -> None:
        super().__init__()
        self.kind, self.post = kind, post
        if kind != "none":
            self.norm = RMSNorm(width, eps) if norm == "rms" else nn.LayerNorm(width, eps=eps)
        if kind == "attention":
            self.part: nn.Module = GroupedAttention(width, **settings)
        elif kind == "ffn":
            self.part = FeedForward(width, **settings)
        elif kind == "linear":
            self.part = TokenLinear(width, **settings)

    def forward(self, x: Tensor, mask: Tensor | None, angles: Tensor | None, scaling: float) -> Tensor:
        """Map the residual stream (B, T, E)."""
        if self.kind == "none":
            return x
        if self.kind == "norm":
            output: Tensor = self.norm(x)
            return output
        if self.post:
            output = self.norm(x + self.part(x, mask, angles, scaling))
            return output
        output = x + self.part(self.norm(x), mask, angles, scaling)
        return output


class DecoderTransformer(nn.Module):
    """A causal language model whose layers differ.

    Args:
        vocabulary: V.
        width: Residual width E.
        blocks: One (kind, settings) for each sub-block, in their order; see ``SubBlock``.
        norm: "rms" or "layer".
        eps: Of all norms outside of heads.
        positions: Learned positions, or 0.
        rotary: Width D of rotary positions, or 0; their frequencies are a buffer.
        rotary_scaling: Factor of the rotation.
        tied: The head is the embedding's matrix.
        head_bias: The head has a bias.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: tuple[tuple[str, dict[str, Any]], ...],
        norm: str,
        eps: float,
        positions: int = 0,
        rotary: int = 0,
        rotary_scaling: float = 1.0,
        tied: bool = False,
        head_bias: bool = False,
    ) -> None:
        super().__init__()
        self.arguments = {
            "vocabulary": vocabulary,
            "width": width,
            "blocks": blocks,
            "norm": norm,
            "eps": eps,
            "positions": positions,
            "rotary": rotary,
            "rotary_scaling": rotary_scaling,
            "tied": tied,
            "head_bias": head_bias,
        }
        self.embed = nn.Embedding(vocabulary, width)
        if positions:
            self.embed_positions = nn.Embedding(positions, width)
        if rotary:
            self.register_buffer("frequencies", torch.zeros(rotary // 2))
        self.blocks = nn.ModuleList(SubBlock(width, kind, norm, eps, False, settings) for kind, settings in blocks)
        self.norm = RMSNorm(width, eps) if norm == "rms" else nn.LayerNorm(width, eps=eps)
        if not tied:
            self.head = nn.Linear(width, vocabulary, bias=head_bias)

    def constructor(self) -> dict[str, Any]:
        """Return the arguments."""
        return dict(self.arguments)

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V).

        Args:
            ids: Token numbers (B, T).
            mask: (B, T), True or 1 at real tokens; None for all. Positions count from the first column.
        """
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids)
        if self.arguments["positions"]:
            x = x + self.embed_positions(at)
        angles = at[:, None].float() * self.get_buffer("frequencies") if self.arguments["rotary"] else None
        for block in self.blocks:
            x = block(x, mask, angles, self.arguments["rotary_scaling"])
        x = self.norm(x)
        logits: Tensor = functional.linear(x, self.embed.weight) if self.arguments["tied"] else self.head(x)
        return logits


class EncoderTransformer(nn.Module):
    """A post-norm encoder whose layers differ, with a head over the vocabulary or without.

    Args:
        vocabulary: V.
        width: Residual width E.
        blocks: One (kind, settings) for each sub-block, in their order; see ``SubBlock``.
        eps: Of all norms.
        positions: Learned positions.
        types: Kinds of tokens.
        head: Activation of a masked-language-model head whose matrix is the embedding's, or empty.
    """

    def __init__(
        self,
        vocabulary: int,
        width: int,
        blocks: tuple[tuple[str, dict[str, Any]], ...],
        eps: float,
        positions: int,
        types: int,
        head: str = "",
    ) -> None:
        super().__init__()
        self.arguments = {
            "vocabulary": vocabulary,
            "width": width,
            "blocks": blocks,
            "eps": eps,
            "positions": positions,
            "types": types,
            "head": head,
        }
        self.embed = nn.Embedding(vocabulary, width)
        self.embed_positions = nn.Embedding(positions, width)
        self.embed_types = nn.Embedding(types, width)
        self.norm = nn.LayerNorm(width, eps=eps)
        self.blocks = nn.ModuleList(SubBlock(width, kind, "layer", eps, True, settings) for kind, settings in blocks)
        self.head = head
        if head:
            self.head_linear, self.head_norm = nn.Linear(width, width), nn.LayerNorm(width, eps=eps)
            self.head_bias = nn.Parameter(torch.zeros(vocabulary))

    def constructor(self) -> dict[str, Any]:
        """Return the arguments."""
        return dict(self.arguments)

    def forward(self, ids: Tensor, mask: Tensor | None = None, types: Tensor | None = None) -> Tensor:
        """Return logits (B, T, V) where there is a head, else the last hidden state (B, T, E).

        Args:
            ids: Token numbers (B, T).
            mask: (B, T), True or 1 at real tokens; None for all.
            types: Kinds (B, T), by default 0.
        """
        at = torch.arange(ids.shape[1], device=ids.device)
        x = self.embed(ids) + self.embed_types(torch.zeros_like(ids) if types is None else types)
        x = self.norm(x + self.embed_positions(at))
        for block in self.blocks:
            x = block(x, mask, None, 1.0)
        if not self.head:
            output: Tensor = x
            return output
        return functional.linear(
            self.head_norm(activated(self.head_linear(x), self.head)), self.embed.weight, self.head_bias
        )
