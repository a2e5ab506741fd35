import json

import numpy as np
import pytest
import torch
from darts_runs import Stop, copied, small_family, small_task, stop_after, to_the_end
from small_runs import run_cli
from spoken_samples import tiny_speech, write_spoken_digits

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.families.cells import NasBench201Family
from archsmith.families.tdnn import TdnnFamily
from archsmith.methods.st_nas import Searcher, Settings, StNasStep, preset_settings, rules_of
from archsmith.supernet import StraightThrough
from archsmith.train.bilevel import BilevelStep, StepContext
from archsmith.train.sampled import named_stream

DRAWS = 10_000
CHI_SQUARE_3 = 16.27  # 0.999 quantile with three degrees of freedom
SMALL = {
    "warmup_epochs": 2,
    "search_epochs": 2,
    "epochs": 2,
    "warmup_batch_size": 8,
    "search_batch_size": 4,
    "batch_size": 8,
    "warmup_free": 0,
    "free": 0,
    "search_improve": 0.0,
}


def tdnn(**changes):
    given = {"image": (3, 4, 15), "num_classes": 4, "width": 6, "blocks": 2, "stride_after": 1, "dropout": 0.2}
    return TdnnFamily(**{**given, **changes})


def searcher(*, family=None, task=None, seed=0, **changes):
    task = task or tiny_speech()
    return Searcher(family=family or tdnn(), task=task, seed=seed, settings=Settings(**{**SMALL, **changes}))


def context(search, *, epoch=0, number=0, learn=True):
    """Return a step's context on the supernet of a search."""
    step = BilevelStep(weight_task=search.halves[0], logit_task=search.halves[1], batch_size=4, seed=7, clip_norm=0.0)
    batch = next(search.halves[0].batches("train", batch_size=4, epoch=epoch))
    optimizer = search.logit_optimizer if learn else None
    return StepContext(
        supernet=search.supernet,
        optimizer=search.optimizer,
        logit_optimizer=optimizer,
        step=step,
        batch=batch,
        where=(epoch, number),
    )


def copies(tensors):
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


def test_a_search_finds_trains_and_delivers():
    search = searcher()
    assert all(not logits.any() for logits in search.supernet.logits.values())
    figures = to_the_end(search)
    phases = [epoch["phase"] for epoch in figures]
    assert phases == sorted(phases, key=["warm-up", "search", "final"].index) and set(phases) == {
        "warm-up",
        "search",
        "final",
    }
    delivered = search.deliver()
    assert delivered.architecture == search.chosen
    assert delivered.network(torch.rand(2, 3, 4, 15)).shape == (2, 5, 4)
    fresh = search.family.build(search.chosen, seed=0)
    assert type(delivered.network) is type(fresh)


def test_a_warm_up_leaves_the_logits_at_zero_and_the_search_moves_them():
    search = searcher(warmup_epochs=1)
    stop_after(search, 3)
    assert all(not logits.any() for logits in search.supernet.logits.values())
    while search.index == 0:
        search.advance(Stop())
    stop_after(search, 1)
    assert all(bool(logits.all()) for logits in search.supernet.logits.values())


def test_a_step_on_the_logits_changes_nothing_else():
    search = searcher()
    search.supernet.train()
    weights, moments = copies(search.supernet.network.state_dict()), len(search.optimizer.state)
    logits = copies(search.supernet.logits)
    search.updater.move_logits(context(search))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in search.supernet.network.state_dict().items())
    assert all(parameter.grad is None for parameter in search.supernet.network.parameters())
    assert len(search.optimizer.state) == moments == 0
    assert all(not torch.equal(tensor, logits[name]) for name, tensor in search.supernet.logits.items())


def test_a_step_on_the_weights_moves_one_path_and_no_logit():
    search = searcher()
    search.supernet.train()
    with torch.no_grad():
        search.supernet.logits["blocks"].copy_(torch.tensor([[0.0, 1.0, -1.0, 0.5]]).expand(2, 4))
    weights, logits = copies(search.supernet.network.state_dict()), copies(search.supernet.logits)
    here = context(search)
    drawn = search.supernet.mixing(here.fixed_logits(), named_stream(here, "path"))["blocks"].argmax(-1).tolist()
    search.updater.move_weights(here)
    assert all(torch.equal(tensor, logits[name]) for name, tensor in search.supernet.logits.items())
    names = search.supernet.options["blocks"][0]
    for name, parameter in search.supernet.network.named_parameters():
        _, inside, rest = name.partition(".candidates.")
        block = int(name.split("blocks.")[1][0]) if inside else None
        on_path = block is None or rest.startswith(f"{names[drawn[block]]}.")
        assert torch.equal(parameter, weights[name]) != on_path, name
        assert (parameter in search.optimizer.state) == on_path, name


