"""A small space, strategies and evaluators for tests of studies; other processes import them."""

import ctypes
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from archsmith.space import Architecture, Categorical, Objective, Ordinal, ProductSpace, Result, Trial
from archsmith.strategies import Proposal, Strategy
from archsmith.strategies.base import DEFAULT_OBJECTIVE

SPACE = ProductSpace(
    "toy", {"op": Categorical(["conv", "pool", "skip"]), "kernel": Ordinal([3, 5, 7, 9]), "width": Ordinal([8, 16, 32])}
)


def score(architecture: Any) -> float:
    return (
        ("pool", "skip", "conv").index(architecture["op"]) + architecture["kernel"] / 10 + architecture["width"] / 100
    )


@dataclass
class Quick:
    """Scores a toy architecture; writes each evaluation to a file when there is one."""

    log: str | None = None
    sleep: float = 0.0

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        if self.log is not None:
            with open(self.log, "a", encoding="utf-8") as stream:
                stream.write(f"{trial.id} {os.getpid()}\n")
        if self.sleep:
            time.sleep(self.sleep * (1 + trial.id % 3))
        return Result(metrics={"valid_accuracy": score(trial.architecture)}, seconds=10.0)


@dataclass
class Misbehaving:
    """What goes wrong by trial id: ``{2: "raise", 3: "hang"}``; all others score."""

    faults: dict[int, str]

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        fault = self.faults.get(trial.id)
        if fault == "raise":
            raise ArithmeticError("loss diverged")
        if fault == "exit":
            os._exit(3)
        if fault == "sys.exit":
            raise SystemExit(4)
        if fault == "segfault":
            ctypes.string_at(0)
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            time.sleep(3600)
        if fault == "memory":
            bytearray(1 << 32)
        if fault == "nan":
            return Result(metrics={"valid_accuracy": float("nan")})
        if fault == "unsendable":
            return Unsendable()
        if fault == "nothing":
            return None  # type: ignore[return-value]
        return Result(metrics={"valid_accuracy": score(trial.architecture)}, seconds=1.0)


class Unsendable(Result):
    def __reduce__(self) -> Any:
        raise TypeError("this result stays here")


@dataclass
class KillsItselfOnce:
    """Dies of a real SIGKILL in the middle of one evaluation, the first time only (a file remembers)."""

    marker: str
    victim: int

    def evaluate(self, trial: Trial, *, weights: object = None) -> Result:
        time.sleep(0.01 * (1 + trial.id % 3))
        if trial.id == self.victim and not Path(self.marker).exists():
            Path(self.marker).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return Result(metrics={"valid_accuracy": score(trial.architecture)}, seconds=1.0)


def wait_for_the_end_of(pids: Iterable[int], seconds: float = 10.0) -> None:
    limit = time.monotonic() + seconds
    while alive := [pid for pid in pids if _is_alive(pid)]:
        assert time.monotonic() < limit, f"still alive: {alive}"
        time.sleep(0.01)


def _is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


class Climber(Strategy):
    """Mutates the best architecture told so far; what it asks depends on every result and on their order."""

    def __init__(self, space: Any = SPACE, *, objectives: Any = (DEFAULT_OBJECTIVE,), seed: int = 0) -> None:
        super().__init__(space, objectives=objectives, seed=seed)
        self.best: tuple[float, Any] | None = None

    def _propose(self) -> Proposal:
        if self.best is None or self.rng.random() < 0.2:
            return Proposal(self.space.sample(self.rng))
        return Proposal(self.space.mutate(self.best[1], self.rng), info={"told": self.told})

    def _learn(self, trial: Trial, result: Result) -> None:
        value = self.objective.value(result)
        self.rng.random()  # the order of results matters even where none is better
        if value == value and (self.best is None or value >= self.best[0]):
            self.best = (value, trial.architecture)

    def _state(self) -> dict[str, Any]:
        return {"best": None if self.best is None else [self.best[0], self.best[1].to_json()]}

    def _load(self, state: Any) -> None:
        if state["best"] is not None:
            whole = self.space.validate(Architecture.from_json(state["best"][1]))
            self.best = (state["best"][0], whole)


class Generations(Strategy):
    """Asks three at a time and waits until all are told, ``rounds`` times; then it is done."""

    def __init__(self, rounds: int, seed: int = 0) -> None:
        super().__init__(SPACE, objectives=(Objective("valid_accuracy"),), seed=seed)
        self.rounds = rounds

    def _propose(self) -> Proposal | None:
        architecture = self.space.sample(self.rng)  # drawn also when nothing comes of it: an ask too many shows
        full = self.asked % 3 == 0 and self.pending
        return None if full or self.asked >= 3 * self.rounds else Proposal(architecture)

    @property
    def done(self) -> bool:
        return self.asked >= 3 * self.rounds
