"""What a block-by-block search ends with: trained children with their files, and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError, UserError
from archsmith.core.files import sha256_file, storage_errors, write_atomic
from archsmith.evaluate.replace_one import ScoreName, logits_of, measured_score
from archsmith.families.slot_statistics import run_batch
from archsmith.run.block_search import (
    BlockSearch,
    Child,
    CostTables,
    Stopped,
    allowed_ms,
    child_record,
    comparable_ms,
    folder_of,
    with_units,
)
from archsmith.run.cell_picture import chain_picture
from archsmith.run.choice_charts import colours_of
from archsmith.run.directory import Run
from archsmith.run.page import document, element, joined, section, table
from archsmith.run.slot_export import export_child
from archsmith.space import Budget
from archsmith.train.activation_cache import Batch, recorded
from archsmith.train.global_distill import Uptraining, uptrain

TOLERANCE = 1e-5
"""Largest difference, relative to the largest output, of a child that was loaded again."""


def judged(blocks: BlockSearch, model: nn.Module, score: ScoreName) -> float:
    """Return the score of a whole model on the validation batches: what replace-one-block scores foretell by a sum."""
    parent, paths = blocks.family.parent, blocks.family.layer_paths
    sums, weights = [], []
    with torch.no_grad():
        for batch in blocks.valid:
            with recorded(parent, paths[-1:]) as wanted:
                reference = run_batch(parent, batch)
            with recorded(model, paths[-1:]) as own:
                output = run_batch(model, batch)
            logits = logits_of(reference) if score == "kl" else None
            value, weight = measured_score(score, output, own[0].output, logits, wanted[0].output, batch)
            sums.append(value * weight)
            weights.append(weight)
    return math.fsum(sums) / max(1, sum(weights))


def delivered(
    blocks: BlockSearch,
    children: Sequence[Child],
    others: Sequence[Child],
    costs: CostTables,
    budget: Budget,
    uptraining: Uptraining,
    score: ScoreName,
    examples: Batch,
) -> dict[str, Any]:
    """Train every child end to end, write and check its files, and return the result record.

    Args:
        blocks: The search.
        children: What is delivered, best first.
        others: Baselines; judged as they were assembled, neither trained nor written.
        costs: The tables.
        budget: Limits.
        uptraining: Of the children.
        score: What models are judged by.
        examples: Inputs of the check.

    Raises:
        Stopped: It was asked to stop; the uptraining goes on from its checkpoint.
        ArchsmithError: A written child differs from the one in memory.
    """
    outcomes, notes = [], []
    for number, child in enumerate(children):
        label = child.label if number == 0 else f"{child.label}-{number + 1}"
        model = blocks.build(child)
        before = judged(blocks, model, score)
        checkpoint = blocks.run.path / "uptraining" / f"{label}.safetensors"
        checkpoint.parent.mkdir(exist_ok=True)
        complete = uptrain(
            model,
            blocks.family.parent,
            blocks.family.layer_paths,
            blocks.train,
            uptraining,
            seed=blocks.seed,
            checkpoint=checkpoint,
            should_stop=blocks.should_stop,
            on_step=lambda step, loss: (
                blocks.tell(f"uptraining step {step}/{uptraining.steps}: {loss:.4f}") if step % 50 == 0 else None
            ),
        )
        if not complete:
            raise Stopped("stopped while the child was trained")
        after = judged(blocks, model, score)
        folder = folder_of(blocks.run, label)
        files, more = _written(blocks, model, folder, examples)
        notes += more
        outcomes.append(
            {
                **child_record(child),
                "label": label,
                "folder": f"networks/{label}",
                "files": files,
                "metrics": {f"{score}_before": before, f"{score}_after": after},
                "costs": {"params": sum(p.numel() for p in model.parameters()), "predicted": dict(child.predicted)},
                "measured": dict(child.measured),
                "limit": _against_limit(child, budget, costs),
            }
        )
        blocks.tell(f"{label}: {score} {before:.5f} before, {after:.5f} after the uptraining")
    compared = [
        {**child_record(child), "metrics": {f"{score}_before": judged(blocks, blocks.build(child), score)}}
        for child in others
    ]
    return {
        "method": blocks.run.config["method"],
        "task": blocks.run.config["task"]["name"],
        "family": "slots",
        "seed": blocks.seed,
        "budget": str(budget),
        "limits": {limit.cost: limit.value for limit in budget.resolve(costs.parent).limits},
        "load": asdict(costs.load),
        "reference": dict(costs.parent),
        "outside": dict(costs.rest),
        "score": score,
        "baselines": compared,
        "notes": sorted(set(notes)),
        "outcomes": outcomes,
    }


def _against_limit(child: Child, budget: Budget, costs: CostTables) -> dict[str, Any]:
    """Return how the whole child, measured, stands to the limit on time; empty without one."""
    allowed = allowed_ms({li.cost: li.value for li in budget.resolve(costs.parent).limits}, costs.load)
    if allowed is None or not child.measured:
        return {}
    measured = comparable_ms(child, budget, costs)
    noisy = any(phase["noisy"] for phase in child.measured["latency"].values())
    verdict = "not verifiable now" if noisy else "holds" if measured <= allowed else "violated"
    return {
        "limit_ms": allowed,
        "predicted_ms": float(child.predicted["runtime"]),
        "measured_ms": measured,
        "verdict": verdict,
    }


def _written(blocks: BlockSearch, model: nn.Module, folder: Path, examples: Batch) -> tuple[dict[str, str], list[str]]:
    """Write a child, its source where there is a mapping, and inputs with its outputs; check what is read again."""
    notes = []
    with storage_errors("out", folder):
        folder.mkdir(parents=True, exist_ok=True)
    blocks.family.save(model, folder / "model")
    with torch.no_grad():
        outputs = output_of(run_batch(model, examples))
    tensors = examples if isinstance(examples, Mapping) else {"": examples}
    inputs = {f"input/{name}": value for name, value in tensors.items() if isinstance(value, Tensor)}
    save_file({**inputs, "output": outputs.contiguous()}, folder / "check.safetensors")
    again = blocks.family.load(folder / "model")
    with torch.no_grad():
        gap = float((output_of(run_batch(again, examples)) - outputs).abs().max() / outputs.abs().max().clamp(min=1))
    if not gap <= TOLERANCE:
        raise ArchsmithError(f"{folder}: the child that was read again differs by {gap:.2g}; this is a defect.")
    ids = tensors.get("input_ids")
    try:
        if ids is None:
            raise UserError("examples", "no token numbers", allowed="token numbers for standalone source")
        export_child(model, folder / "standalone", examples=ids)
    except UserError as error:
        notes.append(f"No standalone source: {error}")
    files = {str(path.relative_to(folder)): sha256_file(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    return files, notes


def output_of(output: Any) -> Tensor:
    """Return the logits of an output, else its last hidden state, else itself; as floats."""
    found: Tensor = (
        output.logits if hasattr(output, "logits") else getattr(output, "last_hidden_state", output)
    ).float()
    return found


# ------------------------------------------------------------------ the report


def write_block_report(run: Run) -> Path:
    """Write ``report.html``: the child layer by layer, the table of children, the costs."""
    from plotly.offline import get_plotlyjs

    result = run.result()
    assert result is not None
    path = run.path / "report.html"
    write_atomic(path, render(result, run.config, plotly=get_plotlyjs()))
    return path


def render(result: Mapping[str, Any], config: Mapping[str, Any], *, plotly: str) -> str:
    """Return the page of a block-by-block search."""
    title = f"{result['method']} on {config['family']['target']}"
    score = result["score"]
    names = sorted({name for outcome in result["outcomes"] for name in outcome["decisions"].values()})
    colours = colours_of(names)
    pictures = [
        part
        for outcome in result["outcomes"]
        for part in (
            element("h3", outcome["label"]),
            chain_picture([(slot, name) for slot, name in outcome["decisions"].items()], colours),
        )
    ]
    reference = result["reference"]
    rows = [
        ["parent", f"{reference['params']:,.0f}", _amount(reference, "memory"), "0", *_times(reference, None), "", ""]
    ]
    for row in (*result["outcomes"], *result["baselines"]):
        metrics = row["metrics"]
        after = metrics.get(f"{score}_after")
        rows.append(
            [
                row["label"],
                f"{row['predicted']['params']:,.0f}",
                _amount(row["predicted"], "memory"),
                f"{row['score']:.5g}",
                *_times(row["predicted"], row["runtime_ms"]),
                f"{metrics[f'{score}_before']:.5g}",
                "" if after is None else f"{after:.5g}",
            ]
        )
    columns = [
        "",
        "parameters",
        "memory",
        f"sum of {score}",
        "predicted ms",
        "measured ms",
        f"{score}",
        "after training",
    ]
    facts = [[name, f"{value}"] for name, value in {**result["load"], "budget": result["budget"]}.items()]
    facts += [[note, ""] for note in result["notes"]]
    body = joined(
        element("header", element("h1", title), element("p", f"within {result['budget']}")),
        section("child", "The child", *pictures, lead="Which alternative stands in each sub-block, layer by layer."),
        section(
            "table",
            "Against the parent and other selections",
            table(columns, rows),
            lead=f"Same limits, same library. {score} of whole models on the validation text; only "
            "children are trained end to end.",
        ),
        section("facts", "Load and limits", table(["", ""], facts, text_columns=2)),
    )
    return document(title, body, plotly=plotly)


def _amount(costs: Mapping[str, float], name: str) -> str:
    return with_units(name, costs[name])


def _times(predicted: Mapping[str, float], measured: float | None) -> list[str]:
    shown = "" if "runtime" not in predicted else f"{predicted['runtime']:.3f}"
    return [shown, "" if measured is None else f"{measured:.3f}"]
