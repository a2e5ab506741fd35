"""Block-wise distillation: what is trained, that it helps, that nothing is repeated, here and in other processes."""

import dataclasses
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import plain_blocks
import pytest
import torch
from plain_blocks import plain_batches, plain_family
from safetensors.torch import load_file

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.journal import Journal
from archsmith.train import blockwise
from archsmith.train.activation_cache import ActivationCache
from archsmith.train.blockwise import BlockJob, BlockLibrary, BlockTraining, Inline, distil_library

QUICK = BlockTraining(steps=30, lr=3e-3)


class Notes:
    """A logger in memory."""

    def __init__(self):
        self.rows = []

    def record(self, kind, **fields):
        self.rows.append({"kind": kind, **fields})

    def events(self, kind=None):
        return [row for row in self.rows if kind in (None, row["kind"])]


@pytest.fixture(scope="module")
def family():
    return plain_family()


@pytest.fixture(scope="module")
def cache(family, tmp_path_factory):
    folder = tmp_path_factory.mktemp("activations")
    return ActivationCache.build(family.parent, family.layer_paths, plain_batches(), folder)


def distilled(cache, jobs, folder, *, settings=QUICK, executor=None, **options):
    library, notes = BlockLibrary(folder), options.pop("notes", Notes())
    executor = executor or Inline()
    complete = distil_library(plain_family, cache, jobs, settings, library, executor=executor, logger=notes, **options)
    return library, notes, complete


def test_decoupled_jobs_are_m_plus_n_for_each_layer_and_coupled_ones_their_product(family):
    decoupled, coupled = blockwise.decoupled_jobs(family), blockwise.coupled_jobs(family)
    assert len(decoupled) == 3 * (1 + 2)  # the parent and "none" have nothing to train
    assert len(coupled) == 3 * (3 * 4 - 1 - 1 - 1 - 1)  # all pairs but parent-parent, none-none and each with a parent
    assert [job.name for job in decoupled[:3]] == ["layer0.attention=linear", "layer0.ffn=ffn50", "layer0.ffn=linear"]
    assert BlockJob(0, {"ffn": "ffn50", "attention": "none"}) in coupled


def test_training_brings_every_block_closer_and_moves_its_own_weights_alone(family, cache, tmp_path):
    jobs = blockwise.decoupled_jobs(family)
    before = {name: tensor.clone() for name, tensor in family.parent.state_dict().items()}
    library, notes, complete = distilled(cache, jobs, tmp_path)
    assert complete
    for job in jobs:
        figures = library.figures(job)
        assert figures["loss"] < figures["loss_before"], job.name
    assert [row["block"] for row in notes.rows] == [job.name for job in jobs]
    assert all(torch.equal(tensor, before[name]) for name, tensor in family.parent.state_dict().items())
    states = library.states(jobs[1])
    assert set(states) == {"ffn"}
    layer = family.load_variant(0, "ffn", "ffn50", states["ffn"])
    loss = blockwise.block_loss(layer, cache, 0, 5)
    fresh = blockwise.block_loss(family.variant_layer(0, {"ffn": "ffn50"}), cache, 0, 5)
    assert loss.item() < fresh.item()
    parent = dict(family.layer(0).named_parameters())
    other = {name: value for name, value in layer.named_parameters() if name.startswith(("attn", "norm1"))}
    assert all(torch.equal(value, parent[name]) for name, value in other.items())  # frozen, though in the loss's path


def test_the_frozen_second_half_of_a_layer_is_inside_the_loss(family, cache):
    """The attention run is judged at the output of the layer: it sees what the parent's FFN makes of its error."""
    layer = family.variant_layer(0, {"attention": "linear"})
    with torch.no_grad():
        whole = float(blockwise.block_loss(layer, cache, 0, 0))
        layer.mlp.down.weight.zero_()
        layer.mlp.down.bias.zero_()
        assert float(blockwise.block_loss(layer, cache, 0, 0)) != pytest.approx(whole, rel=1e-3)


def test_a_pair_that_is_trained_together_beats_its_parts_put_together(family, cache, tmp_path):
    pair = {"attention": "linear", "ffn": "ffn50"}
    parts = [BlockJob(1, {part: name}) for part, name in pair.items()]
    settings = BlockTraining(steps=80, lr=3e-3)
    library, _, _ = distilled(cache, [*parts, BlockJob(1, pair)], tmp_path, settings=settings)
    apart = {**library.states(parts[0]), **library.states(parts[1])}
    composed = family.variant_layer(1, pair, weights=apart)
    together = family.variant_layer(1, pair, weights=library.weights(1, pair))
    with torch.no_grad():
        losses = [
            sum(float(blockwise.block_loss(layer, cache, 1, b)) for b in (4, 5)) for layer in (together, composed)
        ]
    assert losses[0] < losses[1]
    assert library.weights(1, {"attention": "linear", "ffn": "none"}).keys() == {"attention"}
    assert library.weights(1, {"attention": "parent", "ffn": "none"}) == {}


