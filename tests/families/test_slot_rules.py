"""Another attention function inside the parent's attention, layer by layer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from slot_nets import answer, batch_for, everywhere, family_of
from torch import Tensor, nn
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.families.residual_slots import SlotFamily, SubBlock
from archsmith.families.slot_rules import Rule, local_linear


def softmax(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    found: Tensor = functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=True
    )
    return found


def average(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None, causal: bool, scale: float | None) -> Tensor:
    return softmax(0 * q, k, v, mask=mask, causal=causal, scale=scale)


@pytest.mark.parametrize("name", ["llama", "qwen3", "gpt2", "bert", "vit"])
def test_softmax_as_a_rule_is_the_parent(name: str, tmp_path: Path) -> None:
    rows = [Rule("softmax-rule", softmax), Rule("average", average)]
    family, batch = family_of(name, registered=rows), batch_for(name)
    expected = answer(family.parent, batch)
    child = family.build(everywhere(family, attention="softmax-rule"))
    torch.testing.assert_close(answer(child, batch), expected, rtol=0, atol=1e-5)
    mixed = family.build({**family.parent_architecture(), "layer1.attention": "average"})
    assert not torch.allclose(answer(mixed, batch), expected, atol=1e-4)
    assert torch.equal(answer(family.parent, batch), expected)
    if "input_ids" in batch and name != "bert":
        for model in (child, mixed):
            settings = {"do_sample": False, "min_new_tokens": 5, "max_new_tokens": 5, "pad_token_id": 0}
            cached = model.generate(**batch, **settings)  # type: ignore[operator]
            assert torch.equal(cached, model.generate(**batch, **settings, use_cache=False))  # type: ignore[operator]
    family.save(mixed, tmp_path)
    assert torch.equal(answer(family.load(tmp_path), batch), answer(mixed, batch))


def test_local_linear_attention_with_a_huge_ridge_is_the_parent(tmp_path: Path) -> None:
    for name in ("llama", "bert"):
        family, batch = family_of(name, registered=[local_linear("lla-flat", ridge=1e8)]), batch_for(name)
        flat = family.build(everywhere(family, attention="lla-flat"))
        torch.testing.assert_close(answer(flat, batch), answer(family.parent, batch), rtol=0, atol=1e-4)
        steep = family.with_alternatives({"attention": ["lla"]}).build(everywhere(family, attention="lla"))
        assert torch.isfinite(answer(steep, batch)).all()
        family.with_alternatives({"attention": ["lla"]}).save(steep, tmp_path / name)
        assert torch.equal(answer(family.load(tmp_path / name), batch), answer(steep, batch))
        assert not torch.allclose(answer(steep, batch), answer(family.parent, batch), atol=1e-3)


def test_models_of_ones_own_are_refused() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attn = nn.Linear(4, 4)

    with pytest.raises(UserError, match=r"layer0.attention: got Linear; allowed: attention of transformers.*Own"):
        SlotFamily(
            nn.Sequential(Block()),
            sub_blocks=[SubBlock("attention", "attn")],
            registered=[Rule("average", average)],
            alternatives={"attention": ["average"]},
        )
