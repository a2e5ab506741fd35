"""Small residual models with random weights, whose sub-blocks are replaced in tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as t
from torch import Tensor, nn

from archsmith.families.bert import HFEncoderFamily
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import SlotFamily

TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def llama(**changes: Any) -> nn.Module:
    return t.LlamaForCausalLM(t.LlamaConfig(**{**TEXT, "num_key_value_heads": 4, **changes}))


def qwen2() -> nn.Module:
    return t.Qwen2ForCausalLM(t.Qwen2Config(**TEXT, num_key_value_heads=2))


def qwen3() -> nn.Module:
    return t.Qwen3ForCausalLM(t.Qwen3Config(**TEXT, num_key_value_heads=2, head_dim=8))


def mistral() -> nn.Module:
    return t.MistralForCausalLM(t.MistralConfig(**TEXT, num_key_value_heads=2, sliding_window=5))


def gpt2() -> nn.Module:
    config = t.GPT2Config(
        vocab_size=40, n_positions=64, n_embd=16, n_layer=3, n_head=4, bos_token_id=1, eos_token_id=None
    )
    return t.GPT2LMHeadModel(config)


def bert() -> nn.Module:
    return t.BertForMaskedLM(t.BertConfig(**{**TEXT, "pad_token_id": 0}))


def distilbert() -> nn.Module:
    config = t.DistilBertConfig(vocab_size=40, dim=16, n_layers=3, n_heads=4, hidden_dim=24, max_position_embeddings=64)
    return t.DistilBertModel(config)


def vit() -> nn.Module:
    config = t.ViTConfig(
        hidden_size=16,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=24,
        image_size=8,
        patch_size=4,
        num_labels=5,
    )
    return t.ViTForImageClassification(config)


DECODERS: dict[str, Callable[[], nn.Module]] = {
    "llama": llama,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "mistral": mistral,
    "gpt2": gpt2,
}
ENCODERS: dict[str, Callable[[], nn.Module]] = {"bert": bert, "distilbert": distilbert, "vit": vit}


def worn(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a model whose every parameter is as after training: biases are not 0, gains not 1."""
    torch.manual_seed(0)
    model = make()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor += 0.1 * torch.randn(tensor.shape, generator=generator)
    return model.eval()


def family_of(name: str, **settings: Any) -> SlotFamily:
    kind = HFDecoderFamily if name in DECODERS else HFEncoderFamily
    return kind(worn({**DECODERS, **ENCODERS}[name]), **settings)


def batch_for(name: str, *, count: int = 2, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(count, 3, 8, 8, generator=generator)}
    return {"input_ids": torch.randint(3, 37, (count, length), generator=generator)}


def answer(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        found = model(**batch)
    logits: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return logits


def everywhere(family: SlotFamily, **choices: str) -> dict[str, str]:
    """Return the point that has these alternatives in every slot of their part."""
    return {slot.name: choices.get(slot.part, "parent") for slot in family.slots}


Call = tuple[tuple[Any, ...], dict[str, Any]]


def layer_call(family: SlotFamily, index: int, batch: dict[str, Tensor]) -> Call:
    """Return the arguments with which the parent calls a layer, without a cache."""
    seen: list[Call] = []

    def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.append((args, kwargs))

    handle = family.layer(index).register_forward_pre_hook(record, with_kwargs=True)
    uncached = {"use_cache": False} if hasattr(family.parent.config, "use_cache") else {}
    with torch.no_grad():
        family.parent(**batch, **uncached)
    handle.remove()
    return seen[0]


def run_layer(layer: nn.Module, call: Call) -> Tensor:
    with torch.no_grad():
        found = layer(*call[0], **call[1])
    output: Tensor = found[0] if isinstance(found, tuple) else found
    return output
