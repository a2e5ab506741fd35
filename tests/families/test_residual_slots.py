"""Slots of small Llama and BERT models: what is found, the identities of the published method, errors."""

from __future__ import annotations

import math

import pytest
import torch
from slot_nets import DECODERS, ENCODERS, answer, batch_for, everywhere, family_of, layer_call, llama, run_layer, worn
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.families.decoder import HFDecoderFamily
from archsmith.families.residual_slots import SlotFamily, SubBlock

NAMES = ["llama", "bert"]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in (*DECODERS, *ENCODERS) if name not in NAMES]
BOTH = pytest.mark.parametrize("name", NAMES)
EVERY = pytest.mark.parametrize("name", [*NAMES, *MORE])
TEXT = pytest.mark.parametrize("name", [*NAMES, *(row for row in MORE if "vit" not in row.values)])


def test_slots_of_a_decoder_and_their_published_alternatives() -> None:
    family = family_of("llama")
    assert [slot.name for slot in family.slots][:3] == ["layer0.attention", "layer0.ffn", "layer1.attention"]
    assert family.layer_paths == ("model.layers.0", "model.layers.1", "model.layers.2")
    assert family.slots[0].alternatives == ("parent", "kv2", "kv1", "linear", "none")
    widths = ("ffn87", "ffn75", "ffn50", "ffn25", "ffn20", "ffn10")
    assert family.slots[1].alternatives == ("parent", *widths, "linear", "none")
    assert family.space.size == (5 * 9) ** 3


def test_an_encoder_with_norms_behind_the_sum_offers_the_norm_alone() -> None:
    family = family_of("bert")
    assert family.slots[0].alternatives == ("parent", "kv2", "kv1", "linear", "norm", "none")
    block = family.sub_block(0, "ffn")
    assert (block.core, block.closing, block.post_norm) == ("intermediate", "output", True)


@EVERY
def test_the_parent_everywhere_is_the_parent_and_of_its_class(name: str) -> None:
    family, batch = family_of(name), batch_for(name)
    child = family.build(family.parent_architecture())
    assert type(child) is type(family.parent)
    assert torch.equal(answer(child, batch), answer(family.parent, batch))


@EVERY
def test_a_layer_without_attention_and_ffn_is_the_identity(name: str) -> None:
    family, batch = family_of(name), batch_for(name)
    call = layer_call(family, 1, batch)
    stream = call[0][0] if call[0] else call[1]["hidden_states"]
    layer = family.variant_layer(1, {"attention": "none", "ffn": "none"})
    assert torch.equal(run_layer(layer, call), stream)
    assert not list(layer.parameters())


@BOTH
def test_as_many_heads_and_channels_as_before_are_the_parent(name: str) -> None:
    family, batch = family_of(name, ranking="norm"), batch_for(name)
    call = layer_call(family, 0, batch)
    layer = family.variant_layer(0, {"attention": "kv4", "ffn": "width24"})
    assert torch.equal(run_layer(layer, call), run_layer(family.layer(0), call))


@BOTH
def test_pooling_equal_heads_changes_nothing(name: str) -> None:
    family, batch = family_of(name), batch_for(name)
    block = family.sub_block(0, "attention")
    site = family.site(0, "attention")
    with torch.no_grad():
        for role in ("key", "value"):
            for tensor in site.role(role).parameters():
                heads = tensor.unflatten(0, (2, 2, block.head_dim))
                heads[:, 1] = heads[:, 0]
    call = layer_call(family, 0, batch)
    found = run_layer(family.variant_layer(0, {"attention": "kv2"}), call)
    torch.testing.assert_close(found, run_layer(family.layer(0), call), rtol=0, atol=1e-5)


@TEXT
def test_linear_from_attention_equals_attention_on_one_token(name: str) -> None:
    family, batch = family_of(name), batch_for(name, length=1)
    for index in range(3):
        call = layer_call(family, index, batch)
        found = run_layer(family.variant_layer(index, {"attention": "linear"}), call)
        torch.testing.assert_close(found, run_layer(family.layer(index), call), rtol=0, atol=1e-5)


