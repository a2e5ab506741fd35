"""The benchmark on a pre-trained transformer, at a small size with random weights: the same cut, the same record."""

import copy
import itertools
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks" / "evidence"))
import shrink_minilm
from transformers import BertConfig


@pytest.mark.slow
@pytest.mark.parametrize("score", ["l2", "taylor"])
def test_half_a_classifier_on_bert_is_rebuilt_from_its_record(tmp_path, score):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=8,
        intermediate_size=128,
        max_position_embeddings=16,
        pad_token_id=0,
    )
    whole = shrink_minilm.Classifier(config)
    ids = torch.randint(1, 60, (4, 12))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    batches = itertools.repeat((ids, mask, torch.tensor([0, 1, 1, 0])))
    network = copy.deepcopy(whole)
    atoms = shrink_minilm.units(network, config, (ids, mask), divisor=4)
    shrink = shrink_minilm.cut(network, atoms, batches, budget="macs<=0.5x", score=score, seed=0)

    # The exact budget holds, by parts that were allowed to go and by no others.
    assert shrink.costs.recount(network)["macs"] <= 0.5 * shrink.start["macs"]
    left = shrink_minilm.kept(shrink, config)
    assert sum(left["heads"]) < 16 and sum(left["neurons"]) < 256
    assert all(n % 4 == 0 for n in left["neurons"])
    for number, layer in enumerate(network.bert.encoder.layer):
        assert layer.attention.self.query.weight.shape == (4 * left["heads"][number], 32)
        assert layer.output.dense.weight.shape == (32, left["neurons"][number])

    # What stayed are slices of the original: at learning rate 0 nothing else happened to the weights.
    whole_rows = {tuple(row.tolist()) for row in whole.bert.encoder.layer[0].intermediate.dense.weight}
    assert {tuple(row.tolist()) for row in network.bert.encoder.layer[0].intermediate.dense.weight} <= whole_rows

    shrink_minilm.train(network, shrink_minilm.adamw(network, 1e-3), batches, 2)
    assert shrink_minilm.rebuilt_equal(network, config, tmp_path / "cut.safetensors", (ids, mask))
