"""Self-diagnosis: what a finished run should make its user doubt, and the next command to try.

``diagnose`` is a pure function over the figures that a method gives at the end of each epoch, the result and the
configuration. Every check knows figures by name and is skipped where they are missing, so that every method can use it:

========================== ==========================================================================================
of an epoch                ``epoch``, ``loss``, ``valid_accuracy``, ``macs``, ``atoms``, ``rho`` (strength of a
                           penalty), ``within_budget``, ``cut`` (``removed``, and of these ``forced``: alive, but the
                           budget had no room for them); of a search over choices ``probabilities`` (rows of mixing
                           weights by group) and ``weightless`` (operations without weights by kind of cell)
of ``result["figures"]``   ``valid_accuracy_running_statistics``: accuracy with the statistics that training left,
                           where the delivered network has recalibrated ones; ``supernet_accuracy`` and
                           ``selected_path_accuracy``, relaxed and after the selection, with the same weights
========================== ==========================================================================================
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Level = Literal["warning", "note"]

STANDARD_ERRORS = 2.0
"""Differences of accuracies below this many binomial standard errors are not spoken of."""

_WINDOW = 0.2  # part of the comparable epochs that a trend is judged by
_BY_HEART = 0.99  # accuracy of training batches from which nothing is left to learn from them
_WIDE_GAP = 0.15  # below that, validation accuracy far behind
_SHORTEST = 10  # comparable epochs below which no trend is judged
_MOVED = 0.01  # change of a probability below which an operation was not searched
_COLLAPSED = 0.75  # share of operations without weights from which a cell has collapsed


@dataclass(frozen=True)
class Finding:
    """One thing to doubt.

    Attributes:
        level: "warning" when a claim of the run is in doubt, "note" when only something could be better.
        title: The finding in a few words.
        text: What was seen, with its numbers, and what it means.
        next_command: A command line to try next.
    """

    level: Level
    title: str
    text: str
    next_command: str


@dataclass(frozen=True)
class _Seen:
    """What the checks look at."""

    epochs: Sequence[Mapping[str, Any]]
    result: Mapping[str, Any]
    config: Mapping[str, Any]
    run: str

    @property
    def metrics(self) -> Mapping[str, Any]:
        metrics: Mapping[str, Any] = self.result["outcomes"][0]["metrics"]
        return metrics

    @property
    def costs(self) -> Mapping[str, Any]:
        costs: Mapping[str, Any] = self.result["outcomes"][0]["costs"]
        return costs

    def examples(self, split: str) -> int | None:
        return self.result.get("examples", {}).get(split)

    def setting(self, name: str) -> Any:
        return self.config.get("settings", {}).get(name)

    @property
    def trust(self) -> tuple[str, ...]:
        """What a command needs that executes the user's own factory."""
        return ("--trust",) if self.config.get("family", {}).get("name") == "own" else ()

    @property
    def shrinks(self) -> bool:
        """Whether the method removes atoms at all: it counts them, and no architecture was given."""
        return bool(self.epochs) and "atoms" in self.epochs[-1] and not self.config.get("architecture")

    def comparable(self) -> Sequence[Mapping[str, Any]]:
        """Return the epochs since the network is within the budget and no more than 1 % of its MACs went: one network.

        Accuracies of earlier, larger networks say nothing about how long the delivered one should train.
        """
        kept: list[Mapping[str, Any]] = []
        for epoch in reversed(self.epochs):
            same = epoch.get("macs", 0) <= 1.01 * self.epochs[-1].get("macs", 0)
            if not same or not epoch.get("within_budget", True):
                break
            kept.append(epoch)
        return kept[::-1]

    def again(self, suffix: str, *options: str) -> str:
        """Return the command that repeats the run elsewhere with other options."""
        words = [
            "archsmith",
            "search",
            "--config",
            f"{self.run}/config.yaml",
            *options,
            "--out",
            f"{self.run}-{suffix}",
            *self.trust,
        ]
        return shlex.join(words)

    def with_setting(self, name: str, value: object) -> str:
        return self.again(f"{name}-{value}", "--set", f"{name}={value}")


def diagnose(
    epochs: Sequence[Mapping[str, Any]], result: Mapping[str, Any], config: Mapping[str, Any], *, run: str = "RUN"
) -> list[Finding]:
    """Return what is doubtful about a run, warnings first; an empty list for a healthy one.

    Args:
        epochs: Figures of the epochs in order, ``Run.history()``.
        result: Content of ``result.json``.
        config: Content of ``config.yaml``.
        run: Folder of the run, for the commands.
    """
    seen = _Seen(epochs, result, config, run)
    checks: tuple[Callable[[_Seen], Iterator[Finding]], ...] = (
        _no_learning,
        _diverging,
        _nothing_removed,
        _penalty_without_effect,
        _met_by_the_mask,
        _statistics,
        _valid_against_test,
        _noisy_latency,
        _still_improving,
        _past_its_best,
        _by_heart,
        _undecided,
        _collapsed,
        _lost_by_selection,
    )
    found = [finding for check in checks for finding in check(seen)]
    return sorted(found, key=lambda finding: finding.level != "warning")


