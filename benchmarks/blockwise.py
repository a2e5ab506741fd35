"""Block-wise distillation by one one-thread process and by two: seconds for the same library, and their ratio.

The workers are started and have read the model before the clock runs (a process needs seconds to import torch, once in
a run); the time with the start is printed too. Runs take turns, each into a new library; the libraries are compared
bit for bit.

Run: ``python benchmarks/blockwise.py [--rounds 3]``
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from archsmith.families.residual_slots import SlotFamily, SubBlock
from archsmith.run.block_search import block_executor
from archsmith.train.activation_cache import ActivationCache
from archsmith.train.blockwise import BlockLibrary, BlockTraining, decoupled_jobs, distil_library, family_of

WIDTH, INNER, LAYERS, WORDS = 256, 1024, 6, 500


class FeedForward(nn.Module):
    """Two matrices and a GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual of x (B, T, E)."""
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    """A residual FFN with its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(WIDTH), FeedForward()

    def forward(self, x: Tensor) -> Tensor:
        """Return the stream after the block."""
        return x + self.mlp(self.norm(x))


class Model(nn.Module):
    """Embedding and residual blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(WORDS, WIDTH), nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the stream (B, T, E) of tokens (B, T)."""
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return x


def family() -> SlotFamily:
    """Return the family; a source for worker processes."""
    torch.manual_seed(0)
    block = SubBlock("ffn", "mlp", {"up": "mlp.up", "down": "mlp.down"}, ("norm",))
    return SlotFamily(
        Model(), alternatives={"ffn": ["ffn50", "ffn25", "linear"]}, layers="blocks", sub_blocks=[block], ranking="norm"
    )


def warmed() -> int:
    """Read the family in a worker."""
    family_of(family)
    time.sleep(0.5)
    return os.getpid()


class Notes:
    """A logger that keeps nothing."""

    def record(self, kind: str, **fields: object) -> None:
        """Forget an event."""

    def events(self, kind: str | None = None) -> list[dict[str, object]]:
        """Return no events."""
        return []


def main() -> None:
    """Print one line for each round, and the ratio of the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parent = family()
    batches = [torch.randint(WORDS, (8, 64), generator=torch.Generator().manual_seed(i)) for i in range(8)]
    seconds: dict[int, list[float]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        cache = ActivationCache.build(parent.parent, parent.layer_paths, batches, Path(folder) / "activations")
        jobs = decoupled_jobs(parent)
        for turn in range(arguments.rounds):
            for workers in (1, 2):
                library = BlockLibrary(Path(folder) / f"library-{turn}-{workers}")
                start = time.perf_counter()
                with block_executor(2) as pool:  # the same kind of process for both
                    wait = {future.result() for future in [pool.submit(warmed) for _ in range(4)]}
                    ready = time.perf_counter()
                    executor = pool if workers == 2 else OneAtATime(pool)
                    settings = BlockTraining(steps=arguments.steps)
                    distil_library(family, cache, jobs, settings, library, executor=executor, logger=Notes())
                    end = time.perf_counter()
                seconds[workers].append(end - ready)
                print(
                    f"round {turn}: {workers} process(es), {len(jobs)} blocks, {end - ready:.2f} s "
                    f"({end - start:.2f} with the start of {len(wait)}), load {os.getloadavg()[0]:.1f}",
                    flush=True,
                )
            for job in jobs:
                one, two = (load_file(BlockLibrary(Path(folder) / f"library-{turn}-{w}").path(job)) for w in (1, 2))
                assert all(torch.equal(one[name], two[name]) for name in one), job.name
    one, two = (statistics.median(seconds[workers]) for workers in (1, 2))
    print(f"median {one:.2f} s by one process, {two:.2f} s by two: {one / two:.2f}x; libraries equal bit for bit")


class OneAtATime:
    """Hands a pool one call after the other: the work of a single process."""

    def __init__(self, pool: object) -> None:
        self.pool = pool

    def submit(self, fn, /, *args, **kwargs):
        """Carry the call out in one of the pool's processes and wait for it."""
        future = self.pool.submit(fn, *args, **kwargs)
        future.exception()
        return future


if __name__ == "__main__":
    main()