@EVERY
def test_a_narrow_ffn_equals_the_parent_with_channels_masked(name: str) -> None:
    family, batch = family_of(name), batch_for(name)
    family.collect_statistics([batch])
    scores = family.statistics["layer1.ffn"]["channels"]
    family.verify(batch)
    gone = scores.argsort()[: len(scores) // 2]
    call = layer_call(family, 1, batch)

    def mask(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_fill(-1, gone, 0.0),)

    handle = family.site(1, "ffn").role("down").register_forward_pre_hook(mask)
    expected = run_layer(family.layer(1), call)
    handle.remove()
    found = run_layer(family.variant_layer(1, {"ffn": "ffn50"}), call)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(found, run_layer(family.layer(1), call), atol=1e-3)


@EVERY
def test_costs_of_every_alternative_are_those_of_the_built_child(name: str) -> None:
    family = family_of(name, ranking="norm")
    for slot in family.slots[:2]:
        for alternative in slot.alternatives:
            point = everywhere(family, **{slot.part: alternative})
            child = family.build(point)
            assert family.total_cost(point).params == sum(p.numel() for p in child.parameters())


@EVERY
def test_a_trained_state_goes_into_a_library_and_into_the_child(name: str) -> None:
    family, batch = family_of(name, ranking="norm"), batch_for(name)
    library, heads = {}, family.slots[0].alternatives[1]
    for slot in family.slots[2:4]:
        for alternative in [row for row in slot.alternatives if row in (heads, "ffn50", "linear")]:
            layer = family.variant_layer(slot.layer, {slot.part: alternative})
            with torch.no_grad():
                for tensor in family.variant_state(slot.layer, slot.part, layer):
                    dict(layer.named_parameters())[tensor].add_(0.01)
            state = family.variant_state(slot.layer, slot.part, layer)
            again = family.load_variant(slot.layer, slot.part, alternative, state)
            assert all(torch.equal(a, b) for a, b in zip(again.parameters(), layer.parameters(), strict=True))
            library[slot.name, alternative] = state
    point = dict(family.parent_architecture()) | {"layer1.attention": heads, "layer1.ffn": "ffn50"}
    child = family.build(point, library=library)
    layer = child.get_submodule(family.layer_paths[1])
    for slot, alternative in (("attention", heads), ("ffn", "ffn50")):
        found = family.variant_state(1, slot, layer)
        assert all(torch.equal(found[key], value) for key, value in library[f"layer1.{slot}", alternative].items())
    assert not torch.equal(answer(child, batch), answer(family.build(point), batch))


def test_building_leaves_the_parent_alone() -> None:
    family, batch = family_of("llama", ranking="norm"), batch_for("llama")
    before, expected = {k: v.clone() for k, v in family.parent.state_dict().items()}, answer(family.parent, batch)
    family.build(everywhere(family, attention="kv1", ffn="ffn25"))
    family.variant_layer(0, {"attention": "none", "ffn": "linear"})
    assert all(torch.equal(before[key], value) for key, value in family.parent.state_dict().items())
    assert torch.equal(answer(family.parent, batch), expected)
    assert not hasattr(family.parent.config, "archsmith_slots")


def test_models_without_blocks_are_told_what_was_looked_for() -> None:
    with pytest.raises(UserError, match=r"no list of layers.*ModuleList.*q_proj/query.*sub_blocks=\[SubBlock"):
        SlotFamily(nn.Linear(3, 3))
    with pytest.raises(UserError, match=r"lists 0? ?\(?.*2 x Linear"):
        SlotFamily(nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3)))


def test_bad_input_is_refused() -> None:
    model = worn(llama)
    with pytest.raises(
        UserError, match=r"'kv3'|kv_heads: got 3; allowed: a divisor of the 4 heads there are: \[1, 2, 4\]"
    ):
        HFDecoderFamily(model, alternatives={"attention": ["kv3"]})
    for row in ("width0", "width25", "ffn0", "ffn101"):
        with pytest.raises(UserError, match=rf"alternatives\['ffn'\]: got '{row}'; allowed: a width from 1 to 24"):
            HFDecoderFamily(model, alternatives={"ffn": [row]})
    with pytest.raises(
        UserError, match=r"alternatives\['attention'\]: got 'ffn50'; allowed: parent, none, norm, linear"
    ):
        HFDecoderFamily(model, alternatives={"attention": ["ffn50"]})
    with pytest.raises(UserError, match="allowed: 'norm' for post-norm blocks only"):
        HFDecoderFamily(model, alternatives={"attention": ["norm"]})
    with pytest.raises(UserError, match=r"alternatives: got \['mlp'\]; allowed: parts or slots of this model"):
        HFDecoderFamily(model, alternatives={"mlp": ["none"]})
    with pytest.raises(UserError, match=r"statistics of layer0.ffn: .*collect_statistics\(batches\)"):
        HFDecoderFamily(model).variant_layer(0, {"ffn": "ffn50"})
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(UserError, match=r"parent.model.layers.1.mlp.up_proj.weight: got NaN or infinite"):
        HFDecoderFamily(model)


def test_named_sub_blocks_must_exist() -> None:
    wanted = [SubBlock("attention", "self_attn", {"output": "self_attn.out"})]
    with pytest.raises(UserError, match=r"sub_blocks\['attention'\]: got \['self_attn.out'\]"):
        SlotFamily(worn(llama), sub_blocks=wanted)


def test_the_iterative_ranking_keeps_what_was_removed_last() -> None:
    family = family_of("llama", ranking="iterative")
    family.collect_statistics([batch_for("llama", seed=seed) for seed in range(4)])
    ranks = family.statistics["layer0.ffn"]["removal"]
    assert sorted(ranks.tolist()) == list(range(24))
    kept = ranks.argsort()[-6:].sort().values
    down = family.variant_layer(0, {"ffn": "ffn25"}).mlp.down_proj.weight
    assert torch.equal(down, family.layer(0).mlp.down_proj.weight[:, kept])
    with pytest.raises(UserError, match="batches: got none; allowed: at least one calibration batch"):
        family.collect_statistics([])


def test_activations_that_are_not_finite_are_refused() -> None:
    family = family_of("llama")
    family.parent.model.embed_tokens.register_forward_hook(lambda module, args, output: output * math.inf)
    with pytest.raises(UserError, match=r"activations of layer0.attention: got NaN or infinite"):
        family.collect_statistics([batch_for("llama")])


def test_padding_does_not_count_in_a_calibration_pass() -> None:
    family, ids = family_of("bert"), batch_for("bert", length=5)["input_ids"]
    family.collect_statistics([{"input_ids": ids, "attention_mask": torch.ones_like(ids)}])
    alone = family.statistics
    padded = torch.cat([ids, torch.full((2, 4), 9)], 1)
    mask = torch.cat([torch.ones_like(ids), torch.zeros(2, 4, dtype=torch.long)], 1)
    family.collect_statistics([{"input_ids": padded, "attention_mask": mask}])
    for name, rows in alone.items():
        for key, scores in rows.items():
            torch.testing.assert_close(family.statistics[name][key], scores, rtol=1e-4, atol=1e-5)