def standard_error(accuracy: float, examples: int) -> float:
    """Return the binomial standard error of an accuracy, at 0 and 1 that of half an example wrong or right."""
    inside = min(max(accuracy, 0.5 / examples), 1 - 0.5 / examples)
    return math.sqrt(inside * (1 - inside) / examples)


def _no_learning(seen: _Seen) -> Iterator[Finding]:
    classes, examples, accuracy = seen.result.get("classes"), seen.examples("valid"), seen.metrics.get("valid_accuracy")
    if not classes or not examples or accuracy is None:
        return
    chance = 1 / classes
    if accuracy <= chance + 3 * standard_error(chance, examples):
        yield Finding(
            "warning",
            "The network learned nothing",
            f"Validation accuracy is {_percent(accuracy)}; guessing one of {classes} classes gives {_percent(chance)}. "
            "Mostly the learning rate is too high, the penalty too strong, or the labels do not belong to the images.",
            _lower_rate(seen),
        )


def _diverging(seen: _Seen) -> Iterator[Finding]:
    """The training loss rises again although the network stays the same."""
    losses = [epoch["loss"] for epoch in seen.comparable() if "loss" in epoch]
    width = max(3, round(_WINDOW * len(losses)))
    if len(losses) < max(_SHORTEST, 2 * width):
        return
    means = [_mean(losses[i : i + width]) for i in range(len(losses) - width + 1)]
    lowest, last = min(means), means[-1]
    if last > 1.1 * lowest and last - lowest > 0.05:
        yield Finding(
            "warning",
            "The training loss rises again",
            f"It was {lowest:.3f} on average over {width} epochs and is {last:.3f} over the last {width}, without a "
            "cut in between: learning is diverging.",
            _lower_rate(seen),
        )


def _nothing_removed(seen: _Seen) -> Iterator[Finding]:
    largest, macs = seen.result.get("reference", {}).get("macs"), seen.costs.get("macs")
    if not seen.shrinks or not largest or macs is None or macs < largest:
        return
    why = "its penalty is switched off (rho 0)" if seen.setting("rho") == 0 else "no atom came near the threshold"
    yield Finding(
        "warning",
        "Nothing was removed",
        f"The delivered network is the whole supernet, {macs:,} MACs: {why}. A budget steers the penalty until "
        "the network fits.",
        seen.again("half", "--budget", "macs<=0.5x"),
    )


def _removed(seen: _Seen) -> tuple[int, int]:
    """Return how many atoms were removed, and how many of these by force."""
    cuts = [epoch["cut"] for epoch in seen.epochs if epoch.get("cut")]
    forced = sum(cut.get("forced", 0) for cut in cuts) + int(seen.result.get("figures", {}).get("forced", 0))
    own = sum(cut["removed"] - cut.get("forced", 0) for cut in cuts)
    return own + forced, forced


def _penalty_without_effect(seen: _Seen) -> Iterator[Finding]:
    removed, forced = _removed(seen)
    penalised = sum(epoch.get("rho", 0) > 0 for epoch in seen.epochs)
    if not seen.shrinks or not removed or forced < removed or penalised < 3:
        return
    yield Finding(
        "warning",
        "The penalty had no effect",
        f"All {removed:,} atoms that went were alive when the budget's mask took them; {penalised} epochs of penalty "
        "had killed none. Which atoms stay was decided by training without pressure.",
        _stronger(seen, 10),
    )


def _met_by_the_mask(seen: _Seen) -> Iterator[Finding]:
    removed, forced = _removed(seen)
    if not seen.shrinks or not 0.5 * removed < forced < removed:
        return
    yield Finding(
        "note",
        "The budget was met by the final mask",
        f"{forced:,} of the {removed:,} removed atoms ({forced / removed:.0%}) were still alive and were cut because "
        "the budget had no room for them: the penalty was on its way but did not get there, and the network had to "
        "recover from the cut.",
        _stronger(seen, 3),
    )


