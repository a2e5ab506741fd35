"""A small residual model of plain torch, its family of slots, and a script that trains its library."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from archsmith.families.residual_slots import SlotFamily, SubBlock


class Mixer(nn.Module):
    """Attention with separate projections and a causal mask."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.width = heads, width
        self.num_heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.width // self.heads)).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class FeedForward(nn.Module):
    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(nn.functional.gelu(self.up(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), Mixer(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width), FeedForward(width, inner)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PlainModel(nn.Module):
    """Embedding, residual blocks, head; tokens (B, T) in, logits (B, T, V) out."""

    def __init__(self, *, layers: int = 3, width: int = 16, heads: int = 4, inner: int = 32, words: int = 24) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(Block(width, heads, inner) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def plain_model(**sizes: int) -> PlainModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = PlainModel(**sizes)
        with torch.no_grad():
            for block in model.blocks:  # sub-blocks that matter: what removes one has to be noticed
                for module in (block.attn.o, block.mlp.down):
                    module.weight.mul_(4)
    return model.eval()


def plain_batches(count: int = 6, *, size: int = 4, length: int = 8, words: int = 24, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(words, (size, length), generator=generator) for _ in range(count)]


def plain_family(alternatives: dict[str, Sequence[str]] | None = None, **sizes: int) -> SlotFamily:
    """Return the family with its statistics; a call without arguments is a source."""
    chosen = alternatives or {"attention": ["linear", "none"], "ffn": ["ffn50", "linear", "none"]}
    block = {
        "attention": SubBlock(
            "attention",
            "attn",
            {"query": "attn.q", "key": "attn.k", "value": "attn.v", "output": "attn.o"},
            ("norm1",),
            heads=4,
            causal=True,
        ),
        "ffn": SubBlock("ffn", "mlp", {"up": "mlp.up", "down": "mlp.down"}, ("norm2",)),
    }
    family = SlotFamily(plain_model(**sizes), alternatives=chosen, layers="blocks", sub_blocks=list(block.values()))
    family.collect_statistics(plain_batches(2))
    return family


def main(folder: Path) -> None:
    """Train the whole library, one line on the output for each block that was trained."""
    from archsmith.run.directory import Run
    from archsmith.train import blockwise
    from archsmith.train.activation_cache import ActivationCache

    torch.set_num_threads(1)
    family = plain_family()
    original = blockwise.distil_block

    def told(*arguments: object) -> dict[str, object]:
        figures = original(*arguments)
        print(arguments[2].name, flush=True)
        return figures

    blockwise.distil_block = told
    with Run.create_or_open(folder, {"seed": 0}) as run:
        cache = ActivationCache.build(family.parent, family.layer_paths, plain_batches(), folder / "activations")
        blockwise.distil_library(
            plain_family,
            cache,
            blockwise.decoupled_jobs(family),
            blockwise.BlockTraining(steps=30),
            blockwise.BlockLibrary(folder / "library"),
            executor=blockwise.Inline(),
            logger=run,
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
