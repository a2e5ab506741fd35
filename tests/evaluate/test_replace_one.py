"""Replace-one-block scores equal those of whole children with one block replaced, at a part of the work."""

import math

import pytest
import torch
from plain_blocks import plain_batches, plain_family
from slot_nets import batch_for, everywhere, family_of

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.evaluate.replace_one import ReplaceOne, block_variants, logits_of, resumed_at, score_library
from archsmith.families.slot_statistics import run_batch
from archsmith.train.activation_cache import ActivationCache
from archsmith.train.blockwise import BlockJob, BlockLibrary, Inline
from archsmith.train.local_distill import cosine_distance, lm_loss, pooled, token_kl


def text_batches(count=3):
    """Batches of different sizes: their means must be weighted."""
    rows = []
    for number in range(count):
        ids = batch_for("llama", count=1 + number, length=5 + number, seed=number)["input_ids"]
        mask = torch.ones_like(ids)
        mask[-1, 4:] = 0
        rows.append({"input_ids": ids, "attention_mask": mask})
    return rows


def make(name, tmp_path):
    if name == "plain":
        family, batches = plain_family(), plain_batches(2)
    else:
        choices = {"attention": ["kv1", "none"], "ffn": ["ffn50", "linear"]}
        family, batches = family_of(name, alternatives=choices, ranking="norm"), text_batches()
    return family, batches, ActivationCache.build(family.parent, family.layer_paths, batches, tmp_path / "valid")


def whole_child(family, job):
    return family.build({**everywhere(family), **{f"layer{job.layer}.{p}": n for p, n in job.choices.items()}})


def last_hidden(family, model, batch):
    seen = []
    path = family.layer_paths[-1]
    handle = model.get_submodule(path).register_forward_hook(lambda m, a, out: seen.append(out))
    output = run_batch(model, batch)
    handle.remove()
    return output, seen[0] if isinstance(seen[0], torch.Tensor) else seen[0][0]


@pytest.mark.parametrize("name", ["plain", "llama", "gpt2", "bert"])
@pytest.mark.parametrize("score", ["kl", "hidden", "embedding", "lm_loss"])
def test_scores_equal_those_of_whole_children(name, score, tmp_path):
    if (name, score) == ("bert", "lm_loss"):
        pytest.skip("no causal model")
    family, batches, cache = make(name, tmp_path)
    evaluator = ReplaceOne(family, cache, score=score)
    for job in block_variants(family)[::5]:
        child, total, weight = whole_child(family, job), 0.0, 0
        for batch in batches:
            mask = batch.get("attention_mask") if isinstance(batch, dict) else None
            ids = batch["input_ids"] if isinstance(batch, dict) else batch
            with torch.no_grad():
                (wanted, wanted_last), (output, last) = (last_hidden(family, m, batch) for m in (family.parent, child))
            tokens = int(mask.sum()) if mask is not None else ids.numel()
            if score == "kl":
                value = token_kl(logits_of(wanted), logits_of(output), mask=mask)
            elif score == "hidden":
                value = cosine_distance(last, wanted_last, mask=mask)
            elif score == "embedding":
                value, tokens = cosine_distance(pooled(last, mask), pooled(wanted_last, mask)), len(ids)
            else:
                shifted = None if mask is None else mask[:, 1:]
                tokens = ids[:, 1:].numel() if mask is None else int(shifted.sum())
                value = lm_loss(logits_of(output)[:, :-1], ids[:, 1:], mask=shifted)
            total, weight = total + float(value) * tokens, weight + tokens
        found = evaluator.of(job.layer, job.choices)
        assert found == pytest.approx(total / weight, rel=1e-4, abs=1e-6), job.name
        assert score == "lm_loss" or found > 0


def test_a_variant_equal_to_the_parent_scores_0_and_the_parents_loss_is_its_own(tmp_path):
    family, batches, cache = make("plain", tmp_path)
    assert ReplaceOne(family, cache).of(1, {"ffn": "parent"}) == pytest.approx(0, abs=1e-9)
    assert ReplaceOne(family, cache).parent_score() == 0
    wanted = sum(float(lm_loss(family.parent(batch)[:, :-1], batch[:, 1:])) for batch in batches) / len(batches)
    assert ReplaceOne(family, cache, score="lm_loss").parent_score() == pytest.approx(wanted, rel=1e-5)


