import itertools
import math

import numpy as np
import pytest
import torch
from st_nas_cases import cases

from archsmith.core.errors import UserError
from archsmith.layers.tdnn import TdnnNetwork
from archsmith.tasks.base import Batch
from archsmith.tasks.ctc import ctc_loss, ctc_scores, edit_distance, greedy_decoded, output_lengths, wanted_tokens


def batch_of(targets, lengths, frames):
    width = max(map(len, targets))
    padded = torch.tensor([[*target, *[0] * (width - len(target))] for target in targets])
    context = {"lengths": torch.tensor(lengths), "target_lengths": torch.tensor([len(t) for t in targets])}
    return Batch(torch.zeros(len(targets), 1, 1, frames), padded, context)


def literal(log_probabilities_TK, target):
    """Return the negative log of the summed probability of every path that collapses to the target."""
    total = 0.0
    frames, tokens = log_probabilities_TK.shape
    for path in itertools.product(range(tokens), repeat=frames):
        merged = [token for number, token in enumerate(path) if number == 0 or token != path[number - 1]]
        if [token for token in merged if token] == list(target):
            total += math.exp(sum(float(log_probabilities_TK[t, k]) for t, k in enumerate(path)))
    return -math.log(total)


def test_lengths_follow_the_time():
    (case,) = cases("frames/")
    frames, lengths = case["input"]["T"], torch.tensor(case["input"]["lens"])
    output = TdnnNetwork(2, 3, 4, ("C1D1",), 1, 0.0)(torch.zeros(2, 1, 2, frames))
    assert output.shape[1] == case["expected"]["T_out"]
    found = output_lengths(lengths, frames, output.shape[1])
    assert found.tolist() == pytest.approx(case["expected"]["lens_out"], abs=case["tolerance"])


def test_the_loss_sums_over_all_paths_within_the_length():
    scores = torch.randn(3, 4, 3, generator=torch.Generator().manual_seed(0))
    batch = batch_of([[1], [1, 2], [2, 2]], [12, 10, 9], 12)
    losses, _, lengths = ctc_loss(lambda inputs: scores, batch, tokens=3)
    assert lengths.tolist() == [4, 3, 3]  # 10 * 4 / 12 = 3.33
    logs = scores.log_softmax(-1)
    for index, target in enumerate([[1], [1, 2], [2, 2]]):
        assert float(losses[index]) == pytest.approx(literal(logs[index, : lengths[index]], target), rel=1e-5)
    normalised, _, _ = ctc_loss(lambda inputs: logs, batch, tokens=3)
    torch.testing.assert_close(normalised, losses)


def test_decoding_merges_repetitions_and_drops_blanks_and_padding():
    best = torch.tensor([[1, 1, 0, 1, 2, 2], [0, 2, 2, 0, 1, 1]])
    scores = torch.nn.functional.one_hot(best, 3).float()
    assert greedy_decoded(scores, torch.tensor([6, 4])) == [[1, 1, 2], [2]]
    assert wanted_tokens(batch_of([[1, 2], [1]], [6, 6], 6)) == [[1, 2], [1]]


def test_edit_distance():
    assert [edit_distance(a, b) for a, b in (("abc", "abc"), ("", "ab"), ("abc", ""), ("kitten", "sitting"))] == [
        0,
        2,
        3,
        3,
    ]
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = (rng.integers(0, 3, size).tolist() for size in rng.integers(0, 6, 2))
        distance = edit_distance(first, second)
        assert distance == edit_distance(second, first) >= abs(len(first) - len(second))
        assert (distance == 0) == (first == second)


def test_scores_count_words_and_tokens():
    best = torch.tensor([[1, 0, 2, 0], [1, 0, 0, 0], [2, 1, 2, 1]])
    scores = 20.0 * torch.nn.functional.one_hot(best, 3).float()
    batch = batch_of([[1, 2], [1, 2], [2, 1]], [4, 4, 4], 4)
    found = ctc_scores(lambda inputs: scores, [batch], tokens=3)
    assert found["accuracy"] == pytest.approx(1 / 3) and found["examples"] == 3
    assert found["token_error_rate"] == pytest.approx((0 + 1 + 2) / 6)


def test_outputs_that_cannot_hold_the_target_are_refused():
    with pytest.raises(UserError, match=r"got 2 frames for an example with 2 tokens; .*hop_ms"):
        ctc_loss(lambda inputs: torch.zeros(1, 2, 3), batch_of([[1, 1]], [6], 6), tokens=3)
    with pytest.raises(UserError, match=r"network output: got \(1, 3\); allowed: scores of shape \(1, frames, 3\)"):
        ctc_loss(lambda inputs: torch.zeros(1, 3), batch_of([[1]], [6], 6), tokens=3)
