"""Residual models that are not of transformers: found on numbers or named by the user, replaced, saved and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from slot_nets import batch_for, family_of
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.families.residual_slots import SlotFamily, SubBlock
from archsmith.families.slot_alternatives import Own, Site
from archsmith.families.slot_files import load


class Mixing(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.a, self.b, self.c, self.d = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.a, self.b, self.c))
        return self.d(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Three residual sub-blocks with names nobody knows."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.before, self.look_attention = nn.LayerNorm(width), Mixing(width, 4)
        self.between, self.think = (
            nn.LayerNorm(width),
            nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, width)),
        )
        self.smooth = nn.Conv1d(width, width, 3, padding=1)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.look_attention(self.before(x)))
        x = x + self.think(self.between(x))
        return x + self.smooth_of(x)

    def smooth_of(self, x: Tensor) -> Tensor:
        return self.smooth(x.transpose(1, 2)).transpose(1, 2)


class Model(nn.Module):
    def __init__(self, width: int = 12) -> None:
        super().__init__()
        self.embed, self.blocks = nn.Linear(5, width), nn.ModuleList(Layer(width) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class TorchLayer(nn.Module):
    """A user's block around torch's own attention, which returns a tuple."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm2, self.mlp = nn.LayerNorm(width), nn.Sequential(nn.Linear(width, 20), nn.ReLU(), nn.Linear(20, width))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.norm2(x))


class NoConv(Model):
    def __init__(self) -> None:
        super().__init__()
        for block in self.blocks:
            block.smooth_of = lambda x: 0.0


def inputs() -> Tensor:
    return torch.randn(2, 6, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    made = NoConv()
    for block in made.blocks:
        del block.smooth
    return made.eval()


def test_sub_blocks_are_found_on_numbers(model: nn.Module) -> None:
    family = SlotFamily(model, example=inputs(), ranking="norm")
    attention, ffn = (family.sub_block(0, part) for part in ("attention", "ffn"))
    assert (attention.core, attention.norms, attention.roles) == ("look_attention", ("before",), {})
    assert (ffn.core, ffn.norms) == ("think", ("between",))
    assert ffn.roles == {"up": "think.0", "down": "think.2"}
    assert family.slots[0].alternatives == ("parent", "none")
    assert "ffn50" in family.slots[1].alternatives
    family.verify(inputs())
    nothing = family.build({slot.name: "none" for slot in family.slots})
    torch.testing.assert_close(nothing(inputs()), model.head(model.embed(inputs())))


def test_a_sum_that_does_not_add_up_is_not_taken(model: nn.Module) -> None:
    for block in model.blocks:
        block.smooth_of = lambda x: 0.1 * x
    with pytest.raises(UserError, match=r"NoConv, run once; allowed: .*add up to output minus input"):
        SlotFamily(model, example=inputs())


def test_named_sub_blocks_get_heads_widths_and_a_part_of_their_own() -> None:
    torch.manual_seed(0)
    model = Model().eval()
    roles = dict(zip(("query", "key", "value", "output"), (f"look_attention.{x}" for x in "abcd"), strict=True))
    named = [
        SubBlock("attention", "look_attention", roles, ("before",), heads=4),
        SubBlock("ffn", "think", {"up": "think.0", "down": "think.2"}, ("between",)),
        SubBlock("conv", "smooth"),
    ]
    own = Own("conv", "scale", lambda site: nn.Identity())
    family = SlotFamily(model, sub_blocks=named, ranking="norm", registered=[own])
    assert family.slots[0].alternatives == ("parent", "kv2", "kv1", "linear", "none")
    assert family.slots[2].alternatives == ("parent", "none", "scale")
    family.verify(inputs())
    child = family.build(
        {slot.name: {"attention": "kv1", "ffn": "ffn50", "conv": "scale"}[slot.part] for slot in family.slots}
    )
    assert child.blocks[0].look_attention.b.projection.weight.shape == (3, 12)
    assert child.blocks[0].think[0].weight.shape == (10, 12)
    assert child(inputs()).shape == (2, 6, 3)


def test_children_of_others_are_saved_and_loaded(model: nn.Module, tmp_path: Path) -> None:
    family = SlotFamily(model, example=inputs(), ranking="norm")
    child = family.build({**family.parent_architecture(), "layer0.ffn": "ffn25", "layer1.attention": "none"})
    family.save(child, tmp_path)
    again = family.load(tmp_path)
    assert torch.equal(again(inputs()), child(inputs()))
    with pytest.raises(UserError, match="parent: got None; allowed: a model of the parent's class"):
        load(tmp_path)


def test_torch_attention_keeps_its_tuple() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TorchLayer(8), TorchLayer(8)).eval()
    x = torch.randn(2, 5, 8)
    family = SlotFamily(model, example=x, ranking="norm")
    assert family.sub_block(0, "attention").returns_tuple
    assert family.slots[1].alternatives[-3:] == ("ffn10", "linear", "none")
    family.verify(x)
    child = family.build({**family.parent_architecture(), "layer0.attention": "none"})
    assert not torch.equal(child(x), model(x))


class Gate(nn.Module):
    """A user's alternative to attention: every token by itself, scaled."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gain


@pytest.mark.parametrize("name", ["llama", "bert", "gpt2"])
def test_an_alternative_of_the_users_own(name: str, tmp_path: Path) -> None:
    def make(site: Site) -> nn.Module:
        return Gate(site.width)

    rows = [Own("attention", "gate", make), Own("ffn", "gate", make)]
    family = family_of(name, registered=rows)
    assert "gate" in family.slots[0].alternatives
    assert "gate" in family.slots[1].alternatives
    batch = batch_for(name)
    child = family.build({slot.name: "gate" for slot in family.slots})
    norm = 32 if name == "bert" else 16 if name == "llama" else 32  # LayerNorm has a bias, RMSNorm has none
    assert family.cost("layer1.ffn", "gate").params == 16 + norm
    family.save(child, tmp_path)
    with torch.no_grad():
        assert torch.equal(family.load(tmp_path)(**batch)[0], child(**batch)[0])


def test_verify_sees_a_layer_that_is_no_sum() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(TorchLayer(8), TorchLayer(8)).eval()
    family = SlotFamily(model, example=torch.randn(2, 5, 8), ranking="norm")
    model[1].register_forward_hook(lambda module, args, output: output * 1.01)
    with pytest.raises(UserError, match=r"1: got a layer that changes its input by .* were removed"):
        family.verify(torch.randn(2, 5, 8))
