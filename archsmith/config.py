"""The complete configuration of a run: what ``config.yaml`` holds, and all that a run depends on besides its data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from archsmith.core.errors import Shown, UserError

Model = TypeVar("Model", bound=BaseModel)


class Runtime(BaseModel):
    """How a run computes; part of its state, because it decides the bits.

    Attributes:
        threads: Threads inside operators.
        memory_format: Format of images and weights while training.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    threads: int = Field(ge=1)
    memory_format: Literal["channels_last", "contiguous"] = "channels_last"


class RunConfig(BaseModel):
    """Everything that determines a run.

    Attributes:
        method: Slug of the method.
        task: "name", "data" (path or None) and the task's options; ``open_task(**task)`` opens it.
        task_digest: Digest of its data and split.
        family: "name" and the family's options.
        budget: Limits as written by the user, or None.
        seed: Seed of every random stream.
        settings: The method's hyper-parameters, complete.
        runtime: See ``Runtime``.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    method: str
    task: dict[str, Any]
    task_digest: str
    family: dict[str, Any]
    budget: str | None = None
    seed: int = Field(0, ge=0)
    settings: dict[str, Any] = Field(default_factory=dict)
    runtime: Runtime


def validated(model: type[Model], values: Mapping[str, Any], *, field: str) -> Model:
    """Return ``model(**values)``, with pydantic's complaint as one clear paragraph.

    Args:
        model: A pydantic model.
        values: Its fields.
        field: What the user calls the whole (``settings``, ``config``); the wrong field's path is appended.

    Raises:
        UserError: A field is unknown, missing or out of bounds.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        problem = error.errors()[0]
        path = ".".join([field, *(str(part) for part in problem["loc"])])
        known = ", ".join(model.model_fields)
        if problem["type"] == "extra_forbidden":
            raise UserError(path, Shown("an unknown field"), allowed=f"{known}") from error
        given = problem["input"] if problem["loc"] and problem["type"] != "missing" else Shown("these values")
        raise UserError(path, given, allowed=problem["msg"][0].lower() + problem["msg"][1:]) from error
