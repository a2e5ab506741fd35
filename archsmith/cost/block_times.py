"""Runtimes of the layers of a residual model on this device, for the load that its children are to carry.

A layer is timed alone, called as the parent calls it: for *prefill* on ``batch`` sequences of ``prefill`` tokens, for
*generation* on one new token of each, behind its own key-value cache of the prefill's length (a cache grows while it is
used: long generations take more than predicted). Whole models are timed in the same interleaved rounds, so that what
lies outside of the layers is the difference.
"""

from __future__ import annotations

import copy
import inspect
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from archsmith.core.errors import Shown, UserError
from archsmith.cost.backends import Precision
from archsmith.cost.latency import Latency, measure_many
from archsmith.cost.timing import NOISY_SPREAD, quartile_range

_CACHE_NAMES = ("cache", "past_key_values")


@dataclass(frozen=True)
class Load:
    """What a model has to do at once.

    Attributes:
        batch: Sequences at once.
        prefill: Tokens of each that are read in one pass.
        generation: Tokens that are generated after them, one by one; 0 for encoders.
        precision: "fp32" or "bf16".
        threads: Threads inside operators.
        rounds: Interleaved rounds behind every median.
    """

    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    batch: int = 1
    prefill: int = 32
    generation: int = 0
    precision: Precision = "fp32"
    threads: int = 1
    rounds: int = 10

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("prefill", 1), ("generation", 0), ("threads", 1), ("rounds", 10)):
            if getattr(self, name) < least:
                raise UserError(name, getattr(self, name), allowed=f"an integer from {least}")

    @property
    def sequence(self) -> int:
        """Tokens of a sequence at its end: what the cache holds at most."""
        return self.prefill + self.generation


@dataclass(frozen=True)
class Phases:
    """How the parent calls its layers under a load: arguments by layer for prefill and for one generated token."""

    prefill: Mapping[int, tuple[tuple[Any, ...], Mapping[str, Any]]]
    token: Mapping[int, tuple[tuple[Any, ...], Mapping[str, Any]]] | None


class _Call(nn.Module):
    """A module with its arguments, called with something to be ignored."""

    def __init__(self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> None:
        super().__init__()
        if any(p.dtype != dtype for p in module.parameters() if p.is_floating_point()):
            module = copy.deepcopy(module).to(dtype)
        self.module = module
        self.args, self.kwargs = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (tuple(args), dict(kwargs))
        )

    def forward(self, ignored: Tensor) -> Any:
        """Return what the module returns for its arguments."""
        return self.module(*self.args, **self.kwargs)


class _Token(_Call):
    """One generated token: the cache is cut back to its length before each call."""

    def __init__(
        self, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype, length: int
    ) -> None:
        super().__init__(module, args, kwargs, dtype)
        self.length = length

    def forward(self, ignored: Tensor) -> Any:
        """Return what the module returns for the next token."""
        cache = next((value for value in self.kwargs.values() if _is_cache(value)), None)
        for layer in getattr(cache, "layers", ()):
            keys = getattr(layer, "keys", None)
            if isinstance(keys, Tensor) and keys.dim() == 4 and keys.shape[-2] > self.length:
                layer.keys, layer.values = (t[..., : self.length, :] for t in (keys, layer.values))
        return super().forward(ignored)


