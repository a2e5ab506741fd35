"""InstaTune: counts, the loss with its gradients, the teacher's schedule, and an elastic BERT and ViT from atoms."""

from __future__ import annotations

import copy
import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.evaluate.subnets import SubnetEvaluator
from archsmith.methods import load_method
from archsmith.methods.instatune import (
    OBJECTIVES,
    PUBLISHED,
    InstaTuneChildren,
    Settings,
    divergence,
    elastic_transformer,
    fine_tune_,
    front,
    instatune_loss,
    linear_rate,
    search,
    transformer_macs,
)
from archsmith.strategies.nsga2 import Nsga2
from archsmith.supernet.elastic import Elastic
from archsmith.train.children import ChildrenStep
from tests.elastic_samples import gap, outputs

GOLDEN = json.loads((Path(__file__).parent.parent / "golden" / "instatune.json").read_text())
CASES = {case["name"]: case for case in GOLDEN["cases"]}
LAYERS, HIDDEN, HEADS, FFN, TOKENS = 4, 32, 4, 48, 6

transformers = pytest.importorskip("transformers")


def bert() -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """Return a small BERT classifier without dropout, inputs and how to get its logits."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        max_position_embeddings=16,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = transformers.BertForSequenceClassification(config).eval()
    inputs = {"input_ids": torch.randint(0, 30, (5, TOKENS)), "attention_mask": torch.ones(5, TOKENS, dtype=torch.long)}
    return model, inputs, lambda net, **given: net(**given).logits


def vit() -> tuple[nn.Module, dict[str, Tensor], Callable[..., Tensor]]:
    """Return a small ViT classifier."""
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=FFN,
        image_size=8,
        patch_size=4,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.2,
    )
    model = transformers.ViTForImageClassification(config).eval()
    return model, {"pixel_values": torch.randn(5, 3, 8, 8)}, lambda net, **given: net(**given).logits


OPTIONS = {"depth": [2, 3, 4], "heads": [1, 2, 4], "ffn": [16, 32, 48]}
LABELS = torch.tensor([0, 1, 2, 0, 1])


@functools.cache
def built(kind: Callable[[], Any]) -> tuple[Elastic, dict[str, Tensor], Callable[..., Tensor]]:
    model, inputs, forward = kind()
    return elastic_transformer(model, inputs, OPTIONS, forward=forward), inputs, forward


def elastic_of(kind: Callable[[], Any]) -> tuple[Elastic, dict[str, Tensor], Callable[..., Tensor]]:
    """Return a fresh copy of an elastic network: finding its atoms takes longer than all the rest."""
    elastic, inputs, forward = built(kind)
    return copy.deepcopy(elastic), inputs, forward


def sizes(elastic: Elastic, architecture: Any) -> tuple[list[int], list[int]]:
    """Return heads and hidden units of the layers that are there."""
    heads = [architecture[d.name] for d in elastic.dims if d.kind == "heads" and d.name in architecture]
    ffn = [architecture[d.name] for d in elastic.dims if d.kind == "ffn" and d.name in architecture]
    return heads, ffn


def test_it_is_listed_and_has_the_published_defaults() -> None:
    row, module = load_method("instatune")
    assert row["docs"] == "docs/systems/instatune.md" and module.SYSTEM["arxiv"] == "2308.15609"
    settings = Settings()
    assert (settings.alpha, settings.subnets, settings.temperature, settings.epochs) == (0.3, 1, 1.0, 4)
    assert PUBLISHED["bert-base"]["depth"] == (6, 7, 8, 9, 10, 11, 12)
    assert PUBLISHED["vit-base"]["ffn"] == (2048, 2560, 3072)


@pytest.mark.parametrize("name", [name for name in CASES if "macs" in str(CASES[name]["expected"])])
def test_macs_are_exact(name: str) -> None:
    given, expected = CASES[name]["input"], CASES[name]["expected"]["macs"]
    vision = {"patch_size": 16, "classes": 1000} if given["model"].startswith("vit") else {}
    common = {"hidden": given["hidden"], "head_dim": given["head_dim"], "tokens": given["tokens"]}
    assert len(given["heads"]) == given["num_layers"]
    assert transformer_macs(given["heads"], given["ffn"], **common, **vision) == expected


@pytest.mark.parametrize("kind", [bert, pytest.param(vit, marks=pytest.mark.slow)])
def test_the_closed_form_is_what_a_counter_sees_in_the_extracted_network(kind: Callable[[], Any]) -> None:
    elastic, _, _ = elastic_of(kind)
    rng = np.random.default_rng(0)
    for architecture in (elastic.smallest(), elastic.largest(), elastic.space.sample(rng)):
        heads, ffn = sizes(elastic, architecture)
        assert len(heads) == len(ffn) == architecture[elastic.dims[0].name]
        common = {"hidden": HIDDEN, "head_dim": HIDDEN // HEADS}
        if kind is vit:
            wanted = transformer_macs(heads, ffn, tokens=5, patch_size=4, classes=3, **common)
        else:
            wanted = transformer_macs(heads, ffn, tokens=TOKENS, classes=3, **common) + HIDDEN * HIDDEN  # the pooler
        assert elastic.costs(architecture)["macs"] == wanted


def logits_of(case: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor, Tensor, dict[str, float]]:
    given = case["input"]
    n, c = given["N"], given["C"]
    index = torch.arange(n * c, dtype=torch.float64).reshape(n, c)
    whole = (2 * torch.sin(0.7 * index + 0.1)).requires_grad_()
    subnets = [(2 * torch.sin((0.8 + 0.1 * q) * index + 0.3)).requires_grad_() for q in range(given["M"])]
    teacher = 2 * torch.sin(0.65 * index + 0.2)
    options = {"alpha": given["alpha"], "gamma": given["gamma"], "temperature": given["rho"]}
    return whole, subnets, torch.arange(n) % c, teacher, options


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("loss-")])
def test_the_loss_and_its_gradients(name: str) -> None:
    whole, subnets, labels, teacher, options = logits_of(CASES[name])
    loss = instatune_loss(whole, subnets, labels, teacher, **options)
    loss.backward()
    expected = CASES[name]["expected"]
    assert loss.item() == pytest.approx(expected["total"], abs=1e-8)
    assert whole.grad is not None and whole.grad[0, 0].item() == pytest.approx(expected["grad_super_00"], abs=1e-8)
    found = subnets[0].grad
    assert found is not None and found[0, 0].item() == pytest.approx(expected["grad_sub0_00"], abs=1e-8)


def test_what_the_loss_looks_at() -> None:
    whole, subnets, labels, teacher, _ = logits_of(CASES["loss-gamma0-M1"])
    instatune_loss(whole, subnets, labels, alpha=0.3, gamma=0.0).backward()
    alone = whole.detach().clone().requires_grad_()
    (0.3 * F.cross_entropy(alone, labels)).backward()
    assert torch.allclose(whole.grad, alone.grad, atol=1e-12)  # type: ignore[arg-type]
    losses = [instatune_loss(each, subnets, labels, teacher, gamma=1.0) for each in (whole, whole + torch.randn(4, 5))]
    own = [0.3 * F.cross_entropy(w, labels) + 0.7 * divergence(w, teacher) for w in (whole,)]
    rest = losses[0] - own[0]
    assert torch.isfinite(losses[1]) and rest.item() == pytest.approx(
        (0.3 * F.cross_entropy(subnets[0], labels) + 0.7 * divergence(subnets[0], teacher)).item(), abs=1e-10
    )
    with pytest.raises(UserError, match="logits of a teacher"):
        instatune_loss(whole, subnets, labels, gamma=1.0)


def test_published_relations() -> None:
    rows = CASES["published-table-relations"]["expected"]
    drops = {name: [1 - macs / base for macs, _ in subnets] for name, base, _, subnets in rows}
    assert math.floor(1e4 * max(drops["BERT Base"])) / 100 == 53.62  # printed cut off, not rounded


@pytest.mark.parametrize("kind", [bert, pytest.param(vit, marks=pytest.mark.slow)])
def test_the_whole_network_is_the_pretrained_one_and_subnets_are_what_is_cut(kind: Callable[[], Any]) -> None:
    elastic, inputs, forward = elastic_of(kind)
    assert gap(outputs(elastic, inputs), outputs(elastic.model, inputs, forward)) == 0
    rng = np.random.default_rng(1)
    drawn = [elastic.space.sample(rng) for _ in range(4)]
    assert any(a[elastic.dims[0].name] < LAYERS for a in drawn) and any(
        len(set(sizes(elastic, a)[0])) > 1 for a in drawn
    )
    for architecture in drawn:
        elastic.activate(architecture)
        alone = elastic.extract(architecture)
        assert gap(outputs(elastic, inputs), outputs(alone, inputs, forward)) < 1e-5
        assert alone.config.num_hidden_layers == architecture[elastic.dims[0].name]  # type: ignore[union-attr]


def test_dropping_heads_is_zeroing_their_columns_of_the_output_projection() -> None:
    elastic, inputs, forward = elastic_of(bert)
    heads = {d.name: 2 for d in elastic.dims if d.kind == "heads"}
    elastic.activate({**elastic.largest(), **heads})
    dropped = outputs(elastic, inputs)
    twin = copy.deepcopy(elastic.model)
    with torch.no_grad():
        for layer in twin.bert.encoder.layer:  # type: ignore[union-attr]
            layer.attention.output.dense.weight[:, 2 * HIDDEN // HEADS :] = 0
    assert gap(dropped, outputs(twin, inputs, forward)) < 1e-6


@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_a_step_has_the_gradients_of_the_loss(gamma: float) -> None:
    elastic, inputs, forward = elastic_of(bert)
    elastic.double()
    teacher_net = copy.deepcopy(elastic.model)
    with torch.no_grad():
        teacher_net.classifier.weight.mul_(2)  # type: ignore[union-attr]
    settings = Settings(subnets=2)
    children = InstaTuneChildren(elastic, settings, gamma).children(np.random.default_rng(3))
    step = ChildrenStep(
        elastic,
        torch.optim.SGD(elastic.parameters(), lr=0.0),
        distance=divergence,
        teacher=lambda **given: teacher_net(**given).logits,
    )
    step(children, lambda call: F.cross_entropy(call(**inputs), LABELS))
    found = {name: p.grad.clone() for name, p in elastic.model.named_parameters() if p.grad is not None}
    elastic.zero_grad()
    logits = []
    for child in children:
        elastic.activate(child.architecture)
        logits.append(elastic(**inputs))
    teacher = forward(teacher_net, **inputs).detach()
    whole = instatune_loss(logits[0], logits[1:], LABELS, teacher, alpha=0.3, gamma=gamma)
    whole.backward()
    for name, p in elastic.model.named_parameters():
        if p.grad is not None:
            assert torch.allclose(found[name], p.grad, atol=1e-10), name


def test_weights_outside_the_subnets_learn_from_the_whole_network_alone() -> None:
    elastic, inputs, _ = elastic_of(bert)
    rule = InstaTuneChildren(elastic, Settings())
    whole, sub = rule.children(np.random.default_rng(0))
    small = type(sub)(**{**vars(sub), "architecture": elastic.smallest()})
    step = ChildrenStep(elastic, torch.optim.SGD(elastic.parameters(), lr=0.0), distance=divergence)

    def run(children: list[Any]) -> dict[str, Tensor]:
        step(children, lambda call: F.cross_entropy(call(**inputs), LABELS))
        return {name: p.grad.clone() for name, p in elastic.model.named_parameters() if p.grad is not None}

    alone, both = run([whole]), run([whole, small])
    last = "bert.encoder.layer.3.output.dense.weight"
    first = "bert.encoder.layer.0.output.dense.weight"
    assert torch.equal(alone[last], both[last])
    assert torch.equal(alone[first][:, 16:], both[first][:, 16:])
    assert not torch.equal(alone[first][:, :16], both[first][:, :16])


def test_the_strong_teacher_teaches_in_the_first_epochs() -> None:
    elastic, inputs, _ = elastic_of(bert)
    asked: list[int] = []
    steps: list[int] = []

    def teacher(**given: Tensor) -> Tensor:
        asked.append(len(steps))
        return torch.zeros(5, 3)

    settings = Settings(epochs=3, teacher_epochs=2, lr=1e-3)
    losses = fine_tune_(
        elastic,
        lambda epoch: [(inputs, LABELS)] * 2,
        settings,
        steps_per_epoch=2,
        seed=0,
        teacher=teacher,
        on_step=lambda number, figures: steps.append(number),
    )
    assert steps == [0, 1, 2, 3, 4, 5] and asked == [0, 1, 2, 3] and len(losses) == 3
    with pytest.raises(UserError, match="a teacher where"):
        fine_tune_(elastic, lambda epoch: [], settings, steps_per_epoch=1, seed=0)
    with pytest.raises(UserError, match="at least one batch"):
        fine_tune_(elastic, lambda epoch: [], Settings(), steps_per_epoch=1, seed=0)


def test_every_elastic_dimension_is_drawn_by_itself() -> None:
    elastic, _, _ = elastic_of(bert)
    rule = InstaTuneChildren(elastic, Settings(subnets=3))
    drawn = [c.architecture for s in range(100) for c in rule.children(np.random.default_rng(s))[1:]]
    depths = [a[elastic.dims[0].name] for a in drawn]
    # 300 fair draws among 3: four standard deviations are 33
    assert all(abs(depths.count(depth) - 100) < 33 for depth in (2, 3, 4))
    assert len({tuple(sizes(elastic, a)[0]) for a in drawn}) > 30


def test_fine_tuning_teaches_the_subnets_and_a_search_finds_a_front() -> None:
    elastic, inputs, _ = elastic_of(bert)
    evaluator = SubnetEvaluator(elastic, [(inputs, LABELS)])
    before = evaluator.metrics(elastic.smallest())["valid_loss"]
    losses = fine_tune_(
        elastic,
        lambda epoch: [(inputs, LABELS)] * 30,
        Settings(epochs=2, lr=3e-3, warmup=0.1),
        steps_per_epoch=30,
        seed=0,
    )
    evaluator.forget()
    assert losses[-1] < losses[0] and evaluator.metrics(elastic.smallest())["valid_loss"] < before - 0.3
    strategy = Nsga2(elastic.space, objectives=OBJECTIVES, seed=0)
    measured = search(elastic, strategy, evaluator, 24)
    best = front(measured)
    assert len(measured) == 24 and best
    macs = [each.result.costs["macs"] for each in best]
    assert macs == sorted(macs)
    other, _, _ = elastic_of(bert)
    with pytest.raises(UserError, match="the space of the supernet"):
        search(other, strategy, evaluator, 2)


def test_published_spaces_fit_networks_of_other_sizes() -> None:
    model, inputs, forward = bert()
    elastic = elastic_transformer(model, inputs, "bert-base", forward=forward)
    kinds = {dim.kind: dim.choices for dim in elastic.dims}
    assert kinds == {"depth": (2, 3, 4), "heads": (2, 3, 4), "ffn": (16, 32, 48)}
    with pytest.raises(UserError, match="bert-base"):
        elastic_transformer(model, inputs, "bert-huge", forward=forward)
    with pytest.raises(UserError, match="a kind that the network has"):
        elastic_transformer(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), torch.zeros(1, 3))


def test_the_rate_rises_and_falls_to_zero() -> None:
    rates = [linear_rate(step, total=20, warmup=0.25) for step in range(20)]
    assert rates[0] == 0.2 and rates[4] == 1.0 and math.isclose(rates[-1], 1 / 15) and max(rates) == 1.0
    assert linear_rate(0, total=10, warmup=0.0) == 1.0
