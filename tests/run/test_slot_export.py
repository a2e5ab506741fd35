"""Children of slots as plain source: equal to the child in a fresh process that has torch alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slot_nets import answer, batch_for, family_of, llama, worn
from torch import nn

from archsmith.core.errors import UserError
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.slot_alternatives import Own
from archsmith.run.constructor import build
from archsmith.run.slot_export import child_source, export_child, plain_form

CHOICES = (
    {"layer0.attention": "kv1", "layer0.ffn": "ffn25", "layer1.attention": "linear", "layer2.ffn": "linear"},
    {"layer0.attention": "none", "layer1.ffn": "none", "layer2.attention": "kv2", "layer2.ffn": "ffn20"},
)


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral", "gpt2", "bert"])
def test_plain_layers_compute_what_the_child_does(name: str) -> None:
    family, batch = family_of(name, ranking="norm"), batch_for(name, length=9)
    family = family.with_alternatives({"attention": sorted({*family.slots[0].alternatives, "kv2"})})
    norms = ({"layer0.ffn": "norm", "layer1.attention": "norm"},) if name == "bert" else ()
    for choices in ({}, *CHOICES, *norms):
        child = family.build({**family.parent_architecture(), **choices})
        call, weights = plain_form(child)
        network = build(call)
        network.load_state_dict(weights)
        with torch.no_grad():
            found = network.eval()(batch["input_ids"])
        torch.testing.assert_close(found, answer(child, batch), rtol=0, atol=1e-5)


def test_masks_are_obeyed() -> None:
    for name in ("llama", "bert"):
        family, ids = family_of(name, ranking="norm"), batch_for(name)["input_ids"]
        child = family.build({**family.parent_architecture(), "layer0.attention": "kv1"})
        mask = torch.ones_like(ids)
        mask[0, -2:] = 0
        call, weights = plain_form(child)
        network = build(call)
        network.load_state_dict(weights)
        with torch.no_grad():
            found, expected = network.eval()(ids, mask), child(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["llama", pytest.param("bert", marks=pytest.mark.slow), pytest.param("gpt2", marks=pytest.mark.slow)]
)
def test_the_written_source_runs_alone(name: str, tmp_path: Path) -> None:
    family = family_of(name, ranking="norm")
    child = family.build({**family.parent_architecture(), **CHOICES[0]})
    digests, notes = export_child(child, tmp_path / "final", examples=batch_for(name)["input_ids"])
    assert list(digests) == ["architecture.json", "check.safetensors", "model.py", "weights.safetensors"]
    assert notes == []
    text = (tmp_path / "final" / "model.py").read_text()
    assert text == child_source(child, plain_form(child)[0])
    assert "archsmith." not in text
    assert "transformers" not in text


def test_scaled_rotary_positions_are_kept() -> None:
    rope = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16, "rope_theta": 10000.0}  # fmt: skip
    family = HFDecoderFamily(worn(lambda: llama(rope_parameters=rope, tie_word_embeddings=True)), ranking="norm")
    child, batch = family.build(family.parent_architecture()), batch_for("llama", length=9)
    call, weights = plain_form(child)
    assert call.arguments["tied"]
    assert "head.weight" not in weights
    network = build(call)
    network.load_state_dict(weights)
    with torch.no_grad():
        torch.testing.assert_close(network.eval()(batch["input_ids"]), answer(child, batch), rtol=0, atol=1e-5)


def test_what_has_no_plain_layers_is_said_and_written_otherwise(tmp_path: Path) -> None:
    family, batch = family_of("vit", ranking="norm"), batch_for("vit")
    child = family.build({**family.parent_architecture(), "layer0.attention": "kv2", "layer1.ffn": "none"})
    digests, notes = export_child(child, tmp_path / "final", examples=batch["pixel_values"])
    assert list(digests) == ["check.safetensors", "config.json", "model.safetensors", "program.pt2"]
    assert len(notes) == 1
    assert "There is no model.py. model: got ViTForImageClassification; allowed: for model.py: Llama" in notes[0]
    assert torch.equal(answer(family.load(tmp_path / "final"), batch), answer(child, batch))


def test_an_alternative_of_ones_own_has_no_source() -> None:
    own = family_of("llama", registered=[Own("ffn", "same", lambda site: nn.Identity())])
    child = own.build({**own.parent_architecture(), "layer1.ffn": "same"})
    with pytest.raises(UserError, match=r"layer1.ffn: got 'same'; allowed: alternatives with plain layers"):
        plain_form(child)


def test_examples_and_a_plan_are_needed(tmp_path: Path) -> None:
    family = family_of("llama", ranking="norm")
    with pytest.raises(UserError, match=r"examples: got shape \(3,\); allowed: at least two inputs"):
        export_child(family.build(family.parent_architecture()), tmp_path, examples=torch.zeros(3))
    with pytest.raises(UserError, match=r"allowed: a child that SlotFamily\.build made"):
        export_child(family.parent, tmp_path, examples=torch.zeros(2, 3, dtype=torch.long))
