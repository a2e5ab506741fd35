"""Local linear attention: every query fits a weighted linear model of the values over the keys and reads its intercept.

For query ``q_i`` with softmax weights ``w_ij = exp(s q_i.k_j - m_i)`` of the keys it may see, the output is ``b`` of

    ``argmin_{b, W}  sum_j w_ij ||v_j - b - W (k_j - q_i)||^2 + ridge * omega_i ||W||^2``,   ``omega_i = sum_j w_ij``.

Softmax attention is the same without ``W`` (ridge to infinity), linear regression on all keys the same without ``s``
(s to 0, ridge to 0). With ``z_j = k_j - q_i``, ``mu = sum w z`` and ``Sigma = sum w z z^T + ridge omega I``:

    ``Sigma rho = mu``, ``delta = omega - mu.rho``, ``o_i = sum_j P_ij v_j`` with ``P_ij = w_ij (1 - rho.z_j) / delta``.

Rows of P sum to one; entries may be negative. Two forms compute it: the *naive* one holds all weights (n x n) and all
``Sigma_i`` (n x d x d); the *blockwise* one streams tiles of keys past a tile of queries (online softmax, conjugate
gradients whose matrix products pass the keys again, the output) and keeps only o, rho, delta, m and omega for the
backward pass, which is written out: memory grows linearly with the length.

Sources: "Local Linear Attention: An Optimal Interpolation of Linear and Softmax Attention For Test-Time Regression",
arXiv 2510.01450; the backward pass is derived here, see ``docs/systems/local-linear-attention.md``.
"""

# B batch, H heads, G groups of channels, N queries, M keys, D channels, E channels of values,
# K channels of a group

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from archsmith.layers.local_linear_tiles import (
    BlockwiseFit,
    FitPlan,
    finite_shift,
    sigma_product,
    visible_keys,
)


class LocalLinearFit(NamedTuple):
    """Output of local linear attention and what its regressions were.

    Attributes:
        output: (B, H, N, E).
        rho: Solutions (B, H, N, D).
        delta: Normalisers (B, H, N).
        shift: Largest score of each query, m, (B, H, N).
        omega: Sums of the weights (B, H, N); 0 for a query that may see no key.
    """

    output: Tensor
    rho: Tensor
    delta: Tensor
    shift: Tensor
    omega: Tensor


def local_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float | Tensor = 0.1,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    blockwise: bool = True,
    groups: int = 1,
    jacobi: bool = False,
    iterations: int | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
    delta_eps: float = 1e-12,
    tile: tuple[int, int] = (64, 256),
    keep_weights: bool = True,
    stop_ridge: bool = False,
) -> Tensor:
    """Return local linear attention of queries, keys and values; a drop-in for softmax attention.

    float16 and bfloat16 are computed in float32, and autocast is off inside. The backward pass of the blockwise form is
    the gradient of the exact solution: with too few ``iterations`` it is that of a different function than the output.
    While a model is exported, the regressions are solved by all ``iterations`` on whole matrices instead, because
    stopping depends on data. Second derivatives exist for the naive form only.

    Args:
        q: Queries (B, H, N, D).
        k: Keys (B, H or a divisor of it, M, D); a shared key head serves consecutive query heads.
        v: Values (B, as k, M, E).
        ridge: Ridge of the regressions, 0 or more: a number, or a tensor that broadcasts: () or (H,) or (B, H, N).
            Larger is closer to softmax attention. It multiplies ``omega``, so that it does not depend on the shift m.
            Gradients flow to a tensor. 0 is singular where a query sees D keys or fewer.
        scale: Factor s of the scores; None for ``D ** -0.5``.
        causal: Whether query i sees keys ``j <= i + M - N`` only: the queries are the last N positions.
        mask: True where a key may be seen: (B, M) for padding, or (B, 1 or H, 1 or N, M). A query that sees nothing
            returns zeros.
        blockwise: The streaming form; else the naive one.
        groups: Groups of consecutive channels between which Sigma is taken as zero: smaller systems, another result,
            and no longer a regression: ``delta`` can be near zero or negative and outputs large.
        jacobi: Precondition the conjugate gradients by Sigma's diagonal (blockwise form).
        iterations: Most steps of conjugate gradients (blockwise form). D / groups of them solve exactly in exact
            arithmetic; None for twice as many, which rounding asks for at small ridges. Published: 32.
        rtol: Squared residual at which a query stops, relative; None for 1e-20 in float64 and 1e-16 in float32, where
            the blockwise form is as near to the exact solution as the naive one. The published 1e-12 leaves errors of
            1e-5 at ridge 1 and 2e-4 at ridge 0.1 (16 channels).
        atol: Squared right-hand sides below it count as this large.
        delta_eps: Moves ``delta`` away from zero; its sign counts as +1 at zero.
        tile: Queries and keys in a tile.
        keep_weights: Keep the weights of the present row of tiles (tile[0] x M), which is as much as k where
            ``tile[0] == D``. False computes them anew for every product.
        stop_ridge: Treat ``omega`` in the ridge term as a constant in the backward pass, as the public code does; the
            default is the gradient of what is computed.

    Returns:
        (B, H, N, E), dtype of ``q``.

    Raises:
        ValueError: Shapes that do not fit, a negative ridge, or an option out of range.

    Example:
        >>> q, k, v = (torch.randn(1, 2, 5, 4) for _ in range(3))
        >>> local_linear_attention(q, k, v)[0, :, 0].allclose(v[0, :, 0], atol=1e-5)  # one key: its value
        True
    """
    return local_linear_fit(
        q,
        k,
        v,
        ridge=ridge,
        scale=scale,
        causal=causal,
        mask=mask,
        blockwise=blockwise,
        groups=groups,
        jacobi=jacobi,
        iterations=iterations,
        rtol=rtol,
        atol=atol,
        delta_eps=delta_eps,
        tile=tile,
        keep_weights=keep_weights,
        stop_ridge=stop_ridge,
    ).output


