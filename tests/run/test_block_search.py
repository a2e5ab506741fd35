"""The run of a block-by-block search: costs, limits, selections, children, end to end on the command line."""

import json
import signal

import pytest
import torch
from plain_blocks import plain_batches, plain_family
from slot_nets import bert, llama, worn
from small_runs import events, run_cli, start_cli, wait_for
from tokenizers import Tokenizer, models, pre_tokenizers

from archsmith import api
from archsmith.core.errors import UserError
from archsmith.cost.block_times import Load, measure_layers, phases_of, runtime_ms
from archsmith.run.block_search import BlockSearch, Stopped
from archsmith.run.directory import Run
from archsmith.space import Budget
from archsmith.strategies.milp import Infeasible
from archsmith.train.blockwise import BlockTraining
from archsmith.train.global_distill import Uptraining, distance, uptrain


def searched(run, **options):
    return BlockSearch(
        run,
        plain_family,
        plain_batches(6),
        plain_batches(2, seed=9),
        training=BlockTraining(steps=8, lr=3e-3),
        **options,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def found(folder):
    """A search up to its tables; (search, scores, costs)."""
    with Run.create_or_open(folder / "run", {"seed": 0}) as run:
        search = searched(run)
        search.distil()
        load = Load(batch=2, prefill=8)
        yield search, search.scores(), search.costs(load, plain_batches(1, size=2)[0])


def test_costs_add_up_to_the_parent_and_the_first_alternative_is_it(found):
    search, scores, costs = found
    parent = search.family.parent
    assert costs.parent["params"] == sum(p.numel() for p in parent.parameters())
    assert costs.of([0, 0, 0])["params"] == costs.parent["params"]
    assert costs.parent["memory"] == 4 * costs.parent["params"] + 2 * 8 * 3 * 2 * 16 * 4  # weights, caches of 2 x 8
    assert [row[0] for row in scores] == [0, 0, 0]
    assert min(min(row) for row in scores) == 0
    child = search.select(scores, costs, search.limits(Budget.parse("params<=0.6x"), costs))
    model = search.build(child)
    assert sum(p.numel() for p in model.parameters()) == child.predicted["params"] <= 0.6 * costs.parent["params"]
    assert child.predicted["throughput"] == pytest.approx(2e3 / child.predicted["latency"])


def test_the_exact_child_is_never_worse_than_the_others_and_limits_bind_monotonically(found):
    search, scores, costs = found
    before = 0.0
    for share in (0.9, 0.7, 0.5, 0.4):
        limits = search.limits(Budget.parse(f"memory<={share}x"), costs)
        best = search.select(scores, costs, limits)
        assert best.selection.score >= before
        before = best.selection.score
        for other in search.baselines(scores, costs, limits):
            assert best.selection.score <= other.selection.score + 1e-9
            assert other.predicted["memory"] <= share * costs.parent["memory"] * (1 + 1e-9)


def test_throughput_and_latency_are_one_limit_on_the_runtime_of_which_a_part_is_used(found):
    search, _, costs = found
    rest = costs.rest["runtime"]
    one = search.limits(Budget.parse("latency<=50ms"), costs)
    assert one["runtime"] == pytest.approx(0.95 * 50 - rest)
    two = search.limits(Budget.parse("latency<=50ms, throughput>=100/s"), costs)
    assert two["runtime"] == pytest.approx(0.95 * 20 - rest)  # 2 sequences at 100/s


def test_limits_that_nothing_reaches_are_errors_for_the_whole_model(found):
    search, scores, costs = found
    with pytest.raises(UserError, match=r"outside of the layers \(embeddings, head, norms\)"):
        search.limits(Budget.parse("params<=100"), costs)
    smallest = costs.rest["memory"] + sum(min(row) for row in costs.tables["memory"])
    limit = (
        search.limits(Budget.parse(f"memory<={smallest - 1:.0f}B"), costs) if smallest > costs.rest["memory"] else {}
    )
    if limit:
        with pytest.raises(Infeasible, match="for the whole model memory"):
            search.select(scores, costs, limit)
    with pytest.raises(UserError, match="limits on memory, params, macs, latency, throughput"):
        search.limits(Budget.parse("energy<=3mJ"), costs)


def test_a_resumed_search_measures_and_trains_nothing_again(found, folder, monkeypatch):
    search, scores, costs = found
    again = searched(search.run)
    again.distil()
    assert again.scores() == scores
    load, call = costs.load, plain_batches(1, size=2)[0]
    monkeypatch.setattr("archsmith.run.block_search.measure_layers", None)  # a call would raise
    assert again.costs(load, call) == costs
    assert len(search.run.events("runtime_table")) == 1
    stopped = searched(search.run, should_stop=lambda: True)
    stopped.library.folder = folder / "nothing"
    with pytest.raises(Stopped):
        stopped.distil()


def test_uptraining_brings_the_child_closer_and_goes_on_from_its_checkpoint(found, tmp_path):
    search, scores, costs = found
    child = search.select(scores, costs, search.limits(Budget.parse("params<=0.6x"), costs))
    settings = Uptraining(steps=20, lr=3e-3, checkpoint_every=7)
    batch = plain_batches(1, seed=9)[0]
    parent, paths = search.family.parent, search.family.layer_paths

    def trained(model, **options):
        complete = uptrain(model, parent, paths, search.train, settings, **options)
        return complete, {name: tensor.clone() for name, tensor in model.state_dict().items()}

    first = search.build(child)
    before = float(distance(first, parent, paths, batch).detach())
    complete, whole = trained(first)
    assert complete
    assert float(distance(first, parent, paths, batch)) < before
    seen = []
    file = tmp_path / "state.safetensors"
    part = search.build(child)
    stopped, _ = trained(
        part, checkpoint=file, should_stop=lambda: len(seen) == 9, on_step=lambda step, loss: seen.append(step)
    )
    assert not stopped
    _, resumed = trained(search.build(child), checkpoint=file)
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)


