"""Every check fires on a history made for it and is silent on a healthy one; every command can be typed."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from archsmith.cli import app
from archsmith.methods.atomnas import Settings
from archsmith.run.diagnose import Finding, diagnose, standard_error

EPOCHS = 30
LARGEST = 1_000_000


def healthy() -> dict[str, Any]:
    """Return a run that the penalty brought to its budget in the twelfth epoch and that then converged."""
    epochs = []
    for epoch in range(EPOCHS):
        shrunk = min(epoch, 12) / 12
        cut = {"removed": 50, "forced": 0, "dead_blocks": []} if 0 < epoch <= 12 else None
        epochs.append(
            {
                "epoch": epoch,
                "loss": 0.5 + 1.5 * 0.8**epoch,
                "valid_accuracy": 0.95 - 0.5 * 0.6**epoch,
                "macs": round(LARGEST * (1 - 0.6 * shrunk)),
                "atoms": 1000 - 50 * min(epoch, 12),
                "rho": 0.001 if epoch < 12 else 0.0,
                "within_budget": epoch >= 12,
                "cut": cut,
            }
        )
    return {
        "epochs": epochs,
        "result": {
            "reference": {"macs": LARGEST},
            "limits": {"macs": 400_000.0},
            "examples": {"train": 5000, "valid": 1000, "test": 1000},
            "classes": 10,
            "figures": {"valid_accuracy_running_statistics": 0.949},
            "outcomes": [
                {
                    "metrics": {"valid_accuracy": 0.95, "test_accuracy": 0.945},
                    "costs": {"macs": 400_000, "latency": {"noisy": False, "median_ms": 2.0, "iqr_ms": 0.1}},
                }
            ],
        },
        "config": {
            "seed": 3,
            "settings": {
                "epochs": EPOCHS,
                "lr": 0.03,
                "rho": 0.001,
                "ema_decay": 0.98,
                "recalibration_batches": 4,
                "weight_decay": 1e-5,
            },
        },
    }


def found(run: dict[str, Any]) -> list[Finding]:
    return diagnose(run["epochs"], run["result"], run["config"], run="runs/demo")


def metrics(run: dict[str, Any]) -> dict[str, Any]:
    return run["result"]["outcomes"][0]["metrics"]


def nothing_removed(run: dict[str, Any]) -> None:
    for epoch in run["epochs"]:
        epoch.update(macs=LARGEST, atoms=1000, cut=None, rho=0.001, within_budget=True)
    run["result"]["limits"] = {}
    run["result"]["outcomes"][0]["costs"]["macs"] = LARGEST


def all_by_force(run: dict[str, Any]) -> None:
    for epoch in run["epochs"]:
        epoch["cut"] = {"removed": 600, "forced": 600} if epoch["epoch"] == 12 else None


def mostly_by_force(run: dict[str, Any]) -> None:
    run["epochs"][12]["cut"] = {"removed": 900, "forced": 880}


def mask_at_delivery(run: dict[str, Any]) -> None:
    run["result"]["figures"]["forced"] = 5000.0


def stale_statistics(run: dict[str, Any]) -> None:
    run["result"]["figures"]["valid_accuracy_running_statistics"] = 0.60


def bad_recalibration(run: dict[str, Any]) -> None:
    metrics(run).update(valid_accuracy=0.90, test_accuracy=0.90)


def optimistic_validation(run: dict[str, Any]) -> None:
    metrics(run)["test_accuracy"] = 0.92


def easy_test(run: dict[str, Any]) -> None:
    metrics(run)["test_accuracy"] = 0.985


def noisy_latency(run: dict[str, Any]) -> None:
    run["result"]["outcomes"][0]["costs"]["latency"] = {"noisy": True, "median_ms": 2.0, "iqr_ms": 0.9}


def still_improving(run: dict[str, Any]) -> None:
    for epoch in run["epochs"]:
        epoch["valid_accuracy"] = 0.5 + 0.015 * epoch["epoch"]


def past_its_best(run: dict[str, Any]) -> None:
    for epoch in run["epochs"][18:]:
        epoch["valid_accuracy"] = 0.9


def by_heart(run: dict[str, Any]) -> None:
    metrics(run).update(valid_accuracy=0.7, test_accuracy=0.7)
    run["result"]["figures"] = {}
    for epoch in run["epochs"]:
        epoch["valid_accuracy"] = 0.7 - 0.5 * 0.6 ** epoch["epoch"]
        epoch["train_accuracy"] = 0.99 if epoch["epoch"] >= 20 else 0.9


def diverging(run: dict[str, Any]) -> None:
    for epoch in run["epochs"][22:]:
        epoch["loss"] = 0.9


def no_learning(run: dict[str, Any]) -> None:
    metrics(run).update(valid_accuracy=0.11, test_accuracy=0.10)
    run["result"]["figures"] = {}


CASES: list[tuple[Callable[[dict[str, Any]], None], str, str, str, str]] = [
    (nothing_removed, "warning", "Nothing was removed", "whole supernet, 1,000,000 MACs", '--budget "macs<=0.5x"'),
    (all_by_force, "warning", "The penalty had no effect", "All 600 atoms .* 12 epochs", "--set rho=0.01 "),
    (mostly_by_force, "note", "The budget was met by the final mask", r"880 of the 1,450 .*61%", "--set rho=0.003 "),
    (mask_at_delivery, "note", "The budget was met by the final mask", r"5,000 of the 5,600", "--set rho=0.003 "),
    (stale_statistics, "note", "The running statistics were stale", r"60\.00 %.*95\.00 %", "--set ema_decay=0.92 "),
    (bad_recalibration, "warning", "Recalibration hurt", r"94\.90 % .* 90\.00 %", "--set recalibration_batches=16 "),
    (optimistic_validation, "warning", "Validation and test disagree", r"better .* 2\.7 binomial", "--seed 4 "),
    (easy_test, "note", "Validation and test disagree", r"worse .* quote both", "--seed 4 "),
    (
        noisy_latency,
        "warning",
        "The latency is too noisy to claim",
        r"0\.9 ms around a median of 2 ms",
        "verify runs/demo",
    ),
    (still_improving, "note", "Still improving at the end", r"3\.0 points better", "--set epochs=60 "),
    (
        past_its_best,
        "warning",
        "The best epochs are long ago",
        r"15 to 18 .* 94\.98 %.*90\.00 %",
        "--set weight_decay=0.0001 ",
    ),
    (by_heart, "note", "The training images are learned by heart", r"epoch 21 .* 70\.00 %", "--set epochs=20 "),
    (diverging, "warning", "The training loss rises again", r"0\.900 over the last 4", "--set lr=0.01 "),
    (no_learning, "warning", "The network learned nothing", r"11\.00 %; guessing .* 10\.00 %", "--set lr=0.01 "),
]


def test_a_healthy_run_raises_no_doubt() -> None:
    assert found(healthy()) == []


@pytest.mark.parametrize(
    ("change", "level", "title", "text", "command"), CASES, ids=[case[0].__name__ for case in CASES]
)
def test_each_check_fires_alone(
    change: Callable[[dict[str, Any]], None], level: str, title: str, text: str, command: str
) -> None:
    run = healthy()
    change(run)
    (finding,) = found(run)
    assert (finding.level, finding.title) == (level, title)
    assert re.search(text, finding.text), finding.text
    assert command.replace('"', "'") in finding.next_command + " "


@pytest.mark.parametrize("change", [case[0] for case in CASES], ids=[case[0].__name__ for case in CASES])
def test_every_command_can_be_typed(change: Callable[[dict[str, Any]], None]) -> None:
    run = healthy()
    change(run)
    for finding in found(run):
        program, verb, *words = shlex.split(finding.next_command)
        command = typer.main.get_command(app).commands[verb]  # type: ignore[attr-defined]
        options = {name for parameter in command.params for name in parameter.opts}
        assert program == "archsmith" and {word for word in words if word.startswith("--")} <= options
        for word in words:
            if "=" in word and "<=" not in word:
                name, _, value = word.partition("=")
                assert name in Settings.model_fields
                Settings.model_validate({name: value})
        if verb == "search":
            assert words[words.index("--config") + 1] == "runs/demo/config.yaml"
            assert words[words.index("--out") + 1] != "runs/demo"


def test_what_a_method_does_not_say_is_not_asked() -> None:
    run = healthy()
    for change, *_ in CASES:
        change(run)
    run["config"]["settings"] = {}
    bare = {"outcomes": [{"metrics": {}, "costs": {}}]}
    assert diagnose([], bare, {}) == []
    assert diagnose([{"epoch": epoch} for epoch in range(EPOCHS)], bare, {}) == []
    for finding in found(run):  # no settings known: commands name none
        assert "--set" not in finding.next_command


def test_a_given_architecture_is_not_asked_for_cuts() -> None:
    run = healthy()
    nothing_removed(run)
    run["config"]["architecture"] = {"blocks/1/k3": 4}
    assert found(run) == []


def test_trends_are_judged_on_the_final_network_only() -> None:
    run = healthy()
    for epoch in run["epochs"][:12]:
        epoch["valid_accuracy"] = 0.99  # the large network was better: no reason to train the small one shorter
    assert found(run) == []
    short = deepcopy(run)
    still_improving(short)
    short["epochs"] = short["epochs"][:20]  # eight epochs of the final network: too few for a trend
    assert found(short) == []


def test_warnings_come_first() -> None:
    run = healthy()
    mostly_by_force(run)
    noisy_latency(run)
    assert [finding.level for finding in found(run)] == ["warning", "note"]


@given(correct=st.integers(0, 500), examples=st.integers(1, 500))
def test_a_standard_error_is_never_zero(correct: int, examples: int) -> None:
    accuracy = min(correct, examples) / examples
    error = standard_error(accuracy, examples)
    assert 0 < error <= 0.5 / examples**0.5 + 1e-12
    assert error >= (accuracy * (1 - accuracy) / examples) ** 0.5 - 1e-12


def test_a_finding_counts_from_two_standard_errors() -> None:
    run = healthy()
    pooled = standard_error(0.94, 1000) * 2**0.5
    metrics(run)["test_accuracy"] = 0.95 - 1.9 * pooled
    assert found(run) == []
    metrics(run)["test_accuracy"] = 0.95 - 2.2 * pooled
    assert [finding.title for finding in found(run)] == ["Validation and test disagree"]


def choices(*, moved: float = 0.3, free: int = 1, lost: float = 0.0) -> list[Finding]:
    """Diagnose a search over choices that moved one probability, chose free operations and lost by the selection."""
    uniform, last = [[0.25] * 4] * 2, [[0.25 + moved, 0.25 - moved, 0.25, 0.25], [0.25] * 4]
    searching = [
        {
            "epoch": epoch,
            "loss": 1.0,
            "macs": 10,
            "valid_accuracy": 0.5,
            "within_budget": False,
            "probabilities": {
                "normal": uniform,
                "reduce": last if epoch else uniform,
                "normal_edges": [0.9 - 0.8 * epoch, 0.1 + 0.8 * epoch],  # say nothing about operations
            },
            "weightless": {"normal": free, "reduce": 8},
            "operations": {"normal": 8, "reduce": 8},
        }
        for epoch in range(2)
    ]
    run = healthy()
    run["result"]["figures"] = {"supernet_accuracy": 0.6, "selected_path_accuracy": 0.6 - lost}
    run["config"]["settings"] = {"search_epochs": 10, "logit_lr": 0.003, "lr": 0.1}
    epochs = [*searching, {"epoch": 2, "loss": 0.5, "macs": 10, "valid_accuracy": 0.9, "within_budget": True}]
    return diagnose(epochs, run["result"], run["config"], run="runs/demo")


def test_a_search_over_choices_is_asked_for_its_own_faults() -> None:
    assert choices() == []
    for change, title, command in (
        ({"moved": 0.004}, "The architecture was hardly searched", "--set logit_lr=0.03 "),
        ({"free": 6}, "The normal cell has hardly any weights", "--set search_epochs=5 "),
        ({"lost": 0.2}, "The selection cost the supernet accuracy", "--seed 4 "),
    ):
        (found,) = choices(**change)
        assert found.title == title and command in found.next_command
    assert choices(free=5) == []
    assert choices(lost=0.02) == []  # within two standard errors
