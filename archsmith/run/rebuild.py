"""Rebuilding a finished network from its files, and the tolerance to which it must agree.

The source is executed in a fresh process of the same Python in isolated mode (``-I``: no environment variables, no user
packages, no current folder), which proves that ``model.py`` and ``weights.safetensors`` need torch and nothing of ours.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from archsmith.core.errors import ArchsmithError
from archsmith.run import probe
from archsmith.run.constructor import Call, build

SOURCE_TOLERANCE = 1e-5
ONNX_TOLERANCE = 1e-4
_PROCESS_SECONDS = 600
_serial = itertools.count()


class RebuildError(ArchsmithError):
    """A file of a finished result cannot be read, built or run; the text names the file and the cause."""


def gap(expected: Tensor, actual: Tensor) -> tuple[float, float]:
    """Return the largest absolute difference, and the scale ``max(1, max|expected|)`` that tolerances multiply.

    The difference is infinite when shapes differ or either side holds a NaN.
    """
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    if expected.shape != actual.shape:
        return float("inf"), scale
    difference = float((expected.double() - actual.double()).abs().max()) if expected.numel() else 0.0
    return (difference if difference == difference else float("inf")), scale


def read_weights(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file on the CPU; nothing else is ever read as weights.

    Raises:
        RebuildError: The file is missing, damaged, or no safetensors file (a pickle, say, which is not touched).
    """
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise RebuildError(
            f"{path.name} is not a readable safetensors file ({error}); nothing was unpickled."
        ) from None


def rebuild_network(call: Call, weights: Path) -> nn.Module:
    """Return the network of a constructor tree with its weights, in eval mode and the default memory format.

    Raises:
        UserError: The tree cannot be built.
        RebuildError: The weights cannot be read or do not fit.
    """
    with torch.random.fork_rng(devices=[]):  # the random weights of a new network are not the caller's business
        network = build(call)
    return _load_weights(network, weights)


def _load_weights(network: nn.Module, path: Path) -> nn.Module:
    """Put the weights of a safetensors file into ``network``, switch it to eval mode and return it."""
    weights = read_weights(path)
    try:
        network.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise RebuildError(f"{path.name} does not fit the network: {_last_line(str(error))}") from None
    return network.eval()


def execute_source(text: str, weights: Path) -> nn.Module:
    """Return the network of a ``model.py`` text, in this process, with its weights and in eval mode.

    This executes ``text``: only hand over source that archsmith wrote or that the user trusts.

    Raises:
        RebuildError: The source fails, or the weights do not fit.
    """
    module = types.ModuleType(f"{probe.MODULE}_{next(_serial)}")
    sys.modules[module.__name__] = module  # where classes look for their own module
    try:
        with torch.random.fork_rng(devices=[]):
            exec(compile(text, "model.py", "exec"), module.__dict__)
            network = module.build()
    except Exception as error:
        raise RebuildError(f"model.py cannot be built: {type(error).__name__}: {error}") from error
    finally:
        del sys.modules[module.__name__]
    return _load_weights(network, weights)


def run_fresh(text: str, weights: Path, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the logits that a ``model.py`` text gives in a fresh process which imports torch and safetensors only.

    Args:
        text: Source; it is executed, so only hand over what archsmith wrote or the user trusts.
        weights: Its safetensors file.
        inputs: Named batches (B, C, H, W), float32.

    Returns:
        For each name the logits (B, classes) of the whole batch, and under ``name/single`` those of its examples one by
        one.

    Raises:
        RebuildError: The process failed; its last line is the cause.
    """
    with tempfile.TemporaryDirectory(prefix="archsmith-") as folder:
        given, found = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        save_file({name: batch.contiguous() for name, batch in inputs.items()}, given)
        request = {
            "weights": str(weights.resolve()),
            "inputs": str(given),
            "outputs": str(found),
            "threads": torch.get_num_threads(),
        }
        try:
            done = subprocess.run(
                [sys.executable, "-I", probe.__file__],
                input=f"{json.dumps(request)}\n{text}".encode(),
                capture_output=True,
                cwd=folder,
                timeout=_PROCESS_SECONDS,
                start_new_session=True,  # Ctrl-C in a terminal is for us: it asks to stop, and not to break this check
            )
        except subprocess.TimeoutExpired:
            raise RebuildError(f"model.py did not finish within {_PROCESS_SECONDS} s in a fresh process.") from None
        if done.returncode != 0:
            cause = _last_line(done.stderr.decode(errors="replace")) or f"exit status {done.returncode}"
            raise RebuildError(f"model.py fails in a fresh process: {cause}")
        return load_file(found)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
