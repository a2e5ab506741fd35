"""Networks of the transformers package at small size with random weights, for the tests of finding units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def _transformers() -> Any:
    import transformers

    return transformers


def _ids(length: int = 6) -> torch.Tensor:
    return torch.randint(3, 37, (2, length))


def _pixels(size: int) -> torch.Tensor:
    return torch.randn(2, 3, size, size)


TEXT: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "max_position_embeddings": 16,
}
VISION: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 24,
    "image_size": 8,
    "patch_size": 4,
}


def resnet() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.ResNetConfig(
        embedding_size=8, hidden_sizes=[16, 24], depths=[2, 2], layer_type="bottleneck", num_labels=5
    )
    return t.ResNetForImageClassification(config), {"pixel_values": _pixels(32)}


def mobilenet_v2() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.MobileNetV2Config(depth_multiplier=0.25, image_size=32, num_labels=5, min_depth=4, depth_divisible_by=4)
    return t.MobileNetV2ForImageClassification(config), {"pixel_values": _pixels(32)}


def efficientnet() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.25,
        depth_coefficient=0.5,
        depth_divisor=4,
        kernel_sizes=[3, 5],
        in_channels=[32, 8],
        out_channels=[8, 12],
        strides=[1, 2],
        num_block_repeats=[1, 2],
        expand_ratios=[1, 4],
        depthwise_padding=[],
        hidden_dim=320,
        num_labels=5,
    )
    return t.EfficientNetForImageClassification(config), {"pixel_values": _pixels(32)}


def convnext() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.ConvNextConfig(hidden_sizes=[8, 12], depths=[1, 2], num_stages=2, image_size=32, num_labels=5)
    return t.ConvNextForImageClassification(config), {"pixel_values": _pixels(32)}


def swin() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.SwinConfig(
        image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[2, 4], window_size=4, num_labels=5
    )
    return t.SwinForImageClassification(config), {"pixel_values": _pixels(16)}


def segformer() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.SegformerConfig(
        depths=[1, 1, 1, 1],
        hidden_sizes=[8, 12, 16, 20],
        num_attention_heads=[1, 2, 2, 4],
        decoder_hidden_size=10,
        num_labels=3,
    )
    return t.SegformerForSemanticSegmentation(config), {"pixel_values": _pixels(64)}


def vit() -> tuple[nn.Module, Any]:
    t = _transformers()
    return t.ViTForImageClassification(t.ViTConfig(**VISION, num_labels=5)), {"pixel_values": _pixels(8)}


def deit() -> tuple[nn.Module, Any]:
    t = _transformers()
    return t.DeiTForImageClassification(t.DeiTConfig(**VISION, num_labels=5)), {"pixel_values": _pixels(8)}


def bert() -> tuple[nn.Module, Any]:
    t = _transformers()
    return t.BertForMaskedLM(t.BertConfig(**TEXT)), {"input_ids": _ids()}


def distilbert() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.DistilBertConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, hidden_dim=24, max_position_embeddings=16)
    return t.DistilBertForSequenceClassification(config), {"input_ids": _ids()}


def albert() -> tuple[nn.Module, Any]:
    t = _transformers()
    return t.AlbertForSequenceClassification(t.AlbertConfig(**TEXT, embedding_size=8)), {"input_ids": _ids()}


def gpt2() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.GPT2Config(vocab_size=40, n_positions=16, n_embd=16, n_layer=2, n_head=4, use_cache=False)
    return t.GPT2LMHeadModel(config), {"input_ids": _ids()}


def llama() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.LlamaConfig(**TEXT, num_key_value_heads=2, tie_word_embeddings=True, use_cache=False)
    return t.LlamaForCausalLM(config), {"input_ids": _ids()}


def t5() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.T5Config(
        vocab_size=40,
        d_model=16,
        d_kv=4,
        d_ff=24,
        num_layers=2,
        num_heads=4,
        use_cache=False,
        decoder_start_token_id=0,
        feed_forward_proj="gated-gelu",
    )
    return t.T5ForConditionalGeneration(config), {"input_ids": _ids(), "decoder_input_ids": _ids(4)}


def whisper() -> tuple[nn.Module, Any]:
    t = _transformers()
    config = t.WhisperConfig(
        vocab_size=40,
        num_mel_bins=8,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_source_positions=10,
        max_target_positions=12,
        use_cache=False,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
        suppress_tokens=[],
        begin_suppress_tokens=[],
    )
    inputs = {"input_features": torch.randn(2, 8, 20), "decoder_input_ids": _ids(4)}
    return t.WhisperForConditionalGeneration(config), inputs


TRANSFORMERS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "ResNet": resnet,
    "MobileNetV2": mobilenet_v2,
    "EfficientNet": efficientnet,
    "ConvNeXt": convnext,
    "Swin": swin,
    "SegFormer": segformer,
    "ViT": vit,
    "DeiT": deit,
    "BERT": bert,
    "DistilBERT": distilbert,
    "ALBERT": albert,
    "GPT-2": gpt2,
    "Llama": llama,
    "T5": t5,
    "Whisper": whisper,
}


def logits(model: nn.Module, *args: Any, **inputs: Any) -> torch.Tensor:
    """Call a model for its logits alone: other outputs would keep their width."""
    return model(*args, **inputs).logits
