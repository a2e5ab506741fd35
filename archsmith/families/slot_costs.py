"""What one alternative of one slot costs, exactly: parameters, bytes, MACs, key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch

MIB = 2**20


@dataclass(frozen=True)
class SlotCost:
    """Exact costs; they add up over slots and with ``SlotFamily.rest_cost``.

    Attributes:
        params: Parameters: weights, biases, and the norms that belong to the sub-block. Tied ones are counted once.
        token_macs: Multiply-accumulates for each token: the projections.
        pair_macs: The same for each pair of tokens: scores and mixing of attention, over the full square (masks save
            nothing), as ``archsmith.cost.count`` counts.
        kv_values: Numbers that the key-value cache keeps for each token.
        window: Tokens that the cache keeps at most (sliding window), or None.
        sequence_macs: Multiply-accumulates once for each sequence (a pooler).
    """

    params: int
    token_macs: int = 0
    pair_macs: int = 0
    kv_values: int = 0
    window: int | None = None
    sequence_macs: int = 0

    def bytes(self, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of the parameters."""
        return self.params * dtype.itemsize

    def macs(self, tokens: int) -> int:
        """Return the multiply-accumulates of one sequence of ``tokens``, read at once."""
        return self.sequence_macs + self.token_macs * tokens + self.pair_macs * tokens * tokens

    def kv_bytes(self, sequence: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of the key-value cache of one sequence of this length."""
        kept = sequence if self.window is None else min(sequence, self.window)
        return self.kv_values * kept * dtype.itemsize

    def memory(self, *, batch: int, sequence: int, dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of the parameters and of the caches of ``batch`` sequences."""
        return self.bytes(dtype) + batch * self.kv_bytes(sequence, dtype)