def _statistics(seen: _Seen) -> Iterator[Finding]:
    running = seen.result.get("figures", {}).get("valid_accuracy_running_statistics")
    delivered, examples = seen.metrics.get("valid_accuracy"), seen.examples("valid")
    if running is None or delivered is None or not examples:
        return
    noise = STANDARD_ERRORS * standard_error((running + delivered) / 2, examples)
    if delivered - running > noise:
        yield Finding(
            "note",
            "The running statistics were stale",
            f"With the batch normalisation statistics that training left, validation accuracy is {_percent(running)}; "
            f"recalibrated on training images it is {_percent(delivered)}. The delivered network is recalibrated, but "
            "the average followed the weights too slowly for the length of this training.",
            _faster_average(seen),
        )
    elif running - delivered > noise:
        batches = seen.setting("recalibration_batches")
        yield Finding(
            "warning",
            "Recalibration hurt",
            f"Validation accuracy is {_percent(running)} with the statistics that training left and "
            f"{_percent(delivered)} after recalibration: too few images were used for it.",
            seen.with_setting("recalibration_batches", 4 * batches) if batches else seen.again("again"),
        )


def _valid_against_test(seen: _Seen) -> Iterator[Finding]:
    valid, test = seen.metrics.get("valid_accuracy"), seen.metrics.get("test_accuracy")
    n_valid, n_test = seen.examples("valid"), seen.examples("test")
    if valid is None or test is None or not n_valid or not n_test:
        return
    pooled = (valid * n_valid + test * n_test) / (n_valid + n_test)
    error = standard_error(pooled, n_valid + n_test) * math.sqrt((n_valid + n_test) * (1 / n_valid + 1 / n_test))
    if abs(valid - test) <= STANDARD_ERRORS * error:
        return
    better = "better" if valid > test else "worse"
    meaning = (
        "Decisions that looked at validation images fit these images; quote the test accuracy."
        if valid > test
        else "The two parts differ in difficulty, or one is very small; quote both."
    )
    yield Finding(
        "warning" if valid > test else "note",
        "Validation and test disagree",
        f"Validation accuracy {_percent(valid)} ({n_valid:,} images) is {better} than test accuracy {_percent(test)} "
        f"({n_test:,} images) by {abs(valid - test) / error:.1f} binomial standard errors. {meaning} Another seed "
        "shows how much is chance.",
        seen.again(f"seed-{_other_seed(seen)}", "--seed", str(_other_seed(seen))),
    )


def _noisy_latency(seen: _Seen) -> Iterator[Finding]:
    latency = seen.costs.get("latency")
    if not latency or not latency.get("noisy"):
        return
    yield Finding(
        "warning",
        "The latency is too noisy to claim",
        f"The middle half of the rounds spans {latency['iqr_ms']:.3g} ms around a median of {latency['median_ms']:.3g} "
        "ms, more than a tenth: something else was running. Measure again on a quiet machine.",
        shlex.join(["archsmith", "verify", seen.run, *seen.trust]),
    )


def _still_improving(seen: _Seen) -> Iterator[Finding]:
    """The last epochs are the best, by more than chance."""
    epochs, examples = [e for e in seen.comparable() if "valid_accuracy" in e], seen.examples("valid")
    width = max(2, round(_WINDOW * len(epochs) / 2))
    total = seen.setting("epochs")
    if len(epochs) < _SHORTEST or not examples or not total:
        return
    accuracies = [epoch["valid_accuracy"] for epoch in epochs]
    last, before = _mean(accuracies[-width:]), _mean(accuracies[-2 * width : -width])
    if accuracies[-1] == max(accuracies) and last - before > standard_error(last, examples):
        yield Finding(
            "note",
            "Still improving at the end",
            f"The last epoch is the best one, and the last {width} epochs are {100 * (last - before):.1f} points "
            f"better than the {width} before: training ended too early.",
            seen.with_setting("epochs", 2 * int(total)),
        )


def _past_its_best(seen: _Seen) -> Iterator[Finding]:
    """The best epoch is long ago, and what came after is worse by more than chance."""
    epochs, examples = [e for e in seen.comparable() if "valid_accuracy" in e], seen.examples("valid")
    if len(epochs) < _SHORTEST or not examples:
        return
    width = max(2, round(_WINDOW * len(epochs)))
    accuracies = [epoch["valid_accuracy"] for epoch in epochs]
    means = [_mean(accuracies[i : i + width]) for i in range(len(accuracies) - width + 1)]
    best = max(range(len(means)), key=means.__getitem__)
    if means[best] - means[-1] <= STANDARD_ERRORS * standard_error(means[best], examples) or best > len(means) / 2:
        return
    decay = seen.setting("weight_decay")
    first = epochs[best]["epoch"] + 1
    yield Finding(
        "warning",
        "The best epochs are long ago",
        f"Around epochs {first} to {first + width - 1} validation accuracy was {_percent(means[best])} on average; the "
        f"last {width} epochs have {_percent(means[-1])}. The same network got worse: it overfits.",
        seen.with_setting("weight_decay", f"{10 * decay:.3g}") if decay else _reseeded(seen),
    )