def test_the_warm_up_draws_uniformly_and_the_search_by_the_probabilities():
    blocks = 100
    search = searcher(family=tdnn(blocks=blocks, width=2))
    logits = torch.tensor([0.5, -0.5, 1.0, 0.0])
    with torch.no_grad():
        search.supernet.logits["blocks"].copy_(logits.expand(blocks, 4))
    for learn, expected in ((False, torch.full((4,), 0.25)), (True, logits.softmax(-1))):
        counts, here = torch.zeros(4), context(search, learn=learn)
        used = search.updater.path_logits(here)
        for number in range(DRAWS // blocks):
            generator = named_stream(context(search, number=number), "path")
            counts += search.supernet.mixing(used, generator)["blocks"].sum(0)
        assert counts.sum() == DRAWS and chi_square(counts, DRAWS * expected) < CHI_SQUARE_3


class Seen(StNasStep):
    """Notes the samples of both steps."""

    def __init__(self):
        super().__init__()
        self.done = []

    def path_logits(self, context):
        logits = super().path_logits(context)
        drawn = context.supernet.mixing(logits, named_stream(context, "path"))
        self.done.append(("weights", drawn["blocks"].argmax(-1).tolist()))
        return logits

    def moved_(self, context, before, mixing):
        self.done.append(("logits", mixing["blocks"].detach().argmax(-1).tolist()))


def test_the_logits_come_first_and_have_a_sample_of_their_own():
    search = searcher()
    updater = Seen()
    search.supernet.train()
    for number in range(60):
        updater.step(context(search, number=number))
    names = [name for name, _ in updater.done]
    assert names == ["logits", "weights"] * 60
    samples = [sample for _, sample in updater.done]
    pairs = list(zip(samples[::2], samples[1::2], strict=True))
    same = sum(a == b for first, second in pairs for a, b in zip(first, second, strict=True))
    assert 10 <= same <= 55  # 30 of 120 are expected of independent samples, 120 of one sample for both
    assert len({tuple(first) for first, _ in pairs}) > 8  # drawn for every batch


def test_validation_batches_come_one_after_another_and_begin_again():
    search = searcher()
    here = [context(search, epoch=e, number=n) for e in range(3) for n in range(8)]
    assert here[0].step.weight_task.steps_per_epoch(4) == 8
    batches = [search.updater.logit_batch(one).inputs for one in here]
    per_cycle = search.halves[1].steps_per_epoch(4)
    assert per_cycle == 2
    examples = search.task.examples(8, "valid")
    for cycle in range(len(batches) // per_cycle):
        shown = torch.cat(batches[cycle * per_cycle : (cycle + 1) * per_cycle])
        assert sorted(shown.sum((1, 2, 3)).tolist()) == sorted(examples.sum((1, 2, 3)).tolist())
    assert not torch.equal(batches[0], batches[2])


def test_stages_end_by_their_rule_and_hand_over_their_best_state():
    search = searcher(warmup_epochs=9, search_epochs=9, epochs=9, search_look_ahead=2)
    losses = {
        "warm-up": [9.0, 5.0, 6.0, 7.0],
        "search": [4.0, 5.0, 5.0, 3.0, 4.0, 4.0, 4.0],
        "final": [3.0, 2.0, 4.0, 4.0, 4.0],
    }
    left, best = {name: list(values) for name, values in losses.items()}, {}
    judge = search.end_epoch_

    def told(phase, epoch, figures):
        loss = left[phase.name].pop(0)
        if loss == min(losses[phase.name]):
            best[phase.name] = copies(search._judged().state_dict())
        over = judge(phase, epoch, {**figures, "valid_loss": loss})
        if over:
            state = search._judged().state_dict()
            assert all(torch.equal(tensor, best[phase.name][name]) for name, tensor in state.items())
        return over

    search.end_epoch_ = told
    figures = to_the_end(search)
    # The warm-up stops where it would decay, the search decays once, the final stage twice: bad epochs add up.
    assert not left["warm-up"] and left["search"] == [4.0] and not left["final"]
    assert [epoch["phase"] for epoch in figures] == ["warm-up"] * 4 + ["search"] * 6 + ["final"] * 5
    assert search.epochs == 15 == search.position.epoch
    final = search.deliver().network.state_dict()
    assert all(torch.equal(tensor, best["final"][name]) for name, tensor in final.items())


@pytest.mark.parametrize("steps", [7, 15, 26])
def test_a_stopped_search_goes_on_bit_for_bit(steps):
    changes = {"warmup_epochs": 2, "search_epochs": 2, "epochs": 3}
    whole, halted = searcher(**changes), searcher(**changes)
    stop_after(halted, steps)
    tensors, state = copied(halted.state())
    stop_after(halted, 1)  # what happens later does not reach the checkpoint
    again = searcher(**changes)
    again.load(tensors, json.loads(json.dumps(state)))
    figures, left = to_the_end(whole), to_the_end(again)
    assert left and left == figures[-len(left) :]
    assert again.chosen == whole.chosen
    ours, theirs = again.deliver().network.state_dict(), whole.deliver().network.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_the_rule_of_a_stage_comes_with_its_checkpoint():
    search, other = searcher(), searcher(search_look_ahead=9, search_improve=9.0)
    stop_after(search, 5)
    tensors, state = copied(search.state())
    other.load(tensors, json.loads(json.dumps(state)))
    assert other.milestones.rule == search.milestones.rule != other.rules["warm-up"]
    assert other.milestones.best == search.milestones.best < float("inf")
    assert other.kept.keys() == search.kept.keys() != set()


def test_moved_examples_return_for_the_final_stage():
    search = searcher(valid_fraction=0.5)
    task = search.task
    assert search.halves[0].size("valid") == 20 > task.size("valid") == 8
    assert search.halves[0].size("train") == 20 and search._learned(2).size("train") == 32
    assert np.array_equal(search._learned(2).split_indices("train"), task.split_indices("train"))


def test_the_most_probable_candidates_are_derived():
    search = searcher()
    with torch.no_grad():
        search.supernet.logits["blocks"].copy_(torch.tensor([[0.1, 0.0, 0.2, 0.0], [0.0, 0.3, 0.2, 0.1]]))
    assert list(search.select(search.supernet).values()) == ["C2D1", "C1D2"]
    assert type(search.supernet.relaxation) is StraightThrough


@pytest.mark.parametrize(
    "family",
    [
        pytest.param(small_family(), marks=pytest.mark.slow, id="darts"),
        pytest.param(NasBench201Family(image=(3, 8, 8), num_classes=3, channels=2, cells=1), id="nas-bench-201"),
    ],
)
def test_it_searches_the_families_for_images_too(family):
    search = searcher(family=family, task=small_task(), warmup_epochs=1, search_epochs=1, epochs=1)
    figures = to_the_end(search)
    assert [epoch["phase"] for epoch in figures] == ["warm-up", "search", "final"]
    assert search.deliver().network(torch.rand(2, 3, 8, 8)).shape == (2, 3)


def test_published_settings_and_recipes():
    rules = rules_of(Settings())
    assert (rules["warm-up"].free_epochs, rules["warm-up"].lr_stop, rules["warm-up"].min_improve) == (10, 1e-3, 0.5)
    assert (rules["search"].free_epochs, rules["search"].lr_stop) == (0, pytest.approx(1e-4))
    final = rules["final"]
    assert (final.free_epochs, final.look_ahead, final.lr_stop, final.min_improve) == (10, 1, 1e-5, 0.0)
    assert preset_settings((3, 40, 1500)) == {} == preset_settings((3, 32, 32))
    assert preset_settings((3, 40, 100)) == preset_settings((1, 8, 8)) != {}


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(UserError, match="batch_size: got 9; allowed: 1 to 8"):
        searcher(search_batch_size=9)
    with pytest.raises(UserError, match=r"family: got 'str'; allowed: .*'tdnn'"):
        searcher(family="tdnn")


def test_families_fit_the_task(tmp_path):
    data = write_spoken_digits(tmp_path / "data", packed=True)
    with pytest.raises(UserError, match="allowed: tdnn for speech, which the task spoken-digits has"):
        api.search("spoken-digits", method="st-nas", family="nas-bench-201", data=data, out=tmp_path / "run")
    with pytest.raises(UserError, match=r"family: got 'tdnn'; allowed: .* for images, which the task digits has"):
        api.search("digits", method="st-nas", family="tdnn", out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_whole_run_from_the_command_line(tmp_path):
    data, run = write_spoken_digits(tmp_path / "data", packed=True), tmp_path / "run"
    words = ["search", "--method", "st-nas", "--family", "tdnn", "--task", "spoken-digits", "--data", data]
    words += ["--out", run, "--quiet", "--task-set", "seconds=0.7", "--task-set", "bands=8"]
    for pair in ("width=16", "blocks=2", "stride_after=1", "dropout=0.0"):
        words += ["--family-set", pair]
    settings = {"warmup_epochs": 1, "search_epochs": 1, "epochs": 25, "warmup_batch_size": 16, "search_batch_size": 8}
    for name, value in {**settings, "batch_size": 16, "lr": 0.01, "free": 20}.items():
        words += ["--set", f"{name}={value}"]
    done = run_cli(*words)
    assert done.returncode == 0, done.stdout
    result = json.loads((run / "result.json").read_text())
    metrics = result["outcomes"][0]["metrics"]
    assert result["status"] == "finished" and metrics["test_accuracy"] > 0.5 > metrics["test_token_error_rate"]
    assert "model.onnx" in result["outcomes"][0]["files"]
    verified = run_cli("verify", run)
    assert verified.returncode == 0, verified.stdout