def test_a_block_that_training_makes_worse_keeps_its_initial_values(family, cache, tmp_path):
    job = BlockJob(0, {"ffn": "ffn50"})
    library, _, _ = distilled(cache, [job], tmp_path, settings=BlockTraining(steps=10, lr=30.0))
    figures = library.figures(job)
    assert figures["loss_trained"] > figures["loss_before"] == figures["loss"]
    fresh = family.variant_state(0, "ffn", family.variant_layer(0, job.choices))
    assert all(torch.equal(value, fresh[name]) for name, value in library.states(job)["ffn"].items())


def test_finished_blocks_are_not_trained_again_and_another_key_is_another_library(family, cache, tmp_path, monkeypatch):
    jobs = blockwise.decoupled_jobs(family)[:4]
    stop_after = []
    _, notes, complete = distilled(
        cache, jobs, tmp_path, should_stop=lambda: len(stop_after) > 1, on_block=lambda *a: stop_after.append(1)
    )
    assert not complete
    assert len(notes.rows) == 2
    trained = []
    original = blockwise.train_block
    monkeypatch.setattr(blockwise, "train_block", lambda *a, **k: trained.append(a[3]) or original(*a, **k))
    _, again, complete = distilled(cache, jobs, tmp_path, notes=notes)
    assert complete
    assert len(trained) == 2
    assert [row["block"] for row in again.rows] == [job.name for job in jobs]  # each noted once
    assert BlockLibrary(tmp_path, key="other").figures(jobs[0]) is None


def test_two_processes_give_the_same_library_bit_for_bit(family, cache, tmp_path):
    jobs = blockwise.decoupled_jobs(family)[:3]
    here, _, _ = distilled(cache, jobs, tmp_path / "here", seed=3)
    with ProcessPoolExecutor(2, get_context("fork"), initializer=torch.set_num_threads, initargs=(1,)) as pool:
        there, _, _ = distilled(cache, jobs, tmp_path / "there", executor=pool, seed=3)
    for job in jobs:
        mine, theirs = load_file(here.path(job)), load_file(there.path(job))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_kill_9_in_the_middle_repeats_no_finished_block_and_ends_with_the_same_library(family, tmp_path):
    script = Path(plain_blocks.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}

    def start(folder):
        return subprocess.Popen(
            [sys.executable, str(script), str(folder)], stdout=subprocess.PIPE, text=True, env=environment
        )

    killed = start(tmp_path / "killed")
    before = [killed.stdout.readline().strip() for _ in range(4)]
    killed.send_signal(signal.SIGKILL)
    before += [line.strip() for line in killed.stdout]
    assert killed.wait() == -signal.SIGKILL
    resumed, whole = start(tmp_path / "killed"), start(tmp_path / "whole")
    after, every = (process.communicate(timeout=120)[0].split() for process in (resumed, whole))
    assert resumed.returncode == whole.returncode == 0
    names = [job.name for job in blockwise.decoupled_jobs(family)]
    assert every == names
    assert 0 < len(after) < len(names)
    # A block whose file was complete when the kill came may have been finished a moment before it was printed.
    assert not set(before) & set(after)
    assert set(names) - set(before) - set(after) <= {names[len(before)]}
    noted = [row["block"] for row in Journal(tmp_path / "killed" / "journal.jsonl").read() if "block" in row]
    assert noted == names
    for name in names:
        mine, other = (load_file(tmp_path / run / "library" / f"{name}.safetensors") for run in ("killed", "whole"))
        assert all(torch.equal(mine[key], other[key]) for key in other)


def test_errors_of_training(family, cache, tmp_path):
    with pytest.raises(UserError, match="fewer than the 6 batches"):
        distilled(cache, [BlockJob(0, {"ffn": "ffn50"})], tmp_path, settings=BlockTraining(held_out=6))
    job = BlockJob(0, {"ffn": "ffn50"})
    with pytest.raises(ArchsmithError, match="lower lr"):
        distilled(cache, [job], tmp_path, settings=BlockTraining(steps=20, lr=1e30, clip_norm=0))
    assert not list(tmp_path.iterdir())
    assert dataclasses.replace(job, layer=2).name == "layer2.ffn=ffn50"
