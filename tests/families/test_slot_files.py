"""Children as files: an exact round trip, for models of transformers and for others, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from slot_nets import DECODERS, ENCODERS, answer, batch_for, family_of, llama, worn

from archsmith.core.errors import UserError
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import plan_of
from archsmith.families.slot_files import load

NAMES = ("llama", "bert")
EVERY = pytest.mark.parametrize(
    "name",
    [*NAMES, *(pytest.param(n, marks=pytest.mark.slow) for n in (*DECODERS, *ENCODERS) if n not in NAMES)],
)
CHOICES = {
    "layer0.attention": "kv1",
    "layer0.ffn": "ffn25",
    "layer1.attention": "linear",
    "layer1.ffn": "none",
    "layer2.attention": "none",
    "layer2.ffn": "linear",
}


@EVERY
def test_a_saved_child_comes_back_exactly(name: str, tmp_path: Path) -> None:
    family, batch = family_of(name, ranking="norm"), batch_for(name)
    child = family.build({**family.parent_architecture(), **CHOICES})
    family.save(child, tmp_path / "child")
    assert sorted(path.suffix for path in (tmp_path / "child").iterdir()) in (
        [".json", ".safetensors"],
        [".json", ".json", ".safetensors"],
    )
    again = load(tmp_path / "child")
    assert type(again) is type(child)
    assert torch.equal(answer(again, batch), answer(child, batch))
    state = child.state_dict()
    assert list(again.state_dict()) == list(state)
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    assert plan_of(again) == plan_of(child)
    again.save_pretrained(tmp_path / "twice")
    assert torch.equal(answer(load(tmp_path / "twice"), batch), answer(child, batch))


@pytest.mark.parametrize("choice", ["norm"])
def test_the_norm_alone_comes_back(choice: str, tmp_path: Path) -> None:
    family, batch = family_of("bert"), batch_for("bert")
    child = family.build({slot.name: choice for slot in family.slots})
    family.save(child, tmp_path)
    assert torch.equal(answer(load(tmp_path), batch), answer(child, batch))


def test_the_plan_of_every_layer_is_in_the_config(tmp_path: Path) -> None:
    family = family_of("llama", ranking="norm")
    family.save(family.build({**family.parent_architecture(), **CHOICES}), tmp_path)
    plan = json.loads((tmp_path / "config.json").read_text())["archsmith_slots"]["plan"]
    assert plan[0] == {"attention": {"name": "kv1", "kv_heads": 1}, "ffn": {"name": "ffn25", "width": 6}}
    assert plan[2] == {"attention": {"name": "none"}, "ffn": {"name": "linear"}}


def test_damaged_and_foreign_folders_are_refused(tmp_path: Path) -> None:
    family = family_of("llama", ranking="norm")
    with pytest.raises(UserError, match="allowed: a folder that a child was saved in"):
        load(tmp_path / "nothing")
    family.parent.save_pretrained(tmp_path / "parent")
    with pytest.raises(UserError, match=r"config\.json\.archsmith_slots: got None"):
        load(tmp_path / "parent")
    with pytest.raises(UserError, match=r"allowed: a child that SlotFamily\.build made"):
        family.save(family.parent, tmp_path / "parent")
    folder = tmp_path / "child"
    family.save(family.build({**family.parent_architecture(), **CHOICES}), folder)
    config = json.loads((folder / "config.json").read_text())
    config["archsmith_slots"]["plan"][0]["ffn"]["width"] = 7
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"(weights|directory): got"):
        load(folder)
    config["archsmith_slots"]["plan"][0]["ffn"] = {"name": "mine"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"alternatives\['ffn'\]: got 'mine'.*registered="):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"\x80\x04pickle")
    config["archsmith_slots"]["plan"][0]["ffn"] = {"name": "ffn25", "width": 6}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="allowed: a folder that a child was saved in"):
        load(folder)


def test_half_precision_comes_back_as_such(tmp_path: Path) -> None:
    model = worn(llama).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    family, batch = HFDecoderFamily(model, ranking="norm"), batch_for("llama")
    child = family.build({**family.parent_architecture(), **CHOICES})
    assert {p.dtype for p in child.parameters()} == {torch.bfloat16}
    family.save(child, tmp_path)
    again = load(tmp_path)
    assert {p.dtype for p in again.parameters()} == {torch.bfloat16}
    assert torch.equal(answer(again, batch), answer(child, batch))


def test_a_class_of_the_users_own_is_taken_from_the_parent(tmp_path: Path) -> None:
    class Mine(type(worn(llama))):  # type: ignore[misc]
        pass

    family = HFDecoderFamily(worn(lambda: Mine(llama().config)), ranking="norm")
    family.save(family.build({**family.parent_architecture(), **CHOICES}), tmp_path)
    assert type(family.load(tmp_path)) is Mine
    with pytest.raises(UserError, match=r"architectures: got 'Mine'; allowed: a model class of the installed"):
        load(tmp_path)
