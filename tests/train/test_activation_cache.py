"""The activation cache gives back every layer's call bit for bit, and refuses what does not fit the disk."""

import json

import pytest
import torch
from plain_blocks import plain_batches, plain_model
from slot_nets import batch_for, family_of

from archsmith.core.errors import UserError
from archsmith.train.activation_cache import ActivationCache, hidden_of, recorded

PATHS = ("blocks.0", "blocks.1", "blocks.2")


def test_layers_replay_from_the_disk_bit_for_bit(tmp_path):
    model, batches = plain_model(), plain_batches(3)
    cache = ActivationCache.build(model, PATHS, batches, tmp_path)
    assert (cache.count, cache.layers) == (3, 3)
    for batch in range(3):
        for layer in range(3):
            call = cache.call(batch, layer)
            assert torch.equal(model.blocks[layer](*call.args, **call.kwargs), call.output)
        assert torch.equal(cache.call(batch, 0).output, cache.call(batch, 1).hidden)
        assert cache.mask(batch) is None


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_layers_of_transformers_replay_with_their_masks_and_positions(tmp_path, name):
    family = family_of(name)
    batch = {**batch_for(name), "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2])}
    cache = ActivationCache.build(family.parent, family.layer_paths, [batch], tmp_path)
    assert torch.equal(cache.mask(0), batch["attention_mask"])
    with torch.no_grad():
        for index in range(3):
            call = cache.call(0, index)
            found = hidden_of(family.layer(index)(*call.args, **call.kwargs))
            assert torch.allclose(found, call.output, atol=1e-6)
    # Hidden states and what all layers share are stored once: 4 hidden states, not 6.
    hidden = call.hidden.numel() * 4
    assert cache.bytes < 6 * hidden + 8000


def test_what_is_there_is_not_computed_again(tmp_path):
    model, batches = plain_model(), plain_batches(4)
    stops = iter([False, False, True])
    assert ActivationCache.build(model, PATHS, batches, tmp_path, should_stop=lambda: next(stops)) is None
    with pytest.raises(UserError, match="filled to the end"):
        ActivationCache(tmp_path)
    first = (tmp_path / "batch-00000.safetensors").stat().st_mtime_ns
    runs = []
    handle = model.register_forward_hook(lambda *_: runs.append(1))
    ActivationCache.build(model, PATHS, batches, tmp_path)
    assert len(runs) == 2
    assert (tmp_path / "batch-00000.safetensors").stat().st_mtime_ns == first
    ActivationCache.build(model, PATHS, batches, tmp_path)
    assert len(runs) == 2
    handle.remove()


def test_more_than_the_disk_has_is_refused_before_anything_is_written(tmp_path):
    folder = tmp_path / "deep" / "activations"
    with pytest.raises(UserError, match=r"GiB for 6 batches; allowed: at most the .* GiB .*fewer examples \(about 3 b"):
        ActivationCache.build(plain_model(), PATHS, plain_batches(), folder, free_bytes=lambda path: 30_000)
    assert not folder.exists()
    need = ActivationCache.build(plain_model(), PATHS, plain_batches(), folder).bytes
    ActivationCache.build(plain_model(), PATHS, plain_batches(), tmp_path / "b", free_bytes=lambda path: need)


def test_activations_of_another_model_or_of_one_that_is_not_finite_are_refused(tmp_path):
    model = plain_model()
    ActivationCache.build(model, PATHS, plain_batches(1), tmp_path / "a", key="one")
    with pytest.raises(UserError, match="another model or other data"):
        ActivationCache.build(model, PATHS, plain_batches(1), tmp_path / "a", key="two")
    with torch.no_grad():
        model.blocks[1].mlp.down.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"NaN or infinite output of blocks\.1 at batch 0"):
        ActivationCache.build(model, PATHS, plain_batches(1), tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_layer_that_is_never_called_is_named(tmp_path):
    model = plain_model()
    model.unused = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="layers that a call of the model runs through"):
        ActivationCache.build(model, [*PATHS, "unused"], plain_batches(1), tmp_path)


def test_recording_leaves_the_model_as_it_was():
    model = plain_model()
    with recorded(model, PATHS) as calls:
        model(plain_batches(1)[0])
    assert set(calls) == {0, 1, 2}
    assert not any(module._forward_hooks for module in model.modules())
    assert json.dumps(sorted(calls)) == "[0, 1, 2]"
