"""Training-free selection: the published rank correlations from the real tables, and what is kept of drawn cells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from shared_data import shared_data

from archsmith.core.errors import UserError
from archsmith.evaluate.tables.training_free import PublishedScores
from archsmith.evaluate.zero_cost import Batch
from archsmith.families.nas_bench_nlp import RecurrentFamily
from archsmith.methods.training_free_rnn_transformer import Settings, correlations, published_correlations, ranked

CASES = json.loads((Path(__file__).parents[1] / "golden" / "training-free-rnn-transformer.json").read_text())["cases"]
COLUMNS = {
    "Activation Distance": "activation_distance",
    "Synaptic Saliency": "synaptic_saliency",
    "Jacobian Covariance": "jacobian_covariance",
    "Jacobian Cosine": "jacobian_cosine",
    "Hidden Synaptic Saliency": "hidden_synaptic_saliency",
    "Layer 1 Hidden Covariance": "layer_1_hidden_covariance",
    "Layer 2 Hidden Covariance": "layer_2_hidden_covariance",
    "Layer 3 Hidden Covariance": "layer_3_hidden_covariance",
}


def family():
    return RecurrentFamily(image=(1, 1, 6), num_classes=11, embedding=4, hidden=5, layers=2, nodes=5)


def batch():
    tokens = family().examples(8)
    return Batch(tokens, torch.zeros(8, dtype=torch.int64))


def test_published_correlations_are_recomputed_from_the_tables():
    pytest.importorskip("pyarrow")
    found = published_correlations(shared_data("nas-benchmarks"))
    for name, expected in CASES["published_correlations_rnn"]["expected"].items():
        mine = found["rnn"][COLUMNS[name]]
        assert (mine.tau, mine.rho) == pytest.approx(expected, abs=1e-4), name
        assert mine.networks == 8794
    for name, expected in CASES["published_correlations_bert"]["expected"].items():
        mine = found["bert"][name.removesuffix(" (as published)")]
        assert (mine.tau, mine.rho) == pytest.approx(expected, abs=1e-4), name
        assert mine.networks == 500
    assert max(found["bert"], key=lambda name: found["bert"][name].tau) == "Number of Parameters (true sizes)"
    params = found["rnn"]["trainable_params"]
    assert (params.tau, params.networks) == (pytest.approx(-0.025, abs=1e-3), 10_031)


def test_correlations_of_a_made_up_table():
    target = np.array([3.0, 1.0, 2.0])
    made = PublishedScores(np.arange(3), target, "loss", False, {"same": target, "opposite": -target})
    found = correlations(made)
    assert (found["same"].tau, found["opposite"].rho, found["same"].networks) == (1.0, -1.0, 3)


def test_the_best_cell_is_first_and_repeats():
    settings = Settings(samples=12)
    found = ranked(family(), batch(), settings, seed=3)
    scores = [each.score for each in found if not math.isnan(each.score)]
    assert scores == sorted(scores, reverse=True)
    assert len({each.architecture.network_digest for each in found}) == len(found) > 5
    again = ranked(family(), batch(), settings, seed=3)
    assert [each.architecture for each in again] == [each.architecture for each in found]


def test_scores_that_point_down_are_turned():
    found = ranked(family(), batch(), Settings(score="hidden_saliency", samples=8))
    scores = [each.score for each in found]
    assert scores == sorted(scores)


def test_unknown_scores_are_named():
    with pytest.raises(UserError, match="hidden_covariance"):
        ranked(family(), batch(), Settings(score="luck"))
