"""The streaming form of local linear attention: tiles of keys pass a tile of queries; the backward pass is written out.

Only ``o, rho, delta, m, omega`` are kept between the two passes. What is computed, and the names, are explained in
``local_linear_attention.py``.
"""

# B batch, H heads, G groups of channels, N queries, M keys, D channels, K channels of a group, E channels of values,
# R queries of a tile, C keys of a tile

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from archsmith.layers.conjugate_gradients import conjugate_gradients


class FitPlan(NamedTuple):
    """The options of one call."""

    scale: float
    causal: bool
    groups: int
    jacobi: bool
    iterations: int
    rtol: float
    atol: float
    delta_eps: float
    tile: tuple[int, int]
    keep_weights: bool
    stop_ridge: bool

    def grouped(self, x: Tensor) -> Tensor:
        """View (B, H, T, D) as (B, H, G, T, K)."""
        return x.unflatten(-1, (self.groups, -1)).transpose(2, 3)

    def joined(self, x: Tensor) -> Tensor:
        """Bring (B, H, G, T, K) back to (B, H, T, D)."""
        return x.transpose(2, 3).flatten(-2)

    def solve(self, product: Callable[[Tensor], Tensor], right: Tensor, diagonal: Tensor | None) -> Tensor:
        """Return the solutions of the systems; see ``conjugate_gradients``."""
        early = not torch.compiler.is_exporting()
        return conjugate_gradients(
            product,
            right,
            diagonal=diagonal,
            iterations=self.iterations,
            rtol=self.rtol,
            atol=self.atol,
            early_stop=early,
        )[0]

    def shifted(self, delta: Tensor, omega: Tensor) -> Tensor:
        """Move delta away from zero; 1 where a query sees nothing, so that its output is 0 and not 0 / 0."""
        moved = delta + torch.where(delta < 0, -self.delta_eps, self.delta_eps)
        return torch.where(omega > 0, moved, 1.0)


