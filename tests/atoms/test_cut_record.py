import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cut_samples import REMOVED, Block, batches, block_groups, rows, steps
from safetensors.torch import save_file
from torch import nn

from archsmith.atoms.plan import plan_cut
from archsmith.atoms.records import (
    Record,
    compose,
    from_ranges,
    load_weights,
    rebuild,
    record,
    save_weights,
    to_ranges,
)
from archsmith.atoms.slices import take
from archsmith.atoms.transaction import apply_
from archsmith.atoms.units import Place, TensorCut, UnitGroup
from archsmith.core.errors import UserError


class Grouped(nn.Module):
    """A grouped convolution whose inputs are cut raggedly, and a table that is not saved."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)
        self.grouped = nn.Conv2d(8, 6, 3, padding=1, groups=2)
        self.register_buffer("shift", torch.arange(8.0).reshape(8, 1, 1), persistent=False)
        self.config = {"widths": [8, 6], "pair": (8, 6)}

    def forward(self, x):
        return self.grouped(torch.relu(self.first(x)) + self.shift)


def inputs(sizes=(4, 4)):
    """Input channels of ``grouped``; unit i is a column of the three rows of its group."""
    total = sum(sizes)
    index = np.array([[(3 * (i // sizes[0]) + o) * sizes[0] + i % sizes[0] for o in range(3)] for i in range(total)])
    halves = (tuple(range(sizes[0])), tuple(range(sizes[0], total)))
    places = (
        rows("first.weight", 0, total),
        rows("first.bias", 0, total),
        rows("shift", 0, total),
        Place("grouped.weight", (0, 1), index),
    )
    return UnitGroup("in", total, places, balance=halves)


def outputs(size=6):
    return UnitGroup("out", size, (rows("grouped.weight", 0, size), rows("grouped.bias", 0, size)))


def cut_three_times(model):
    apply_(model, plan_cut([inputs(), outputs()], {"in": [1, 6]}, model, {"config.widths.0": 6, "config.pair": [6, 6]}))
    apply_(model, plan_cut([inputs((3, 3)), outputs()], {"in": [0, 5], "out": [2, 3]}, model, {"config.widths.0": 4}))
    apply_(model, plan_cut([outputs(4)], {"out": [0, 3]}, model, {"config.widths.1": np.int64(2)}))


def test_cuts_compose_into_one_record_and_rebuild_the_network():
    torch.manual_seed(0)
    model, fresh = Grouped(), Grouped()
    whole = copy.deepcopy(model)
    cut_three_times(model)
    what = record(model)
    again = Record.from_json(what.to_json())
    assert again.to_json() == what.to_json()
    axes, kept = again.tensors["grouped.weight"].joint
    # columns 0 and 1 of group one and 5, 6 of group two went (2 and 3 by their new numbers), rows 0, 2, 3 and 5
    assert axes == (0, 1) and kept.tolist() == [[1 * 4 + 2, 1 * 4 + 3], [4 * 4 + 0, 4 * 4 + 1]]
    assert again.attributes == {"config.widths.0": (8, 4), "config.pair": ([8, 6], [6, 6]), "config.widths.1": (6, 2)}
    torch.testing.assert_close(model.grouped.weight[0], whole.grouped.weight[1, 2:], rtol=0, atol=0)
    rebuild(fresh, again, model.state_dict())
    x = torch.randn(2, 3, 5, 5)
    assert torch.equal(fresh(x), model(x))
    assert fresh.config == {"widths": [4, 2], "pair": (6, 6)} == model.config
    assert fresh.grouped.groups == 2 and torch.equal(fresh.shift, model.shift)
    assert record(fresh).to_json() == what.to_json()
    unloaded = rebuild(whole, again)  # without weights: the slices of its own
    assert torch.equal(unloaded(x), model(x))
    assert json.loads(what.to_json())["unsaved"] == {"shift": [8, 1, 1]}


@pytest.mark.parametrize("seed", range(20))
def test_one_cut_equals_two_in_a_row(seed):
    rng = np.random.default_rng(seed)

    def random_cut(shape):
        axes = {a: np.sort(rng.choice(n, rng.integers(1, n + 1), replace=False)) for a, n in enumerate(shape)}
        if rng.random() < 0.5:
            chosen = {a: axes[a] for a in rng.choice(len(shape), 2, replace=False).tolist()}
            return TensorCut(axes=chosen)
        pair = ((0, 1), (1, 2), (0, 2))[0 if seed % 2 else 1]
        count = rng.integers(1, shape[pair[1]] + 1)
        chosen_rows = np.sort(rng.choice(shape[pair[0]], rng.integers(1, shape[pair[0]] + 1), replace=False))
        matrix = np.stack(
            [r * shape[pair[1]] + np.sort(rng.choice(shape[pair[1]], count, replace=False)) for r in chosen_rows]
        )
        others = [a for a in range(len(shape)) if a not in pair]
        return TensorCut(axes={a: axes[a] for a in others}, joint=(pair, matrix))

    tensor = torch.randn(5, 6, 7)
    first = random_cut(tensor.shape)
    middle = take(tensor, first)
    second = random_cut(middle.shape)
    assert torch.equal(take(tensor, compose(first, second, tuple(tensor.shape))), take(middle, second))


def test_different_joint_axes_do_not_compose():
    matrix = np.arange(4).reshape(2, 2)
    with pytest.raises(UserError, match=r"joint axes \(1, 2\) after \(0, 1\); allowed: the same ones for one tensor"):
        compose(TensorCut(joint=((0, 1), matrix)), TensorCut(joint=((1, 2), matrix)), (2, 2, 2))


def test_ranges():
    for index in ([], [3], [0, 1, 2, 5, 7, 8], [0, 0, 1, 2, 2]):
        array = np.array(index, dtype=np.int64)
        assert from_ranges(to_ranges(array)).tolist() == index
    assert to_ranges(np.array([0, 1, 2, 5, 7, 8])) == "0-2,5,7-8"


SCRIPT = """
import sys, torch
from cut_samples import Block, batches
from archsmith.atoms.records import load_weights
model = load_weights(Block(), sys.argv[1]).eval()
print(model(batches(1, seed=9)[0][0]).double().sum().item(), model.fc.in_features)
"""


def test_code_and_one_file_rebuild_the_network_in_a_fresh_process(tmp_path):
    model = Block()
    steps(model, torch.optim.SGD(model.parameters(), 0.1), batches(3))
    apply_(model, plan_cut(block_groups(), REMOVED, model))
    save_weights(model, tmp_path / "model.safetensors")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "model.safetensors"],
        capture_output=True,
        text=True,
        env={"PYTHONPATH": f"{root}:{root / 'tests'}", "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    total, features = done.stdout.split()
    assert float(total) == model.eval()(batches(1, seed=9)[0][0]).double().sum().item()
    assert features == "16"


def test_tied_weights_are_written_once_and_given_under_any_name(tmp_path):
    def tied():
        model = nn.ModuleDict({"embed": nn.Embedding(7, 6), "head": nn.Linear(6, 7, bias=False)})
        model["head"].weight = model["embed"].weight
        return model

    model = tied()
    apply_(model, plan_cut([UnitGroup("g", 6, (rows("embed.weight", 1, 6),))], {"g": [0, 2]}, model))
    save_weights(model, tmp_path / "w.safetensors")
    again = load_weights(tied(), tmp_path / "w.safetensors")
    assert again["head"].weight is again["embed"].weight
    assert torch.equal(again["embed"].weight, model["embed"].weight)
    other = rebuild(tied(), record(model), {"head.weight": model["head"].weight.detach()})
    assert torch.equal(other["embed"].weight, model["embed"].weight)


def test_the_printer_of_differences():
    model = Block()
    apply_(model, plan_cut([block_groups()[1]], {"b": [2, 3]}, model, {"width": 9}))
    assert record(model).describe().splitlines()[1:] == [
        "  conv2.weight: 6x8x1x1 -> 4x8x1x1",
        "  conv2.bias: 6 -> 4",
        "  bn2.weight: 6 -> 4",
        "  bn2.bias: 6 -> 4",
        "  bn2.running_mean: 6 -> 4",
        "  bn2.running_var: 6 -> 4",
        "  fc.weight: 5x24 -> 5x16",
        "  width: 8 -> 9",
        "  elements of the state_dict: 533 -> 467",
    ]


def test_another_network_or_state_is_said(tmp_path):
    model = Block()
    apply_(model, plan_cut(block_groups(), REMOVED, model))
    what, fresh = record(model), Block()
    before = copy.deepcopy(fresh.state_dict())
    with pytest.raises(UserError, match=r"(?s)this one has \w+:\n  conv1.weight: 8x3x3x3 in the record, 9x3x3x3 here"):
        rebuild(Block(9), what)
    with pytest.raises(UserError, match="all names and shapes agree: other tensors are tied, or of another kind"):
        odd = Block()
        odd.bn1.running_mean = odd.bn1.running_mean.long()
        rebuild(odd, what)
    text = (
        r"(?s)state_dict: got one of another network or another cut:\n  conv1.weight: 5x3x3x3 in the record, 8x3x3x3 h"
    )
    with pytest.raises(UserError, match=text):
        rebuild(fresh, what, before)
    with pytest.raises(UserError, match=r"fc.bias: 5 in the record, missing here"):
        rebuild(fresh, what, {n: v for n, v in model.state_dict().items() if n != "fc.bias"})
    with pytest.raises(UserError, match=r"fc.more: not in the record, 1 here"):
        rebuild(fresh, what, {**model.state_dict(), "fc.more": torch.ones(1)})
    with pytest.raises(UserError, match="this one has"):  # cut already
        rebuild(model, what)
    assert fresh.conv1.weight.shape == (8, 3, 3, 3) and "_archsmith_record" not in vars(fresh)
    assert all(torch.equal(v, before[n]) for n, v in fresh.state_dict().items())
    save_file({"x": torch.ones(1)}, tmp_path / "plain.safetensors")
    with pytest.raises(
        UserError, match=r"allowed: a file with a record, as archsmith.atoms.records.save_weights writes"
    ):
        load_weights(fresh, tmp_path / "plain.safetensors")
    model.fc = nn.Linear(16, 3)
    with pytest.raises(UserError, match="allowed: a network that nothing but archsmith changed since its first cut"):
        record(model)


def test_bad_records_are_said():
    text = record(Block()).to_json()
    with pytest.raises(UserError, match="record: got text that is not JSON"):
        Record.from_json(text[:-5])
    with pytest.raises(UserError, match="record: got JSON of another kind"):
        Record.from_json("[]")
    with pytest.raises(UserError, match=re.escape("record.format_version: got 2; allowed: up to 1. Use a newer")):
        Record.from_json(text.replace('"format_version": 1', '"format_version": 2'))
    odd = Block()
    odd.kind = object()
    with pytest.raises(UserError, match="values that JSON can hold"):
        apply_(odd, plan_cut(block_groups(), REMOVED, odd, {"kind": object()}))
    assert odd.fc.in_features == 24
