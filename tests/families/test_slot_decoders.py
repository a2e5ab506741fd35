"""Causal children: generation with a key-value cache equals full forwards, whatever each layer caches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from slot_nets import DECODERS, answer, batch_for, bert, everywhere, family_of, worn
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.families.bert import HFEncoderFamily
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import SlotFamily

MIXED = (
    {"layer0.attention": "kv1", "layer1.attention": "none", "layer2.attention": "linear"},
    {"layer0.attention": "none", "layer0.ffn": "none", "layer1.attention": "kv1", "layer2.ffn": "ffn25"},
    {"layer0.attention": "linear", "layer1.attention": "none", "layer2.attention": "none", "layer2.ffn": "linear"},
)
EVERY = pytest.mark.parametrize(
    "name",
    ["llama", "gpt2", *(pytest.param(n, marks=pytest.mark.slow) for n in DECODERS if n not in ("llama", "gpt2"))],
)


def child_of(family: SlotFamily, choices: dict[str, str]) -> nn.Module:
    return family.build({**family.parent_architecture(), **choices})


def generate(model: Any, batch: dict[str, Tensor], **settings: Any) -> Any:
    length = batch["input_ids"].shape[1]
    return (
        model.generate(
            **batch,
            attention_mask=torch.ones_like(batch["input_ids"]),
            min_new_tokens=9,
            max_new_tokens=9,
            do_sample=False,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
            **settings,
        )
        if length
        else None
    )


@EVERY
@pytest.mark.parametrize("choices", MIXED, ids=["heads", "first layer empty", "no cache at all"])
def test_cached_generation_equals_full_forwards(name: str, choices: dict[str, str]) -> None:
    family = family_of(name, ranking="norm")
    child, batch = child_of(family, choices), batch_for(name, length=6)
    cached = generate(child, batch, use_cache=True)
    full = generate(child, batch, use_cache=False)
    assert torch.equal(cached.sequences, full.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(full.logits), rtol=0, atol=1e-4)
    whole = answer(child, {"input_ids": cached.sequences[:, :-1]})[:, 5:]
    torch.testing.assert_close(torch.stack(cached.logits, 1), whole, rtol=0, atol=1e-4)


@EVERY
@pytest.mark.parametrize("choices", MIXED, ids=["heads", "first layer empty", "no cache at all"])
def test_going_on_from_a_cache_equals_a_full_forward(name: str, choices: dict[str, str]) -> None:
    """In pieces of several tokens, positions and masks left to the model: it asks the first layer where it is."""
    child = child_of(family_of(name, ranking="norm"), choices)
    ids = batch_for(name, length=9)["input_ids"]
    cache, found = None, []
    with torch.no_grad():
        for piece in (ids[:, :4], ids[:, 4:7], ids[:, 7:8], ids[:, 8:]):
            output = child(input_ids=piece, cache=cache, use_cache=True)
            cache = output.cache
            found.append(output.logits)
    torch.testing.assert_close(torch.cat(found, 1), answer(child, {"input_ids": ids}), rtol=0, atol=1e-4)


@EVERY
def test_the_cache_holds_what_the_costs_say(name: str) -> None:
    family = family_of(name, ranking="norm")
    for choices in MIXED:
        child = child_of(family, choices)
        with torch.no_grad():
            cache = child(**batch_for(name, count=1, length=4), use_cache=True).cache
        held = sum(t.numel() for layer in cache.layers for t in (layer.keys, layer.values) if t is not None)
        total = family.total_cost({**family.parent_architecture(), **choices})
        assert held == 4 * total.kv_values


@EVERY
def test_padding_on_the_left_changes_nothing(name: str) -> None:
    family = family_of(name, ranking="norm")
    child = child_of(family, MIXED[0])
    ids = batch_for(name, count=1, length=5)["input_ids"]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = (torch.arange(8) >= 3).long()[None]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        found = child(input_ids=padded, attention_mask=mask, position_ids=positions).logits[:, 3:]
    torch.testing.assert_close(found, answer(child, {"input_ids": ids}), rtol=0, atol=1e-5)


def test_beams_and_static_caches_work() -> None:
    family = family_of("llama", ranking="norm")
    child, batch = child_of(family, MIXED[1]), batch_for("llama", length=6)
    assert generate(child, batch, num_beams=3).sequences.shape == (2, 15)
    static = generate(child, batch, cache_implementation="static")
    assert torch.equal(static.sequences, generate(child, batch).sequences)


def test_eager_attention_gives_the_same() -> None:
    family = family_of("llama", ranking="norm")
    child, batch = child_of(family, MIXED[0]), batch_for("llama")
    expected = answer(child, batch)
    child.set_attn_implementation("eager")
    torch.testing.assert_close(answer(child, batch), expected, rtol=0, atol=1e-5)


def test_each_family_refuses_the_other_kind() -> None:
    with pytest.raises(UserError, match=r"BertForMaskedLM without causal attention.*HFEncoderFamily"):
        HFDecoderFamily(worn(bert))
    with pytest.raises(UserError, match=r"LlamaForCausalLM with causal attention.*HFDecoderFamily"):
        HFEncoderFamily(worn(DECODERS["llama"]))
    with pytest.raises(UserError, match=r"parent: got Linear; allowed: a model of transformers.*SlotFamily"):
        HFDecoderFamily(nn.Linear(2, 2))


def test_everything_linear_or_none_still_has_positions() -> None:
    """A decoder of no attention at all maps every token by itself, cached or not."""
    family = family_of("llama", ranking="norm")
    child = family.build(everywhere(family, attention="none", ffn="ffn50"))
    batch = batch_for("llama", length=6)
    alone = answer(child, {"input_ids": batch["input_ids"][:, 3:4]})
    torch.testing.assert_close(answer(child, batch)[:, 3:4], alone, rtol=0, atol=1e-6)
    assert torch.equal(generate(child, batch).sequences, generate(child, batch, use_cache=False).sequences)