def test_generated_tokens_are_timed_with_a_cache_of_each_layers_own():
    family_load = Load(batch=2, prefill=6, generation=4)
    parent = worn(lambda: llama(num_key_value_heads=2))
    from archsmith.families.decoder import HFDecoderFamily

    family = HFDecoderFamily(parent, ranking="norm")
    call = {"input_ids": torch.randint(3, 30, (2, 6))}
    phases = phases_of(parent, family.layer_paths, call, family_load)
    variants = {name: (1, family.variant_layer(1, {"attention": name})) for name in ("parent", "kv1", "linear", "none")}
    times = measure_layers(variants, {"parent": parent}, phases, call, family_load)
    assert set(times) == {"parent", "kv1", "linear", "none", "model parent"}
    medians = {phase: latency.median_ms for phase, latency in times["model parent"].items()}
    assert runtime_ms(medians, family_load) == medians["prefill"] + 4 * medians["token"]
    with pytest.raises(UserError, match="models without a key-value cache"):
        phases_of(worn(bert).bert, ("encoder.layer.0",), call, family_load)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    """A folder with a small Llama and its tokenizer, and a text file."""
    folder = tmp_path_factory.mktemp("model")
    words = {word: number for number, word in enumerate(["[UNK]", *(f"w{i}" for i in range(39))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    worn(llama).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(39, (3000,), generator=generator).tolist()
    (folder / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    return folder


def words(model, out, budget="params<=0.8x"):
    given = ["search", "--method", "puzzle", "--model", model, "--data", model / "text.txt", "--budget", budget]
    for name, value in {"training.steps": 6, "uptraining.steps": 4, "training.held_out": 1}.items():
        given += ["--set", f"{name}={value}"]
    given += ["--set", "alternatives={attention: [kv1, none], ffn: [ffn50, none]}", "--quiet", "--out", out]
    for name, value in {"length": 8, "train": 6, "valid": 2, "batch": 4}.items():
        given += ["--task-set", f"{name}={value}"]
    return [str(word) for word in given]


@pytest.mark.slow
def test_one_command_from_a_folder_to_a_verified_child_also_after_kill_9(text_model, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    process = start_cli(*words(text_model, killed), output=tmp_path / "output.txt")
    wait_for(lambda: len(events(killed, "block_scored")) >= 3, process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    done = run_cli(*words(text_model, whole))
    assert done.returncode == 0, done.stdout
    resumed = run_cli("resume", killed, "--quiet")
    assert resumed.returncode == 0, resumed.stdout
    for kind in ("block_trained", "block_scored"):
        names = [event["block"] for event in events(killed, kind)]
        assert len(names) == len(set(names)) == len(events(whole, kind))
    results = [json.loads((run / "result.json").read_text()) for run in (whole, killed)]
    mine, other = (result["outcomes"][0] for result in results)
    assert mine["decisions"] == other["decisions"]
    assert mine["files"]["model/model.safetensors"] == other["files"]["model/model.safetensors"]
    assert any(name.startswith("standalone/") for name in mine["files"])
    assert (whole / "report.html").is_file()
    checked = run_cli("verify", killed)
    assert checked.returncode == 0, checked.stdout
    assert "5 checks passed, 0 failed, 0 not checked" in checked.stdout
    weights = killed / "networks" / "puzzle" / "model" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-4:] = b"\x00\x00\x80\x3f"
    weights.write_bytes(bytes(data))
    assert run_cli("verify", killed).returncode == 1


def arguments(folder, **changes):
    settings = {
        "alternatives": {"attention": ["kv1", "none"], "ffn": ["ffn50", "none"]},
        "training": {"steps": 4, "held_out": 1},
        "uptraining": {"steps": 3},
        "distillation": "mixed",
    }
    text = {"length": 8, "train": 6, "valid": 2, "batch": 4}
    given = {"model": str(folder), "task": "language-modelling", "budget": "memory<=0.8x", "data": folder / "text.txt"}
    return {**given, "settings": settings, "task_options": text, "quiet": True, **changes}


def test_mixed_distillation_from_a_folder_to_a_report_and_a_verification(text_model, tmp_path):
    outcome = api.search_blocks(**arguments(text_model), out=tmp_path / "run")
    assert outcome.status == "finished"
    best = outcome.best
    assert best["predicted"]["memory"] <= 0.8 * outcome.result["reference"]["memory"]
    assert best["score"] <= min(row["score"] for row in outcome.result["baselines"]) + 1e-9
    assert events(tmp_path / "run", "block_scored_coupled")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "layer2.ffn" in page
    assert api.verify(tmp_path / "run").ok
    assert api.search_blocks(**arguments(text_model), out=tmp_path / "run").result == outcome.result  # only read
    weights = outcome.folder / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x80\x3f")
    assert not api.verify(tmp_path / "run").ok


def test_what_is_wrong_is_said_before_anything_is_written(text_model, tmp_path):
    bare = tmp_path / "bare"
    worn(llama).save_pretrained(bare)
    short = tmp_path / "short.txt"
    short.write_text("w1 w2")
    for changes, text in (
        ({"model": str(bare)}, r"tokenizer: got no file .*tokenizer\.json"),
        ({"task": "poems"}, "language-modelling or sentences"),
        ({"data": short}, "at least 16 of them"),
        ({"data": tmp_path / "nothing.txt"}, "nothing.txt"),
        ({"method": "atomnas"}, "puzzle with a model"),
        ({"model": "torch.nn:Identity", "task_options": {"tokenizer": str(text_model), "length": 8}}, "model: got"),
        ({"settings": {"score": "accuracy"}}, r"settings\.score"),
    ):
        with pytest.raises(UserError, match=text):
            api.search_blocks(**arguments(text_model, **changes), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    with pytest.raises(UserError, match="outside of the layers"):
        api.search_blocks(**arguments(text_model, budget="params<=1"), out=tmp_path / "run")