class BlockwiseFit(torch.autograd.Function):
    """The streaming form with its own backward pass."""

    @staticmethod
    def forward(
        q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, seen: Tensor | None, plan: FitPlan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Return output, rho, delta, shift and omega."""
        output = q.new_zeros(*q.shape[:3], v.shape[-1])
        rho = torch.empty_like(q)
        delta, shift, omega = (q.new_empty(q.shape[:3]) for _ in range(3))
        for rows in _query_tiles(q, k, v, ridge, seen, plan):
            rows.begin()
            mu = rows.moment - rows.omega.unsqueeze(2) * rows.q5
            rho5 = plan.solve(rows.product, mu, rows.diagonal())
            mine = plan.joined(rho5)
            along, total = (mine * rows.q).sum(-1, keepdim=True), torch.zeros_like(rows.omega)
            tile = output[:, :, rows.at]
            for columns in rows.columns:
                # P v = w (1 - rho.k + rho.q) v / delta
                inner = (1 + along).sub(mine @ k[:, :, columns].mT).mul_(rows.weights(columns))
                total += inner.sum(-1, keepdim=True)
                tile += inner @ v[:, :, columns]
            # omega - mu.rho is this sum: taken over the terms themselves, rows sum to one whatever rho is
            normaliser = plan.shifted(total, rows.omega)
            tile /= normaliser
            rho[:, :, rows.at] = mine
            for whole, part in ((delta, normaliser), (shift, rows.shift), (omega, rows.omega)):
                whole[:, :, rows.at] = part.squeeze(-1)
        return output, rho, delta, shift, omega

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        """Keep the inputs and all outputs, nothing else."""
        q, k, v, ridge, seen, plan = inputs
        ctx.mark_non_differentiable(*output[1:])
        ctx.save_for_backward(q, k, v, ridge, seen, *output)
        ctx.plan = plan
        ctx.set_materialize_grads(False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys, values and ridge."""
        if gradient is None:
            return (None,) * 6
        q, k, v, ridge, seen, output, rho, delta, shift, omega = ctx.saved_tensors
        plan: FitPlan = ctx.plan
        q_grad = torch.empty_like(q)
        k_grad, v_grad = torch.zeros_like(k), torch.zeros_like(v)
        ridge_grad = q.new_empty(*q.shape[:3], 1)
        for rows in _query_tiles(q, k, v, ridge, seen, plan):
            at = rows.at
            rows.resume(shift[:, :, at, None], omega[:, :, at, None])
            scaled = gradient[:, :, at] / delta[:, :, at, None]
            r5 = plan.grouped(rho[:, :, at])
            # beta = sum_j G_j P_j / delta with G = go v^T, which is go.o / delta
            beta = (scaled * output[:, :, at]).sum(-1, keepdim=True)
            # The two first sums over C = G w / delta, then U = Sigma^-1 T, T = sum C z
            tau, first = torch.zeros_like(beta), torch.zeros_like(rows.q)
            for columns in rows.columns:
                c = (scaled @ v[:, :, columns].mT).mul_(rows.weights(columns))
                tau += c.sum(-1, keepdim=True)
                first += c @ k[:, :, columns]
            u5 = plan.solve(rows.product, plan.grouped(first - tau * rows.q), rows.diagonal(k))
            along = plan.joined(u5 * r5 - beta.unsqueeze(2) * r5.square()).sum(-1, keepdim=True)
            ridge_grad[:, :, at] = rows.omega * along
            constant = -beta if plan.stop_ridge else rows.ridge * along - beta
            q_grad[:, :, at] = _tile_gradients(rows, scaled, beta, constant, tau, r5, u5, k, v, k_grad, v_grad)
        wanted = ridge_grad.sum_to_size(ridge.shape) if ctx.needs_input_grad[3] else None
        return q_grad, k_grad, v_grad, wanted, None, None


def _tile_gradients(
    rows: QueryTile,
    scaled: Tensor,
    beta: Tensor,
    constant: Tensor,
    tau: Tensor,
    r5: Tensor,
    u5: Tensor,
    k: Tensor,
    v: Tensor,
    k_grad: Tensor,
    v_grad: Tensor,
) -> Tensor:
    """Return the gradient of a tile of queries and add what it gives to keys and values.

    With ``[a] = a.z`` in each group and DM = 2 beta rho - U, the derivative by ``log w`` is
    ``G P + w (constant + [DM] + sum_g [U][rho] - beta [rho]^2)`` and that by z is
    ``-C rho + w (DM - [DM] rho + [rho] U)``.
    """
    plan, q = rows.plan, rows.q
    beta5, q5 = beta.unsqueeze(2), rows.q5
    d5 = 2 * beta5 * r5 - u5
    rq, uq = ((a * q5).sum(-1, keepdim=True) for a in (r5, u5))
    q_sum, w_d, w_r = torch.zeros_like(q), torch.zeros_like(rq), torch.zeros_like(rq)
    for columns in rows.columns:
        w, kc, k5 = rows.weights(columns), k[:, :, columns], rows.k5[:, :, :, columns]
        w5 = w.unsqueeze(2)
        along_r, along_u = r5 @ k5.mT - rq, u5 @ k5.mT - uq
        along_d = 2 * beta5 * along_r - along_u
        c = (scaled @ v[:, :, columns].mT) * w
        open_share = 1 - along_r.sum(2)
        v_grad[:, :, columns] += (w * open_share).mT @ scaled
        bracket = constant + along_d.sum(2) + (along_r * (along_u - beta5 * along_r)).sum(2)
        by_score = plan.scale * (c * open_share + w * bracket)
        q_sum += by_score @ kc
        w_along_d, w_along_r = w5 * along_d, w5 * along_r
        w_d += w_along_d.sum(-1, keepdim=True)
        w_r += w_along_r.sum(-1, keepdim=True)
        by_z = w5.mT @ d5 + w_along_r.mT @ u5 - (c.unsqueeze(2) + w_along_d).mT @ r5
        k_grad[:, :, columns] += by_score.mT @ q + plan.joined(by_z)
    by_q = rows.omega.unsqueeze(2) * d5 + w_r * u5 - (tau.unsqueeze(2) + w_d) * r5
    return q_sum - plan.joined(by_q)


class QueryTile:
    """A tile of queries and the tiles of keys that it may see.

    Attributes:
        at: Where the queries are.
        columns: Where the tiles of keys are.
        shift, omega: Largest score and sum of the weights, (B, H, R, 1).
        moment: Sum of weighted keys (B, H, G, R, K), after ``begin``.
    """

    moment: Tensor
    shift: Tensor
    omega: Tensor

    def __init__(
        self, at: slice, q: Tensor, k: Tensor, k5: Tensor, ridge: Tensor, seen: Tensor | None, plan: FitPlan
    ) -> None:
        self.plan, self.at, self.k, self.k5 = plan, at, k, k5
        self.q = q[:, :, at]
        self.q5 = plan.grouped(self.q)
        self.ridge = ridge if ridge.shape[2] == 1 else ridge[:, :, at]
        self._seen = seen if seen is None or seen.shape[2] == 1 else seen[:, :, at]
        self._lag = k.shape[2] - q.shape[2]
        last = min(k.shape[2], at.stop + self._lag) if plan.causal else k.shape[2]
        self.columns = [slice(c, min(c + plan.tile[1], last)) for c in range(0, last, plan.tile[1])]
        self._kept: dict[int, Tensor] = {}
        self._squares: Tensor | None = None

    def begin(self) -> None:
        """Pass the keys once: online softmax of the weights and their first (and diagonal second) moments."""
        like = self.q[..., :1]
        shift, omega = torch.full_like(like, -torch.inf), torch.zeros_like(like)
        moment = torch.zeros_like(self.q)
        squares = torch.zeros_like(self.q) if self.plan.jacobi else None
        for columns in self.columns:
            scores, kc = self._scores(columns), self.k[:, :, columns]
            new = torch.maximum(shift, scores.amax(-1, keepdim=True))
            old = (shift - finite_shift(new)).exp()
            w = scores.sub_(finite_shift(new)).exp_()
            omega = omega * old + w.sum(-1, keepdim=True)
            moment = moment * old + w @ kc
            if squares is not None:
                squares = squares * old + w @ kc.square()
            shift = new
        self.resume(finite_shift(shift), omega)
        self.moment = self.plan.grouped(moment)
        self._squares = squares

    def resume(self, shift: Tensor, omega: Tensor) -> None:
        """Take up shift and sums of an earlier pass."""
        self.shift, self.omega = shift, omega
        self._loading = (self.ridge * omega).unsqueeze(2)

    def diagonal(self, k: Tensor | None = None) -> Tensor | None:
        """Return the diagonal of Sigma (B, H, G, R, K) where a preconditioner is wanted; ``k`` where not begun."""
        if not self.plan.jacobi:
            return None
        if k is not None:
            moment, self._squares = torch.zeros_like(self.q), torch.zeros_like(self.q)
            for columns in self.columns:
                w, kc = self.weights(columns), k[:, :, columns]
                moment += w @ kc
                self._squares += w @ kc.square()
            self.moment = self.plan.grouped(moment)
        assert self._squares is not None
        omega = self.omega.unsqueeze(2)
        found = self.plan.grouped(self._squares) - 2 * self.moment * self.q5 + omega * self.q5.square() + self._loading
        # Rounding can bring it to zero where all keys equal the query; without a scale it is the plain method there.
        return torch.where(found > 0, found, 1.0)

    def product(self, p: Tensor) -> Tensor:
        """Return Sigma p for directions (B, H, G, R, K)."""
        tiles = ((self.weights(columns).unsqueeze(2), self.k5[:, :, :, columns]) for columns in self.columns)
        return sigma_product(p, self.q5, tiles, self._loading)

    def weights(self, columns: slice) -> Tensor:
        """Return the weights (B, H, R, C) of a tile of keys."""
        if columns.start in self._kept:
            return self._kept[columns.start]
        w = self._scores(columns).sub_(self.shift).exp_()
        if self.plan.keep_weights:
            self._kept[columns.start] = w
        return w

    def _scores(self, columns: slice) -> Tensor:
        scores = (self.q @ self.k[:, :, columns].mT).mul_(self.plan.scale)
        rows = range(self.at.start + self._lag, self.at.start + self._lag + self.q.shape[2])
        seen = None if self._seen is None else self._seen[..., columns]
        keys = range(columns.start, columns.stop)
        visible = visible_keys(rows, keys, seen, self.plan.causal, scores.device)
        return scores if visible is None else scores.masked_fill_(~visible, -torch.inf)


def _query_tiles(
    q: Tensor, k: Tensor, v: Tensor, ridge: Tensor, seen: Tensor | None, plan: FitPlan
) -> Iterator[QueryTile]:
    k5 = plan.grouped(k)
    for start in range(0, q.shape[2], plan.tile[0]):
        yield QueryTile(slice(start, min(start + plan.tile[0], q.shape[2])), q, k, k5, ridge, seen, plan)


def sigma_product(p: Tensor, q5: Tensor, tiles: Iterable[tuple[Tensor, Tensor]], loading: Tensor) -> Tensor:
    """Return ``sum_j w_j (p.z_j) z_j + loading p``; z is never formed, and the form stays exact where q is large."""
    total = loading * p
    along = (p * q5).sum(-1, keepdim=True)
    for w5, k5 in tiles:
        t = w5 * (p @ k5.mT - along)
        total = total + (t @ k5 - t.sum(-1, keepdim=True) * q5)
    return total


def visible_keys(rows: range, columns: range, seen: Tensor | None, causal: bool, device: torch.device) -> Tensor | None:
    """Return which keys each query sees, broadcastable to the scores; None for all.

    Args:
        rows: Positions of the queries among the keys: what a query at i sees of the past ends with key i.
        columns: Positions of the keys.
        seen: Mask of these queries and keys.
        causal: Whether there is only the past.
        device: Where the scores are.
    """
    if not causal or columns.stop - 1 <= rows.start:
        return seen
    i, j = (torch.arange(each.start, each.stop, device=device) for each in (rows, columns))
    past = j <= i.unsqueeze(-1)
    return past if seen is None else past & seen


def finite_shift(shift: Tensor) -> Tensor:
    """Return 0 in place of minus infinity: the shift of a query that sees nothing."""
    return shift.masked_fill(shift == -torch.inf, 0.0)
