import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from archsmith.core.errors import UserError
from archsmith.strategies.growing_controller import (
    DeeperStep,
    GrowthController,
    WiderStep,
    masked_softmax,
    wider_terms,
)

GOLDEN = json.loads(Path(__file__).parents[1].joinpath("golden/eas.json").read_text())["cases"]
CODES = (2, 41, 5, 7, 41, 31)
SHORT = (2, 41, 31)


def controller(**changes):
    return GrowthController(41, (5, 10, 3), **{"seed": 0, **changes})


def test_the_published_sizes():
    expected = GOLDEN["controller parameter count"]["expected"]
    found = controller()
    sizes = {name: array.size for name, array in found.weights.items()}
    assert found.size == expected["total"] == 76_447
    assert sizes["embedding"] == expected["encoder_embedding"]
    encoder = sum(sizes[f"{way}/{part}"] for way in ("forward", "backward") for part in ("x", "h", "bias"))
    assert encoder == expected["encoder_lstm"]
    assert sizes["wider/weight"] + sizes["wider/bias"] == expected["wider"]
    assert sizes["deeper/embedding"] == expected["deeper_embeddings"]
    assert sum(sizes[f"deeper/{part}"] for part in ("x", "h", "bias")) == expected["deeper_lstm"]
    assert sum(sizes[name] for name in sizes if name.startswith("head")) == expected["classifiers"]
    # PyTorch's LSTM has a second bias vector in each cell: 4 * units more.
    lstm = torch.nn.LSTM(16, 50, bidirectional=True)
    assert sum(p.numel() for p in lstm.parameters()) == expected["encoder_lstm"] + 2 * 4 * 50


def test_the_published_masking_of_the_layer_index():
    case = GOLDEN["deeper actor layer-index masking"]
    softmax = np.array([case["input"]["softmax"]])
    mask = np.arange(10)[None] < case["input"]["layers_in_chosen_block"]
    np.testing.assert_allclose(masked_softmax(np.log(softmax), mask)[0], case["expected"], atol=1e-12)


def test_the_published_objective_and_entropy_of_the_wider_actor():
    case = GOLDEN["wider-actor objective and entropy of one trajectory step"]
    given = case["input"]
    p, chosen, mask = (np.array([given[name]], dtype=float) for name in ("p_widen", "decision", "mask"))
    logs, entropies = wider_terms(p, chosen, mask)
    assert given["reward"] * logs[0] == pytest.approx(case["expected"]["objective"], abs=1e-9)
    assert entropies[0] == pytest.approx(case["expected"]["entropy"], abs=1e-9)


# --------------------------------------------------------------------- against automatic differentiation, and torch


def torch_cell(weights, cell, size):
    lstm = torch.nn.LSTM(16, size, batch_first=True).double()
    order = [0, 1, 3, 2]  # ours: input, forget, output, candidate; torch's: input, forget, candidate, output

    def rows(name):
        return torch.cat([weights[f"{cell}/{name}"].split(size, dim=-1)[i] for i in order], dim=-1)

    bias = rows("bias")
    named = {"weight_ih_l0": rows("x").T, "weight_hh_l0": rows("h").T, "bias_ih_l0": bias}
    return lstm, {**named, "bias_hh_l0": torch.zeros_like(bias)}


def torch_encode(weights, codes):
    embedded = weights["embedding"][torch.tensor(codes)][None]
    outputs, states = [], []
    for cell, way in (("forward", 1), ("backward", -1)):
        lstm, parameters = torch_cell(weights, cell, 50)
        inputs = embedded if way == 1 else embedded.flip(1)
        output, state = torch.func.functional_call(lstm, parameters, (inputs,))
        outputs.append(output if way == 1 else output.flip(1))
        states.append(state)
    state = tuple(torch.cat([one, two], dim=-1) for one, two in zip(*states, strict=True))
    return torch.cat(outputs, dim=-1)[0], state


def torch_objective(weights, heads, wider, deeper, entropy_weight):
    value, entropies = torch.zeros((), dtype=torch.float64), []
    for step, advantage in wider:
        output, _ = torch_encode(weights, step.codes)
        p = torch.sigmoid(output @ weights["wider/weight"] + weights["wider/bias"])
        chosen, mask = torch.tensor(step.chosen), torch.tensor(step.mask)
        value = value + advantage * torch.where(chosen, p, 1 - p).log()[mask].sum()
        entropies.append(torch.distributions.Bernoulli(p[mask]).entropy().mean())
    for step, advantage in deeper:
        _, state = torch_encode(weights, step.codes)
        lstm, parameters = torch_cell(weights, "deeper", 100)
        source, own = 0, []
        for k, (chosen, mask) in enumerate(zip(step.chosen, step.masks, strict=True)):
            inputs = weights["deeper/embedding"][source].reshape(1, 1, -1)
            output, state = torch.func.functional_call(lstm, parameters, (inputs, state))
            logits = output[0, 0] @ weights[f"head{k}/weight"] + weights[f"head{k}/bias"]
            logits = logits.masked_fill(~torch.tensor(mask), float("-inf"))
            logs = functional.log_softmax(logits, dim=0)
            value = value + advantage * logs[chosen]
            allowed = logs[torch.tensor(mask)]
            own.append(-(allowed.exp() * allowed).sum())
            source = 1 + sum(heads[:k]) + chosen
        entropies.append(torch.stack(own).mean())
    return value + entropy_weight * torch.stack(entropies).mean()


