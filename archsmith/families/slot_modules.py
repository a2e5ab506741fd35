"""What takes the place of an attention or FFN module: no-op, linear map, attention with fewer key-value heads.

Attention modules are called in many ways (``attn(x, mask, cache=...)`` and so on) and return the output alone or with
the attention weights, so each stand-in takes whatever comes and returns what its sub-block's core returned.
"""

# B batch, T tokens, E residual width, H query heads, K key-value heads, D head width

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE_NAMES = ("cache", "past_key_values", "past_key_value", "layer_past")
"""Names under which transformers hands the key-value cache to an attention module, newest first."""


def hidden_of(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
    """Return the residual stream (B, T, E) of a call: the first argument, or the one called hidden_states."""
    hidden: Tensor = args[0] if args else kwargs["hidden_states"]
    return hidden


class StandIn(nn.Module):
    """Base of what replaces an attention core.

    Args:
        returns_tuple: Return (output, None), as the replaced module returned its weights in second place.
        layer_index: Number of the layer in the key-value cache.
        counts_tokens: Keep one number for each token in the cache. transformers asks the cache of the first layer (and
            of the first of each kind of layer) how many tokens have been seen; without an entry a model whose first
            layer has no attention would give every generated token position 0.
    """

    def __init__(self, *, returns_tuple: bool, layer_index: int | None = None, counts_tokens: bool = False) -> None:
        super().__init__()
        self.returns_tuple = returns_tuple
        self.layer_idx = layer_index  # the name transformers uses
        self.counts_tokens = counts_tokens

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return what is added to the residual stream (B, T, E)."""
        raise NotImplementedError

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Map the residual stream; other arguments are for the subclasses or ignored."""
        hidden = hidden_of(args, kwargs)
        if self.counts_tokens:
            self._count(hidden, kwargs)
        output = self.compute(hidden, kwargs)
        return (output, None) if self.returns_tuple else output

    def _count(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> None:
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None:
            tokens = hidden.shape[:-1]
            cache.update(hidden.new_zeros(tokens[0], 1, tokens[1], 1), hidden.new_zeros(tokens[0], 1, tokens[1], 0),
                         self.layer_idx)  # fmt: skip


class NoMixer(StandIn):
    """Adds nothing to the residual stream."""

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden)  # not expanded from one: some layers add in place


class PassMixer(StandIn):
    """Hands its input on to the closing module, which holds the weights."""

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the input."""
        return hidden


class LinearMixer(StandIn):
    """Each token attends to itself alone: one matrix."""

    def __init__(self, width: int, *, bias: bool, like: Tensor, **facts: Any) -> None:
        super().__init__(**facts)
        self.linear = empty_linear(width, width, bias=bias, like=like)

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the linear map of every token."""
        output: Tensor = self.linear(hidden)
        return output


class OwnMixer(StandIn):
    """A module of the user's in place of attention: it maps (B, T, E) to (B, T, E)."""

    def __init__(self, module: nn.Module, **facts: Any) -> None:
        super().__init__(**facts)
        self.module = module

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the module's output."""
        output: Tensor = self.module(hidden)
        return output


class NoFFN(nn.Module):
    """Adds nothing to the residual stream."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return zeros."""
        return torch.zeros_like(hidden)  # not expanded from one: some layers add in place


class KeepInput(nn.Module):
    """A closing module of a removed sub-block: the residual stream as it came."""

    def forward(self, output: Tensor, stream: Tensor) -> Tensor:
        """Return ``stream``."""
        return stream


class NormOnly(nn.Module):
    """A closing module that only normalises the residual stream."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.LayerNorm = norm

    def forward(self, output: Tensor, stream: Tensor) -> Tensor:
        """Return the normalised stream."""
        normalised: Tensor = self.LayerNorm(stream)
        return normalised


class RepeatedHeads(nn.Module):
    """A key or value projection to K heads, each of which serves H / K query heads of the attention around it.

    For attention without grouping of its own (BERT, ViT, DistilBERT): the projection is really smaller, the code around
    it sees H heads as before. A key-value cache would hold H heads, so decoders use ``GroupedAttention``.
    """

    def __init__(self, projection: nn.Linear, heads: int, kv_heads: int) -> None:
        super().__init__()
        self.projection = projection
        self.heads, self.kv_heads = heads, kv_heads

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (B, T, E) to (B, T, H D)."""
        heads = self.projection(hidden).unflatten(-1, (self.kv_heads, 1, -1))
        repeated: Tensor = heads.expand(*heads.shape[:-2], self.heads // self.kv_heads, heads.shape[-1])
        return repeated.flatten(-3)


class GroupedAttention(StandIn):
    """Grouped-query attention for decoders whose own attention knows no groups (GPT-2): the cache holds K heads.

    Positions are the model's own affair (learned ones are in the stream already); rotary ones are not supported here,
    because models that have them know groups. Attention weights are not returned.

    Args:
        width: Residual width E.
        heads: Query heads H.
        kv_heads: Key-value heads K.
        head_dim: Width D of a head.
        bias: The projections have biases.
        scaling: Factor of the scores.
        causal: A token sees those before it only; a mask that is handed in is obeyed instead.
        dropout: Probability with which attention weights are dropped in training.
        output_dropout: Probability of a zero behind the output projection in training.
        like: Tensor whose device and type the weights get.
    """

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        kv_heads: int,
        head_dim: int,
        bias: bool,
        scaling: float,
        causal: bool,
        dropout: float,
        output_dropout: float,
        like: Tensor,
        **facts: Any,
    ) -> None:
        super().__init__(**facts)
        self.q_proj = empty_linear(width, heads * head_dim, bias=bias, like=like)
        self.k_proj = empty_linear(width, kv_heads * head_dim, bias=bias, like=like)
        self.v_proj = empty_linear(width, kv_heads * head_dim, bias=bias, like=like)
        self.o_proj = empty_linear(heads * head_dim, width, bias=bias, like=like)
        self.head_dim, self.scaling, self.is_causal, self.dropout = head_dim, scaling, causal, dropout
        self.output_dropout = nn.Dropout(output_dropout)

    def compute(self, hidden: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
        """Return the attention's output; a cache among the arguments is read and extended."""
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cache = next((kwargs[name] for name in CACHE_NAMES if kwargs.get(name) is not None), None)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        mask = kwargs.get("attention_mask")
        mixed = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=self.is_causal and mask is None and query.shape[2] > 1,
            scale=self.scaling,
            enable_gqa=True,
        )
        output: Tensor = self.output_dropout(self.o_proj(mixed.transpose(1, 2).flatten(2)))
        return output


def empty_linear(inputs: int, outputs: int, *, bias: bool, like: Tensor) -> nn.Linear:
    """Return a linear layer whose weights are not set, on the device and of the type of ``like``."""
    layer = nn.Linear(inputs, outputs, bias=bias, device="meta", dtype=like.dtype)
    return layer if like.device.type == "meta" else layer.to_empty(device=like.device)


def resized(projection: nn.Module, outputs: int, inputs: int) -> nn.Module:
    """Return a projection of the same class and another size, weights not set."""
    weight: Any = projection.weight
    if isinstance(projection, nn.Linear):
        return empty_linear(inputs, outputs, bias=projection.bias is not None, like=weight)
    kind: Any = type(projection)  # Conv1D of transformers: (outputs, inputs)
    with torch.device("meta"):
        made: nn.Module = kind(outputs, inputs).to(weight.dtype)
    return made if weight.device.type == "meta" else made.to_empty(device=weight.device)