def _by_heart(seen: _Seen) -> Iterator[Finding]:
    """Nothing is left to learn from the training images, much from others."""
    learned = [e for e in seen.comparable() if (e.get("train_accuracy") or 0.0) >= _BY_HEART]
    total = seen.setting("epochs")
    if not learned or not total or "valid_accuracy" not in learned[-1]:
        return
    valid = learned[-1]["valid_accuracy"]
    if _BY_HEART - valid < _WIDE_GAP:
        return
    yield Finding(
        "note",
        "The training images are learned by heart",
        f"From epoch {learned[0]['epoch'] + 1} on training batches are {_percent(_BY_HEART)} right or more, validation "
        f"images {_percent(valid)}: architectures hardly differ then. More images help, more epochs do not.",
        seen.with_setting("epochs", max(_SHORTEST, learned[0]["epoch"])),
    )


def _undecided(seen: _Seen) -> Iterator[Finding]:
    """The parameters of the choice hardly moved: what was selected is what chance began with."""
    searching = [epoch["probabilities"] for epoch in seen.epochs if "probabilities" in epoch]
    if not searching:
        return
    pairs = [
        (p, 1 / len(row) if len(searching) == 1 else q)  # after one epoch there is only the uniform start to compare
        for group, rows in searching[-1].items()
        for row, before in zip(rows, searching[0][group], strict=True)
        if isinstance(row, list)  # weights of edges are plain numbers
        for p, q in zip(row, before, strict=True)
    ]
    if max(abs(p - q) for p, q in pairs) >= _MOVED:
        return
    rate = seen.setting("logit_lr")
    yield Finding(
        "warning",
        "The architecture was hardly searched",
        f"No probability of any operation moved by {_MOVED} in {len(searching)} epochs: the selected cells rest on "
        "differences of that size, and on the random start.",
        seen.with_setting("logit_lr", f"{10 * rate:.3g}") if rate else _reseeded(seen),
    )


def _collapsed(seen: _Seen) -> Iterator[Finding]:
    """Most operations of the normal cell have no weights: the known way in which relaxed searches fail.

    Reduction cells are not asked: pooling is ordinary there, the published ones are mostly that.
    """
    searching = [epoch for epoch in seen.epochs if "weightless" in epoch and "operations" in epoch]
    if not searching:
        return
    weightless, operations_of = searching[-1]["weightless"], searching[-1]["operations"]
    asked = [group for group in weightless if group != "reduce"]
    free, operations = sum(weightless[group] for group in asked), sum(operations_of[group] for group in asked)
    if free < _COLLAPSED * operations:
        return
    total = seen.setting("search_epochs")
    yield Finding(
        "warning",
        f"The {' and '.join(asked)} cell has hardly any weights",
        f"{free} of its {operations} operations are skips or poolings. Relaxed searches drift there when the supernet "
        "is trained long, because skips make it learn faster; the network of such cells is often weak.",
        seen.with_setting("search_epochs", max(1, int(total) // 2)) if total else _reseeded(seen),
    )


def _lost_by_selection(seen: _Seen) -> Iterator[Finding]:
    """The supernet loses accuracy when only the selected operations are left."""
    figures, examples = seen.result.get("figures", {}), seen.examples("valid")
    before, after = figures.get("supernet_accuracy"), figures.get("selected_path_accuracy")
    if before is None or after is None or not examples:
        return
    if before - after > STANDARD_ERRORS * standard_error(before, examples):
        yield Finding(
            "note",
            "The selection cost the supernet accuracy",
            f"With all operations mixed it had {_percent(before)} on validation images, along the selected cells "
            f"alone, with the same weights, {_percent(after)}. What is strong in the mixture may be weak by itself.",
            _reseeded(seen),
        )


def _lower_rate(seen: _Seen) -> str:
    rate = seen.setting("lr")
    return seen.with_setting("lr", f"{rate / 3:.2g}") if rate else _reseeded(seen)


def _stronger(seen: _Seen, factor: int) -> str:
    rho = seen.setting("rho")
    return seen.with_setting("rho", f"{factor * rho:.3g}") if rho else _reseeded(seen)


def _faster_average(seen: _Seen) -> str:
    decay = seen.setting("ema_decay")
    return seen.with_setting("ema_decay", f"{1 - 4 * (1 - decay):.4g}") if decay and decay > 0.75 else _reseeded(seen)


def _reseeded(seen: _Seen) -> str:
    return seen.again(f"seed-{_other_seed(seen)}", "--seed", str(_other_seed(seen)))


def _other_seed(seen: _Seen) -> int:
    return int(seen.config.get("seed", 0)) + 1


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"