def steps():
    layers = (True, False, True, True, False, True)
    wider = [
        (WiderStep(CODES, (True, False, False, True, False, False), layers), 0.7),
        (WiderStep(SHORT, (True, False, True), (True, False, True)), -0.4),
    ]
    block, kernel = (True,) * 5, (True,) * 3
    deeper = [
        (DeeperStep(CODES, (1, 1, 2), (block, (True, True) + (False,) * 8, kernel)), 0.3),
        (DeeperStep(SHORT, (4, 0), (block, (True,) + (False,) * 9)), -1.1),  # linear: no kernel
        (DeeperStep(CODES, (0, 0, 0), ((True, False, True, True, True), (True,) + (False,) * 9, kernel)), 0.5),
    ]
    return wider, deeper


@pytest.mark.parametrize("entropy_weight", [0.0, 0.5])
@pytest.mark.parametrize("which", ["wider", "deeper", "both"])
def test_objective_and_gradient_equal_automatic_differentiation(which, entropy_weight):
    ours = controller(seed=3, init=0.5)
    wider, deeper = steps()
    wider, deeper = wider if which != "deeper" else [], deeper if which != "wider" else []
    value, gradient = ours.objective(wider, deeper, entropy_weight)
    weights = {name: torch.from_numpy(array).requires_grad_() for name, array in ours.weights.items()}
    expected = torch_objective(weights, ours.heads, wider, deeper, entropy_weight)
    assert value == pytest.approx(float(expected.detach()), abs=1e-12)
    expected.backward()
    for name, tensor in weights.items():
        own = np.zeros_like(gradient[name]) if tensor.grad is None else tensor.grad.numpy()
        np.testing.assert_allclose(gradient[name], own, atol=1e-12, err_msg=name)
    assert any(np.abs(array).max() > 1e-3 for array in gradient.values())


def test_padding_changes_nothing():
    ours, (wider, deeper) = controller(init=0.5), steps()
    together, gradient = ours.objective(wider, deeper, 0.0)
    apart = [ours.objective([step], [], 0.0) for step in wider] + [ours.objective([], [step], 0.0) for step in deeper]
    assert together == pytest.approx(sum(value for value, _ in apart), abs=1e-12)
    for name, array in gradient.items():
        np.testing.assert_allclose(array, sum(one[name] for _, one in apart), atol=1e-12)
    assert np.abs(gradient["embedding"][0]).max() == 0.0  # of padding


def test_both_directions_reach_the_wider_actor():
    ours = controller(init=0.5)
    first = ours.widen_probabilities(CODES)
    changed_end, changed_start = (*CODES[:-1], 40), (11, *CODES[1:])
    assert ours.widen_probabilities(changed_end)[0] != first[0]
    assert ours.widen_probabilities(changed_start)[-1] != first[-1]


def test_samples_follow_the_probabilities_and_the_masks():
    ours, rng = controller(init=1.0), np.random.default_rng(0)
    masks = {0: [True, True, False, True, True], 1: [True] * 3 + [False] * 7}

    def mask_of(chosen):
        return None if len(chosen) == 2 and chosen[0] == 4 else masks.get(len(chosen), [True] * 3)

    drawn, number = [ours.draw_deeper(CODES, mask_of, rng) for _ in range(1_000)], 1_000
    blocks = np.bincount([step.chosen[0] for step, _ in drawn], minlength=5) / number
    p = drawn[0][1][0]
    assert p[2] == 0 and p.sum() == pytest.approx(1)
    assert np.all(np.abs(blocks - p) <= 4 * np.sqrt(p * (1 - p) / number))
    assert {len(step.chosen) for step, _ in drawn if step.chosen[0] == 4} == {2}
    assert max(step.chosen[1] for step, _ in drawn) == 2
    value, _ = ours.objective([], [(drawn[0][0], 1.0)], 0.0)
    taken = zip(drawn[0][1], drawn[0][0].chosen, strict=True)
    assert value == pytest.approx(sum(np.log(p[chosen]) for p, chosen in taken), abs=1e-12)
    assert ours.draw_deeper(CODES, lambda chosen: [False] * 5, rng) is None


def test_weights_come_back_and_strangers_are_refused():
    ours, other = controller(seed=1), controller(seed=2)
    other.load_state_dict(json.loads(json.dumps(ours.state_dict())))
    assert all(np.array_equal(array, other.weights[name]) for name, array in ours.weights.items())
    with pytest.raises(UserError, match=r"state\.controller"):
        GrowthController(24, (3, 20), seed=0).load_state_dict(ours.state_dict())
    for changes, message in (({"units": 0}, r"controller\.units"), ({"init": 0}, r"controller\.init")):
        with pytest.raises(UserError, match=message):
            controller(**changes)
