"""The complete configuration of a run: what ``config.yaml`` holds, and all that a run depends on besides its data."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from archsmith.core.errors import Shown, UserError

Model = TypeVar("Model", bound=BaseModel)

FORMAT_VERSION = 1
"""Of ``config.yaml``, ``result.json`` and the journal."""


class Runtime(BaseModel):
    """How a run computes; part of its state, because it decides the bits.

    Attributes:
        threads: Threads inside operators.
        memory_format: Format of images and weights while training.
        processes: Processes that share every batch, started by ``torchrun``.
        micro_batches: Parts of its share that each process computes one after another.
        device: Where training takes place.
        precision: "bf16" trains under autocast; the exported network is float32 all the same.
        compile: Whether ``torch.compile`` runs the training forward.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(ge=1)
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"
    processes: int = Field(1, ge=1)
    micro_batches: int = Field(1, ge=1)
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["float32", "bf16"] = "float32"
    compile: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values; what came later than the format is left out where it has its default."""
        later = ("processes", "micro_batches", "device", "precision", "compile")
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return {k: v for k, v in self.model_dump().items() if k not in later or v != defaults[k]}


def _named(section: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(section.get("name"), str):
        raise ValueError("a section with a name")
    return section


Section = Annotated[dict[str, Any], AfterValidator(_named)]


class RunConfig(BaseModel):
    """Everything that determines a run.

    Attributes:
        method: Slug of the method.
        task: "name", "data" (path or None) and the task's options; ``open_task(**task)`` opens it.
        task_digest: Digest of its data and split; empty only in a file for ``archsmith.search_file``.
        family: "name" and the family's options.
        budget: Limits as written by the user, or None.
        seed: Seed of every random stream.
        settings: The method's hyper-parameters, complete.
        runtime: See ``Runtime``.
        architecture: Decisions by path of the one architecture that is trained instead of searching, or None.
        latency: Where latency is measured, the fields of ``archsmith.cost.Deployment``; None where the method has no
            choice, or for torch on the CPU.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    task: Section
    task_digest: str = ""
    family: Section
    budget: str | None = None
    seed: int = Field(0, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    runtime: Runtime
    architecture: dict[str, Any] | None = None
    latency: dict[str, Any] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values; what came later than the format is left out where it is None."""
        later = ("architecture", "latency")
        values = {k: v for k, v in self.model_dump().items() if k not in later or v is not None}
        return {**values, "runtime": self.runtime.to_json()}


def validated(model: type[Model], values: Mapping[str, Any], *, field: str) -> Model:
    """Return ``model(**values)``, with pydantic's complaint as one clear paragraph.

    Args:
        model: A pydantic model.
        values: Its fields.
        field: What the user calls the whole (``settings``, ``config``); the wrong field's path is appended.

    Raises:
        UserError: A field is unknown, missing, out of bounds, NaN or infinite.
    """
    for path, number in _floats(values, field):
        if not math.isfinite(number):
            raise UserError(path, number, allowed="a finite number")
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join([field, *(str(part) for part in problem["loc"])])
        known = ", ".join(model.model_fields)
        if problem["type"] == "extra_forbidden":
            raise UserError(path, Shown("an unknown field"), allowed=f"{known}") from error
        given = problem["input"] if problem["loc"] and problem["type"] != "missing" else Shown("these values")
        message = problem["msg"].removeprefix("Value error, ")
        raise UserError(path, given, allowed=message[0].lower() + message[1:]) from error


def read_config(path: str | Path) -> RunConfig:
    """Return the configuration in a file such as ``RUN/config.yaml``.

    Raises:
        UserError: The file is missing, no YAML, of a newer version, or a field of it is wrong.
    """
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        cause = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise UserError("config", Shown(f"{path} ({cause})"), allowed="a config.yaml that can be read") from error
    if not isinstance(values, dict):
        raise UserError("config", Shown(f"{path}, which holds no settings"), allowed="a config.yaml of a run")
    version = values.pop("format_version", FORMAT_VERSION)
    if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
        raise UserError("config.format_version", version, allowed=f"1 to {FORMAT_VERSION}")
    return validated(RunConfig, values, field="config")


def _floats(value: Any, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _floats(inner, f"{path}[{index}]")
    elif isinstance(value, float):
        yield path, value