def model_call(model: nn.Module, load: Load, words: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Return random token ids for one prefill of ``load``, by keyword of a model of transformers."""
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(min(3, words - 1), words, (load.batch, load.prefill), generator=generator)}


def phases_of(parent: nn.Module, layer_paths: Sequence[str], batch: Any, load: Load) -> Phases:
    """Record how the parent calls its layers.

    Args:
        parent: The model.
        layer_paths: Module path of every layer.
        batch: One call of the model: keywords of a mapping, or one tensor.
        load: The load; with ``generation`` the model has to take and return ``past_key_values``.

    Raises:
        UserError: Generation is asked of a model that keeps no cache.
    """
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else (batch,)
    if not load.generation:
        if hasattr(getattr(parent, "config", None), "use_cache"):
            kwargs["use_cache"] = False
        return Phases(_recorded(parent, layer_paths, args, kwargs)[0], None)
    kwargs = {**kwargs, "use_cache": True}
    prefill, output = _recorded(parent, layer_paths, args, kwargs)
    cache = next((found for name in _CACHE_NAMES if (found := getattr(output, name, None)) is not None), None)
    if cache is None:
        raise UserError(
            "generation",
            Shown(f"{load.generation} tokens of {type(parent).__name__}, which returns no past_key_values"),
            allowed="0 for models without a key-value cache",
        )
    ids = kwargs["input_ids"][:, -1:]
    token, _ = _recorded(parent, layer_paths, (), {"input_ids": ids, _cache_name(parent): cache, "use_cache": True})
    return Phases(prefill, token)


def _recorded(
    parent: nn.Module, layer_paths: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[dict[int, tuple[tuple[Any, ...], dict[str, Any]]], Any]:
    calls: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def note(index: int) -> Any:
        def hook(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            calls[index] = (given, dict(named))

        return hook

    handles = [
        parent.get_submodule(path).register_forward_pre_hook(note(index), with_kwargs=True)
        for index, path in enumerate(layer_paths)
    ]
    try:
        with torch.no_grad():
            output = parent(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, output


def measure_layers(
    variants: Mapping[str, tuple[int, nn.Module]],
    models: Mapping[str, nn.Module],
    phases: Phases,
    batch: Any,
    load: Load,
) -> dict[str, dict[str, Latency]]:
    """Measure layers and whole models in the same interleaved rounds.

    Args:
        variants: By name the number of a layer and the module in its place.
        models: Whole models by name.
        phases: How the parent calls its layers.
        batch: The call of whole models.
        load: The load.

    Returns:
        By name "prefill" and, with generation, "token": milliseconds of one pass, and of one generated token.
    """
    dtype = torch.bfloat16 if load.precision == "bf16" else torch.float32
    kwargs = dict(batch) if isinstance(batch, Mapping) else {}
    args = () if isinstance(batch, Mapping) else (batch,)
    if _takes_cache(models):
        kwargs["use_cache"] = False
    prefill: dict[str, nn.Module] = {}
    token: dict[str, nn.Module] = {}
    for name, (index, layer) in variants.items():
        given, named = phases.prefill[index]
        prefill[name] = _Call(layer, given, _with_cache(named, None), dtype)
        if phases.token is not None:
            token[name] = _token_call(layer, (given, named), phases.token[index], dtype, load)
    for name, model in models.items():
        prefill[f"model {name}"] = _Call(model, args, kwargs, dtype)
        if phases.token is not None:
            token[f"model {name}"] = _model_token(model, kwargs, dtype, load)
    found: dict[str, dict[str, Latency]] = {name: {} for name in prefill}
    for phase, targets in (("prefill", prefill), ("token", token)):
        if targets:
            measured = measure_many(
                targets,
                torch.zeros(load.batch, load.prefill if phase == "prefill" else 1),
                threads=load.threads,
                rounds=load.rounds,
                warmup=2,
                block_ms=2.0,
                precision=load.precision,
            )
            for name, latency in measured.items():
                found[name][phase] = latency
    return found


def load_rounds(phases: Mapping[str, Latency], load: Load) -> list[float]:
    """Return the runtime of the load in ms, round by round: a prefill and ``generation`` tokens."""
    prefill = phases["prefill"].samples_ms
    token = phases["token"].samples_ms if load.generation else (0.0,) * len(prefill)
    return [p + load.generation * t for p, t in zip(prefill, token, strict=True)]


def of_parent(rows: Mapping[str, Mapping[str, Latency]], name: str, load: Load) -> list[float]:
    """Return the load's runtime of a row divided by the parent's beside it, round by round.

    What slows a whole round, another process say, slows both and leaves the ratio alone.
    """
    parent = load_rounds(rows["model parent"], load)
    return [mine / beside for mine, beside in zip(load_rounds(rows[name], load), parent, strict=True)]


def steadiest_layers(
    measure: Callable[[], dict[str, dict[str, Latency]]], load: Load, *, attempts: int = 3
) -> dict[str, dict[str, Latency]]:
    """Measure until the ratios to the parent are steady (median IQR / median at most 0.1), or take the steadiest.

    Args:
        measure: As ``measure_layers`` returns it, with "model parent" among the models.
        load: The load.
        attempts: Most measurements.
    """
    found: list[tuple[float, dict[str, dict[str, Latency]]]] = []
    while len(found) < attempts and (not found or found[-1][0] > NOISY_SPREAD):
        rows = measure()
        ratios = [of_parent(rows, name, load) for name in rows if name != "model parent"] or [
            load_rounds(rows["model parent"], load)
        ]
        found.append((statistics.median(quartile_range(r) / statistics.median(r) for r in ratios), rows))
    return min(found, key=lambda each: each[0])[1]


def _takes_cache(models: Mapping[str, nn.Module]) -> bool:
    return any(hasattr(getattr(model, "config", None), "use_cache") for model in models.values())


def _cache_name(model: nn.Module) -> str:
    """Return how a model calls the argument of its key-value cache: transformers renamed it."""
    known = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in known), _CACHE_NAMES[-1])


def _is_cache(value: object) -> bool:
    return hasattr(value, "get_seq_length")


def _with_cache(kwargs: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """Return a layer's arguments with another cache (or None), under whatever name the model gives it."""
    return {name: cache if _is_cache(value) else value for name, value in kwargs.items()}


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


def _token_call(
    layer: nn.Module,
    prefill: tuple[tuple[Any, ...], Mapping[str, Any]],
    token: tuple[tuple[Any, ...], Mapping[str, Any]],
    dtype: torch.dtype,
    load: Load,
) -> nn.Module:
    """Return the call for one token of a layer, with a cache that the layer itself filled."""
    cache = _new_cache()
    filled = _Call(layer, prefill[0], _with_cache(prefill[1], cache), dtype)
    with torch.no_grad():
        filled(torch.zeros(1))
    return _Token(filled.module, token[0], _with_cache(token[1], cache), dtype, load.prefill)


def _model_token(model: nn.Module, kwargs: Mapping[str, Any], dtype: torch.dtype, load: Load) -> nn.Module:
    cache = _new_cache()
    filled = _Call(model, (), {**kwargs, "use_cache": True, _cache_name(model): cache}, dtype)
    with torch.no_grad():
        filled(torch.zeros(1))
    call = {"input_ids": kwargs["input_ids"][:, -1:], "use_cache": True, _cache_name(model): cache}
    return _Token(filled.module, (), call, dtype, load.prefill)


def runtime_ms(medians: Mapping[str, float], load: Load) -> float:
    """Return milliseconds of the whole load: one prefill and every generated token.

    Args:
        medians: "prefill" and, with generation, "token", in milliseconds.
        load: The load.
    """
    return medians["prefill"] + load.generation * medians.get("token", 0.0)
