"""Multi-head self-attention whose rule is an argument: four ways to read values off keys, with equal weights."""

# B batch, T positions, H heads, D channels of a head

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from archsmith.layers.local_linear_attention import local_linear_attention


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True, mask: Tensor | None = None, tile: int = 64
) -> Tensor:
    """Return linear attention with the feature map ``elu(x) + 1``, normalised; memory is linear in the length.

    Args:
        q: Queries (B, H, T, D).
        k: Keys (B, H, T, D).
        v: Values (B, H, T, E).
        causal: Whether position i sees ``j <= i`` only.
        mask: (B, T), True for real positions.
        tile: Positions that are computed at once where causal.

    Returns:
        (B, H, T, E); zeros where nothing may be seen.

    Source: Katharopoulos et al. 2020, arXiv 2006.16236.
    """
    q, k = nn.functional.elu(q) + 1, nn.functional.elu(k) + 1
    if mask is not None:
        k = k * mask[:, None, :, None]
    ones = v.new_ones(*v.shape[:-1], 1)
    v = torch.cat([v, ones], -1)  # the last channel sums the weights
    if not causal:
        found = q @ (k.mT @ v)
    else:
        state, parts = v.new_zeros(*k.shape[:2], k.shape[-1], v.shape[-1]), []
        for start in range(0, q.shape[2], tile):
            at = slice(start, start + tile)
            parts.append((q[:, :, at] @ k[:, :, at].mT).tril() @ v[:, :, at] + q[:, :, at] @ state)
            state = state + k[:, :, at].mT @ v[:, :, at]
        found = torch.cat(parts, 2)
    return found[..., :-1] / found[..., -1:].clamp_min(torch.finfo(v.dtype).tiny)


class SelfAttention(nn.Module):
    """Multi-head self-attention; all kinds have the same weights under the same names, so that one can replace another.

    Args:
        embed_dim: Channels of input and output.
        num_heads: Query heads.
        kind: ``softmax``; ``linear`` (``elu + 1``); ``regression``, one linear regression on all keys seen, which is
            local linear attention without scores (scale 0); or ``local_linear``.
        num_kv_heads: Heads of keys and values, a divisor of ``num_heads``; None for as many.
        causal: Whether a position sees itself and the past only.
        bias: Whether the four projections have biases.
        ridge: Ridge of the two regressions; where it starts if it is learned.
        ridge_form: ``fixed``; ``head``, one learned number for each head; ``token``, a learned linear map of each
            position to its heads' ridges. Both pass softplus, so that it stays positive.
        scale: Factor of the scores; None for ``1 / sqrt(D)``.
        blockwise: Whether the regressions are streamed (memory linear in T) or held whole.
        groups: Groups of channels in the regressions.
        iterations: Most steps of conjugate gradients; None for twice the channels of a regression.
        jacobi: Whether they are preconditioned.
        tile: Queries and keys in a tile.

    Raises:
        ValueError: An unknown kind, or sizes that do not divide.

    Example:
        >>> layer = SelfAttention(8, 2, kind="local_linear")
        >>> layer(torch.zeros(1, 5, 8)).shape
        torch.Size([1, 5, 8])
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kind: str = "softmax",
        num_kv_heads: int | None = None,
        causal: bool = True,
        bias: bool = True,
        ridge: float = 0.1,
        ridge_form: str = "fixed",
        scale: float | None = None,
        blockwise: bool = True,
        groups: int = 1,
        iterations: int | None = None,
        jacobi: bool = False,
        tile: tuple[int, int] = (64, 256),
    ) -> None:
        super().__init__()
        if kind not in ("softmax", "linear", "regression", "local_linear"):
            raise ValueError(f"kind: got {kind!r}; allowed: 'softmax', 'linear', 'regression', 'local_linear'.")
        if ridge_form not in ("fixed", "head", "token"):
            raise ValueError(f"ridge_form: got {ridge_form!r}; allowed: 'fixed', 'head', 'token'.")
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if embed_dim % num_heads or num_heads % kv_heads:
            raise ValueError(
                f"num_heads {num_heads}, num_kv_heads {kv_heads}; allowed: divisors of embed_dim {embed_dim} and of "
                "num_heads."
            )
        if ridge_form != "fixed" and (kind in ("softmax", "linear") or not ridge > 0):
            raise ValueError(
                f"ridge_form: got {ridge_form!r}; allowed: 'fixed', where kind has no ridge or ridge is 0."
            )
        self.embed_dim, self.num_heads, self.num_kv_heads, self.kind = embed_dim, num_heads, kv_heads, kind
        self.causal, self.bias, self.ridge, self.ridge_form, self.scale = causal, bias, ridge, ridge_form, scale
        self.blockwise, self.groups, self.iterations, self.jacobi, self.tile = (
            blockwise,
            groups,
            iterations,
            jacobi,
            tile,
        )
        width = embed_dim // num_heads
        self.q_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        self.k_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.v_proj = nn.Linear(embed_dim, kv_heads * width, bias=bias)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias)
        before_softplus = torch.tensor(ridge, dtype=torch.float64).expm1().log().float() if ridge > 0 else None
        if ridge_form == "head":
            assert before_softplus is not None
            self.ridge_logit = nn.Parameter(before_softplus.repeat(num_heads))
        if ridge_form == "token":
            assert before_softplus is not None
            self.ridge_proj = nn.Linear(embed_dim, num_heads)
            nn.init.zeros_(self.ridge_proj.weight)
            nn.init.constant_(self.ridge_proj.bias, float(before_softplus))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Map (B, T, embed_dim) to the same shape; ``mask`` (B, T) is True at real positions."""
        q, k, v = (
            proj(x).unflatten(-1, (heads, -1)).transpose(1, 2)
            for proj, heads in (
                (self.q_proj, self.num_heads),
                (self.k_proj, self.num_kv_heads),
                (self.v_proj, self.num_kv_heads),
            )
        )
        return self.out_proj(self._attend(q, k, v, x, mask).transpose(1, 2).flatten(-2))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.kind in ("softmax", "linear") and self.num_kv_heads != self.num_heads:
            k, v = (y.repeat_interleave(self.num_heads // self.num_kv_heads, dim=1) for y in (k, v))
        if self.kind == "linear":
            return linear_attention(q, k, v, causal=self.causal, mask=mask)
        if self.kind == "softmax":
            if mask is None:
                return nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal, scale=self.scale)
            seen = mask[:, None, None, :]
            if self.causal:
                seen = seen & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
            found = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=self.scale)
            return torch.where(seen.any(-1, keepdim=True), found, 0.0)
        ridge: float | Tensor = self.ridge
        if self.ridge_form == "head":
            ridge = nn.functional.softplus(self.ridge_logit)
        elif self.ridge_form == "token":
            ridge = nn.functional.softplus(self.ridge_proj(x)).transpose(1, 2)
        return local_linear_attention(
            q,
            k,
            v,
            ridge=ridge,
            scale=0.0 if self.kind == "regression" else self.scale,
            causal=self.causal,
            mask=mask,
            blockwise=self.blockwise,
            groups=self.groups,
            jacobi=self.jacobi,
            iterations=self.iterations,
            tile=self.tile,
        )

    def constructor(self) -> dict[str, Any]:
        """Return the literal arguments that rebuild this structure."""
        names = (
            "embed_dim",
            "num_heads",
            "kind",
            "num_kv_heads",
            "causal",
            "bias",
            "ridge",
            "ridge_form",
            "scale",
            "blockwise",
            "groups",
            "iterations",
            "jacobi",
            "tile",
        )
        return {name: getattr(self, name) for name in names}
