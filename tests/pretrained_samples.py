"""A small "pre-trained" encoder in a Hugging Face folder: random weights, and the words of the embedded phrases."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from archsmith.tasks.phrases import phrases
from archsmith.tasks.tokens import words


def write_encoder(folder: Path, *, layers: int = 3, seed: int = 0) -> Path:
    """Write config.json, model.safetensors and vocab.txt of a BERT encoder; return the folder."""
    from transformers import BertConfig, BertModel

    entries = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *sorted({word for text in phrases()[0] for word in words(text)})]
    config = BertConfig(
        vocab_size=len(entries),
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=32,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = BertModel(config, add_pooling_layer=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    (folder / "vocab.txt").write_text("\n".join(entries) + "\n")
    save_file(
        {f"bert.{name}": value.contiguous() for name, value in network.state_dict().items()},
        folder / "model.safetensors",
    )
    return folder
