"""Carries a block-by-block search through, from its configuration to the finished result."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor as Pool
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archsmith.config import RunConfig, validated
from archsmith.core.errors import Shown, UserError
from archsmith.core.files import sha256_of
from archsmith.cost.block_times import Load
from archsmith.run.block_result import delivered, write_block_report
from archsmith.run.block_search import BlockSearch, Stopped, block_executor, digest_of_batches
from archsmith.run.block_source import ModelSource, is_causal, write_statistics
from archsmith.run.directory import Run
from archsmith.run.prepare import record_environment
from archsmith.run.progress import say
from archsmith.run.stop import StopRequest
from archsmith.space import Budget
from archsmith.tasks.text_lines import TextOptions, open_tokenizer, text_batches

FAMILY = "slots"


def drive_blocks(
    config: RunConfig,
    module: Any,
    out: Path,
    *,
    workers: int = 1,
    time_limit: float | None = None,
    quiet: bool = False,
) -> dict[str, Any]:
    """Run a method of this kind to its end, or until it is stopped, and return the result record.

    Args:
        config: Method, task (name, data, options), family ("slots", target), budget, seed, settings.
        module: The method: ``Settings`` and ``search``.
        out: Folder of the run.
        workers: Processes of one thread each for blocks and scores; the result does not depend on it.
        time_limit: Seconds after which it stops; it can be resumed.
        quiet: No progress.

    Returns:
        ``result.json``'s content; ``{"status": "stopped"}`` alone when it was stopped before there was a result.

    Raises:
        UserError: Something given is wrong.
    """
    tell: Callable[[str], None] = (lambda text: None) if quiet else say
    settings = validated(module.Settings, config.settings, field="settings")
    given = {name: value for name, value in config.task.items() if name not in ("name", "data")}
    known = [each.name for each in fields(TextOptions)]
    if unknown := sorted(set(given) - set(known)):
        raise UserError(f"task.{unknown[0]}", given[unknown[0]], allowed=f"options {', '.join(known)}")
    options = TextOptions(**given)
    target, kind = str(config.family["target"]), str(config.task["name"])
    if config.budget is None:
        raise UserError("budget", None, allowed="limits on memory, params, macs, latency or throughput")
    source = ModelSource(
        target,
        json.dumps(settings.alternatives) if settings.alternatives else "",
        settings.ranking,
        settings.kv_initialiser,
    )
    tokenizer = open_tokenizer(options.tokenizer or (target if Path(target).is_dir() else None))
    train, valid = text_batches(kind, config.task["data"], options, tokenizer, seed=config.seed)
    key = sha256_of((target + source.alternatives + digest_of_batches([*train, *valid])).encode())
    config = config.model_copy(update={"task_digest": key})
    parent = source().parent  # whatever is wrong with the model is refused before anything is written
    score = _score(settings, parent, kind)
    if not hasattr(getattr(parent, "config", None), "use_cache"):
        train, valid = ([{k: v for k, v in b.items() if k != "use_cache"} for b in part] for part in (train, valid))
    with StopRequest(time_limit=time_limit) as stop, Run.create_or_open(out, config.to_json()) as run:
        if run.status == "finished":
            result = run.result()
            assert result is not None
            return result
        record_environment(run)
        started = time.monotonic()
        statistics = out / "statistics.safetensors"
        if not statistics.is_file():
            family = source()
            family.collect_statistics(train[: max(1, min(8, len(train)))])
            write_statistics(family, statistics)
        source = replace(source, statistics=str(statistics.absolute()))
        executor = block_executor(workers)
        try:
            blocks = BlockSearch(
                run,
                source,
                train,
                valid,
                key=key,
                training=settings.training,
                score=score,
                by=settings.scored,
                seed=config.seed,
                executor=executor,
                should_stop=lambda: stop.reason is not None,
                tell=tell,
            )
            budget = Budget.parse(str(config.budget))
            words = int(tokenizer.get_vocab_size())
            children, others, costs = module.search(
                blocks, budget, settings, lambda load: call_of(load, words), length=options.length
            )
            record = delivered(blocks, children, others, costs, budget, settings.uptraining, score, valid[0])
        except Stopped as reason:
            tell(f"{reason}; archsmith resume {out} goes on.")
            return {"status": "stopped"}
        finally:
            if isinstance(executor, Pool):
                executor.shutdown(cancel_futures=True)
        run.finish({**record, "seconds": round(time.monotonic() - started, 1), "task_digest": key, "diagnosis": []})
        write_block_report(run)
        result = run.result()
        assert result is not None
        return result


def _score(settings: Any, parent: Any, kind: str) -> Any:
    """Return the score: as set, or the divergence for causal models and embeddings for encoders.

    Raises:
        UserError: A score that needs logits of a model that has none, or a causal task for an encoder.
    """
    causal = is_causal(parent) or (kind == "language-modelling" and not hasattr(parent, "config"))
    if kind == "language-modelling" and not causal:
        raise UserError(
            "task",
            Shown(f"{kind} with {type(parent).__name__}"),
            allowed="a causal model",
            hint="Use --task sentences for encoders.",
        )
    return settings.score or ("kl" if causal else "embedding")


def call_of(load: Load, words: int) -> Mapping[str, Tensor]:
    """Return token ids for a load, drawn at random: what is measured does not depend on them."""
    generator = torch.Generator().manual_seed(0)
    low = min(5, words - 1)
    return {"input_ids": torch.randint(low, words, (load.batch, load.prefill), generator=generator)}
