"""Exact costs of slots: the published 8B child, and counts of built models."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from slot_nets import DECODERS, ENCODERS, batch_for, everywhere, family_of

from archsmith.cost import count
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.slot_costs import MIB

CASES: dict[str, Any] = json.loads((Path(__file__).parents[1] / "golden" / "puzzle_slots.json").read_text())["cases"]


@pytest.fixture(scope="module")
def eight_billion() -> HFDecoderFamily:
    """Llama-3.1-8B without weights: nothing of its size is allocated."""
    case = CASES["llama31_8b_20_attention"]["input"]
    config = transformers.LlamaConfig(
        vocab_size=case["vocab"],
        hidden_size=case["hidden"],
        intermediate_size=case["ffn"],
        num_hidden_layers=case["layers"],
        num_attention_heads=case["q_heads"],
        num_key_value_heads=case["kv_heads"],
        tie_word_embeddings=False,
    )
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    return HFDecoderFamily(model.to(torch.bfloat16))


def test_the_published_child_of_8b_has_the_published_totals(eight_billion: HFDecoderFamily) -> None:
    case = CASES["llama31_8b_20_attention"]
    facts, expected = case["input"], case["expected"]
    sequence = facts["prefill"] + facts["generation"]
    point = dict(eight_billion.parent_architecture())
    point |= {f"layer{index}.attention": "none" for index in range(16, 28)}  # layers 17 to 28, counted from 1
    total = eight_billion.total_cost(point)
    rows = {part: [s for s in eight_billion.slots if s.part == part] for part in ("attention", "ffn")}
    costs = {part: [eight_billion.cost(s, point[s.name]) for s in rows[part]] for part in rows}
    dtype, batch = torch.bfloat16, facts["batch"]
    assert total.params == expected["num_params"]
    assert sum(c.params for c in costs["attention"]) == expected["attention_num_params"]
    assert sum(c.params for c in costs["ffn"]) == expected["ffn_num_params"]
    assert batch * total.kv_bytes(sequence, dtype) / MIB == expected["kv_cache_memory_mib"]
    memory = {p: sum(c.memory(batch=batch, sequence=sequence, dtype=dtype) for c in costs[p]) / MIB for p in costs}
    assert memory == {"attention": expected["attention_memory_mib"], "ffn": expected["ffn_memory_mib"]}
    assert total.memory(batch=batch, sequence=sequence, dtype=dtype) / MIB == expected["memory_mib"]
    assert sum(c.kv_values for c in costs["attention"]) == expected["num_kv_heads"] * 2 * facts["head_dim"]
    child = eight_billion.build(point)
    assert sum(p.numel() for p in child.parameters()) == expected["num_params"]


def test_attention_with_8_and_4_heads_costs_what_was_published(eight_billion: HFDecoderFamily) -> None:
    case = CASES["subblock_costs"]
    for name, heads in (("parent", "8"), ("kv4", "4")):
        cost, expected = eight_billion.cost("layer0.attention", name), case["expected"][heads]
        assert cost.params == expected["attention_params"]
        cached = case["input"]["batch"] * cost.kv_bytes(case["input"]["seq"], torch.bfloat16)
        assert cached / MIB == expected["kv_cache_mib"]


def test_the_library_counts_are_the_published_ones(eight_billion: HFDecoderFamily) -> None:
    expected = CASES["block_library_counts"]["expected"]
    attention, ffn = (eight_billion.slots[at].alternatives for at in (0, 1))
    assert (len(attention), len(ffn)) == (6, 9)
    assert len(attention) * len(ffn) == expected["per_layer"]
    assert 80 * math.log10(len(attention) * len(ffn)) == pytest.approx(expected["log10_space"], abs=1e-9)
    assert eight_billion.space.size == expected["per_layer"] ** 32
    case = CASES["block_library_counts"]["input"]["llama8b"]
    widths = [f"width{1024 * k}" for k in range(1, 10)]
    wider = eight_billion.with_alternatives({"ffn": [*widths, "linear", "none"]})
    rows = [(s.part, [a for a in s.alternatives if a not in ("parent", "none")]) for s in wider.slots]
    assert sum(len(r) for _, r in rows) == expected["llama8b_decoupled_trained"]
    per_layer = len(wider.slots[0].alternatives) * len(wider.slots[1].alternatives)
    assert 32 * per_layer == expected["llama8b_coupled"] == 32 * case["attention"] * case["ffn"]


@pytest.mark.parametrize("name", ["llama", "bert", *(pytest.param(n, marks=pytest.mark.slow) for n in (
    "qwen2", "qwen3", "mistral", "gpt2", "distilbert", "vit"))])  # fmt: skip
def test_macs_are_those_that_are_counted(name: str) -> None:
    family = family_of(name, ranking="norm")
    assert name in {**DECODERS, **ENCODERS}
    batch = batch_for(name, length=6)
    tokens = 5 if name == "vit" else 6  # four patches and the class token
    for choice in ({}, {"attention": "kv1", "ffn": "ffn50"}, {"attention": "linear", "ffn": "linear"}, {"ffn": "none"}):
        point = everywhere(family, **choice)
        child = family.build(point)
        if hasattr(child.config, "use_cache"):
            child.config.use_cache = False
        key, value = next(iter(batch.items()))
        counted = count(_Logits(child, key), value)
        expected = family.total_cost(point).macs(tokens)
        assert (counted.macs, counted.uncounted) == (expected, ())
        assert counted.params == family.total_cost(point).params


class _Logits(torch.nn.Module):
    def __init__(self, model: torch.nn.Module, key: str) -> None:
        super().__init__()
        self.model, self.key = model, key

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        found = self.model(**{self.key: value})
        return found.logits if hasattr(found, "logits") else found.last_hidden_state


def test_a_sliding_window_bounds_the_cache() -> None:
    cost = family_of("mistral").cost("layer0.attention", "parent")
    assert cost.kv_bytes(3) == 3 * cost.kv_values * 4
    assert cost.kv_bytes(100) == 5 * cost.kv_values * 4


def test_without_attention_only_the_first_layer_keeps_a_number_for_each_token() -> None:
    family = family_of("llama")
    assert [family.cost(f"layer{i}.attention", "none").kv_values for i in range(3)] == [1, 0, 0]
    assert family_of("bert").cost("layer0.attention", "none").kv_values == 0