def local_linear_fit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    ridge: float | Tensor = 0.1,
    scale: float | None = None,
    causal: bool = True,
    mask: Tensor | None = None,
    blockwise: bool = True,
    groups: int = 1,
    jacobi: bool = False,
    iterations: int | None = None,
    rtol: float | None = None,
    atol: float = 1e-12,
    delta_eps: float = 1e-12,
    tile: tuple[int, int] = (64, 256),
    keep_weights: bool = True,
    stop_ridge: bool = False,
) -> LocalLinearFit:
    """Return the output with the regressions behind it; arguments as for ``local_linear_attention``.

    Of the blockwise form only ``output`` carries gradients.
    """
    steps = max(1, 2 * q.shape[-1] // max(groups, 1)) if iterations is None else iterations
    _check_attention(q, k, v, causal=causal, groups=groups, iterations=steps, tile=tile)
    if q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
    dtype = q.dtype if q.dtype in (torch.float32, torch.float64) else torch.float32
    plan = FitPlan(
        scale=q.shape[-1] ** -0.5 if scale is None else float(scale),
        causal=causal,
        groups=groups,
        jacobi=jacobi,
        iterations=steps,
        rtol=(1e-20 if dtype == torch.float64 else 1e-16) if rtol is None else rtol,
        atol=atol,
        delta_eps=delta_eps,
        tile=tile,
        keep_weights=keep_weights,
        stop_ridge=stop_ridge,
    )
    seen = _seen_keys(mask, q, k)
    with torch.autocast(q.device.type, enabled=False):
        inputs = (q.to(dtype), k.to(dtype), v.to(dtype), _ridge_tensor(ridge, q, dtype))
        if blockwise and not torch.compiler.is_exporting():
            found = LocalLinearFit(*BlockwiseFit.apply(*inputs, seen, plan))  # type: ignore[no-untyped-call]
        else:
            found = _fit_whole(*inputs, seen, plan, direct=not blockwise)
    return found._replace(output=found.output.to(q.dtype))


def _fit_whole(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, seen: Tensor | None, plan: FitPlan, *, direct: bool
) -> LocalLinearFit:
    """Compute with all weights at hand; ``direct`` holds every Sigma too and solves, else conjugate gradients."""
    scores = plan.scale * (q @ k.mT)
    rows = range(k.shape[2] - q.shape[2], k.shape[2])
    visible = visible_keys(rows, range(k.shape[2]), seen, plan.causal, q.device)
    if visible is not None:
        scores = scores.masked_fill(~visible, -torch.inf)
    # The result does not depend on the shift, so no gradient passes through it.
    shift = finite_shift(scores.detach().amax(-1, keepdim=True))
    w = (scores - shift).exp()
    omega = w.sum(-1, keepdim=True)
    loading = ridge * (omega.detach() if plan.stop_ridge else omega)
    q5, k5, w5 = plan.grouped(q), plan.grouped(k), w.unsqueeze(2)
    moment = w5 @ k5
    mu = moment - omega.unsqueeze(2) * q5
    if direct:
        outer = (k5.unsqueeze(-1) * k5.unsqueeze(-2)).flatten(-2)
        second = (w5 @ outer).unflatten(-1, (k5.shape[-1], -1))
        cross = moment.unsqueeze(-1) * q5.unsqueeze(-2)
        own = (omega.unsqueeze(2) * q5).unsqueeze(-1) * q5.unsqueeze(-2)
        identity = torch.eye(k5.shape[-1], dtype=q.dtype, device=q.device)
        # A query that sees nothing has Sigma 0; the identity in its place gives it rho 0.
        diagonal = torch.where(omega > 0, loading, 1.0).unsqueeze(2).unsqueeze(-1)
        sigma = second - cross - cross.mT + own + diagonal * identity
        rho5 = torch.linalg.solve(sigma, mu.unsqueeze(-1)).squeeze(-1)
    else:
        rho5 = plan.solve(lambda p: sigma_product(p, q5, [(w5, k5)], loading.unsqueeze(2)), mu, None)
    rho = plan.joined(rho5)
    delta = plan.shifted(omega - (plan.joined(mu) * rho).sum(-1, keepdim=True), omega)
    inner = rho @ k.mT - (rho * q).sum(-1, keepdim=True)
    output = (w * (1 - inner) / delta) @ v
    return LocalLinearFit(output, rho, delta.squeeze(-1), shift.squeeze(-1), omega.squeeze(-1))


def _seen_keys(mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return the mask as (B, 1 or H, 1 or N, M)."""
    if mask is None:
        return None
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    four = mask[:, None, None, :] if mask.dim() == 2 else mask
    fits = four.dim() == 4 and all(
        size in (1, whole) for size, whole in zip(four.shape, (batch, heads, queries, keys), strict=True)
    )
    if mask.dtype != torch.bool or not fits or four.shape[3] != keys:
        raise ValueError(
            f"mask: got {mask.dtype} of shape {tuple(mask.shape)}; allowed: bool, True where a key may be seen, of "
            f"shape (B, M) = {(batch, keys)} or (B, 1 or H, 1 or N, M) = {(batch, heads, queries, keys)}."
        )
    return four


def _ridge_tensor(ridge: float | Tensor, q: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the ridge as a tensor that broadcasts to (B, H, N, 1)."""
    if not isinstance(ridge, Tensor):
        if not 0 <= ridge < float("inf"):
            raise ValueError(f"ridge: got {ridge}; allowed: a finite number of at least 0.")
        return torch.full((1, 1, 1, 1), ridge, dtype=dtype, device=q.device)
    shaped = ridge.to(dtype)
    if ridge.dim() == 0:
        return shaped.reshape(1, 1, 1, 1)
    if ridge.dim() == 1 and ridge.shape[0] in (1, q.shape[1]):
        return shaped.reshape(1, -1, 1, 1)
    if ridge.dim() == 3 and all(n in (1, whole) for n, whole in zip(ridge.shape, q.shape[:3], strict=True)):
        return shaped.unsqueeze(-1)
    raise ValueError(
        f"ridge: got a tensor of shape {tuple(ridge.shape)}; allowed: (), (H,) = ({q.shape[1]},) or one that "
        f"broadcasts to (B, H, N) = {tuple(q.shape[:3])}."
    )


def _check_attention(
    q: Tensor, k: Tensor, v: Tensor, *, causal: bool, groups: int, iterations: int, tile: tuple[int, int]
) -> None:
    """Refuse what does not fit together.

    Raises:
        ValueError: With the shapes or the option.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(x.dim() != 4 for x in (q, k, v)):
        raise ValueError(f"{shapes}; allowed: (batch, heads, length, channels) each.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape[:3] != v.shape[:3] or q.shape[1] % k.shape[1]:
        raise ValueError(f"{shapes}; allowed: equal batches, k and v of equal length, heads of k dividing those of q.")
    if causal and k.shape[2] < q.shape[2]:
        raise ValueError(f"{shapes}; allowed: with causal=True at least as many keys as queries.")
    if groups < 1 or q.shape[3] % groups:
        raise ValueError(f"groups: got {groups}; allowed: a divisor of the {q.shape[3]} channels.")
    if iterations < 1 or min(tile) < 1:
        raise ValueError(f"iterations {iterations}, tile {tile}; allowed: at least 1 each.")