def test_only_the_replaced_layer_and_those_behind_it_are_computed(tmp_path):
    family, _, cache = make("plain", tmp_path)
    counts = dict.fromkeys(range(3), 0)
    for index in range(3):

        def count(module, args, index=index):
            counts[index] += 1

        family.layer(index).mlp.register_forward_pre_hook(count)
    evaluator = ReplaceOne(family, cache)
    evaluator.of(1, {"attention": "none"})
    assert counts[0] == 0
    assert counts[2] == cache.count  # once for each batch; the parent's logits come from its last hidden state


def test_logits_beyond_the_memory_are_computed_again_and_change_nothing(tmp_path):
    family, _, cache = make("plain", tmp_path)
    rich, poor = ReplaceOne(family, cache), ReplaceOne(family, cache, memory_bytes=0)
    assert rich.of(0, {"ffn": "none"}) == poor.of(0, {"ffn": "none"})
    assert (len(rich._logits), len(poor._logits)) == (2, 0)


def test_a_task_is_a_function_of_output_and_batch(tmp_path):
    family, _, cache = make("plain", tmp_path)
    evaluator = ReplaceOne(
        family, cache, score=lambda output, batch: float((output.argmax(-1) == batch).float().mean())
    )
    assert 0 <= evaluator.of(0, {"ffn": "none"}) <= 1
    assert evaluator.parent_score() >= 0


def test_the_parent_is_as_before_also_after_an_error(tmp_path):
    family, batches, _ = make("plain", tmp_path)
    before = family.parent(batches[0])
    with pytest.raises(RuntimeError), resumed_at(family.parent, family.layer_paths, 1, torch.zeros(1, 2, 3)):
        family.parent(batches[0])
    assert all("forward" not in vars(family.layer(index)) for index in range(3))
    assert torch.equal(family.parent(batches[0]), before)


def test_pairs_are_m_times_n_and_slots_m_plus_n():
    family = plain_family()
    assert len(block_variants(family)) == 3 * (3 * 4 - 1)
    assert len(block_variants(family, "slots")) == 3 * (2 + 3)


class Notes:
    def __init__(self):
        self.rows = []

    def record(self, kind, **fields):
        self.rows.append({"kind": kind, **fields})

    def events(self, kind=None):
        return [row for row in self.rows if kind in (None, row["kind"])]


def test_each_variant_is_scored_once_and_a_stopped_pass_goes_on(tmp_path):
    family, _, cache = make("plain", tmp_path)
    jobs, library, notes = block_variants(family), BlockLibrary(tmp_path / "library"), Notes()
    seen = []

    def go(**options):
        return score_library(plain_family, cache, jobs, library, executor=Inline(), logger=notes, **options)

    assert go(should_stop=lambda: len(seen) == 4, on_score=lambda *a: seen.append(a)) is None
    assert len(notes.rows) == 4
    scores = go()
    assert [row["block"] for row in notes.rows] == [job.name for job in jobs]
    assert list(scores) == [job.name for job in jobs]
    assert all(value >= 0 for value in scores.values())
    fresh = ReplaceOne(family, cache).of(0, {"attention": "none"})
    assert scores["layer0.attention=none"] == pytest.approx(fresh, rel=1e-6)
    # What is trained is scored as it was trained.
    job = BlockJob(0, {"ffn": "ffn50"})
    state = family.variant_state(0, "ffn", family.variant_layer(0, job.choices))
    library.put(job, {"ffn": {name: torch.zeros_like(value) for name, value in state.items()}}, {})
    again = score_library(plain_family, cache, [job], library, executor=Inline(), logger=Notes())
    assert again[job.name] == pytest.approx(scores["layer0.ffn=none"], rel=1e-5)


def test_errors_of_scores(tmp_path):
    family, _, cache = make("plain", tmp_path)
    with pytest.raises(UserError, match="kl, lm_loss, hidden, embedding"):
        ReplaceOne(family, cache, score="accuracy")
    state = family.variant_state(0, "ffn", family.variant_layer(0, {"ffn": "ffn50"}))
    broken = {name: torch.full_like(value, math.nan) for name, value in state.items()}
    with pytest.raises(ArchsmithError, match=r"layer0\.ffn=ffn50 is nan"):
        ReplaceOne(family, cache).of(0, {"ffn": "ffn50"}, {"ffn": broken})
    with pytest.raises(UserError, match="a model without a head"):
        logits_of(object())
