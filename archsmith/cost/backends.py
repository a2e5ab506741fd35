"""What runs a network while it is timed: eager torch, or ONNX Runtime on the CPU.

A backend turns a target into a *run*: a function that makes the given number of calls and returns when the last result
is there. Everything that is not the network's own work (copies, conversions, sessions) happens before the first call.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.cost.timing import Clock, Run
from archsmith.graph import Inputs, evaluating

Backend = Literal["torch", "onnxruntime"]
Precision = Literal["fp32", "bf16"]
Target = nn.Module | str | Path | bytes

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@contextmanager
def threads_pinned(threads: int) -> Iterator[None]:
    """Let torch use ``threads`` threads inside operators; the number before is restored.

    Raises:
        UserError: ``threads`` is not positive.
    """
    if threads < 1:
        raise UserError("threads", threads, allowed="at least 1")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def torch_run(
    module: nn.Module, inputs: Inputs, *, precision: Precision, device: str, cuda_graph: bool = False
) -> Iterator[Run]:
    """Yield a run of ``module`` in evaluation mode under ``torch.inference_mode``.

    Args:
        module: Network; used in place when it has the precision and the device already (its mode is restored),
            otherwise a copy is converted and the network stays as it is.
        inputs: One tensor or a tuple of arguments; floating tensors are converted to the precision.
        precision: ``fp32`` or ``bf16``, of weights and activations alike.
        device: Where to run; on CUDA the run ends with a synchronisation.
        cuda_graph: Capture one call as a CUDA graph, on the inputs given, and replay it.
    """
    dtype, place = _DTYPES[precision], torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    floating = [t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()]
    if any(tensor.device.type == "meta" for tensor in floating):
        raise UserError("target", Shown("a network on the meta device"), allowed="a network with real weights")
    if any(tensor.dtype != dtype or tensor.device != place for tensor in floating):
        module = copy.deepcopy(module).to(device=place, dtype=dtype)
    arguments = tuple(inputs) if isinstance(inputs, tuple | list) else (inputs,)
    arguments = tree_map_only(Tensor, lambda t: t.to(place, dtype if t.is_floating_point() else t.dtype), arguments)

    def run(calls: int) -> None:
        with torch.inference_mode():
            for _ in range(calls):
                module(*arguments)
            if place.type == "cuda":
                torch.cuda.synchronize(place)

    with evaluating(module):
        if not cuda_graph:
            yield run
            return
        with torch.inference_mode():
            graph = _captured(module, arguments, place)

        def replay(calls: int) -> None:
            for _ in range(calls):
                graph.replay()
            torch.cuda.synchronize(place)

        yield replay


def _captured(module: nn.Module, arguments: tuple[Any, ...], place: torch.device) -> torch.cuda.CUDAGraph:
    """Return one call as a CUDA graph; libraries choose their kernels in the calls on a side stream before."""
    with torch.cuda.device(place):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                module(*arguments)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            module(*arguments)
    return graph


def cuda_clock(device: str) -> Clock:
    """Return a clock in seconds that runs on the GPU: the time between events on its stream."""
    start = torch.cuda.Event(enable_timing=True)
    stream = torch.cuda.current_stream(device)
    start.record(stream)

    def clock() -> float:
        event = torch.cuda.Event(enable_timing=True)
        event.record(stream)
        event.synchronize()
        return start.elapsed_time(event) / 1e3

    return clock


def onnx_run(model: str | Path | bytes, inputs: Inputs, *, threads: int) -> Run:
    """Return a run of an ONNX model in ONNX Runtime on the CPU, with the precision that the file has.

    Args:
        model: Path or content of an ``.onnx`` file.
        inputs: Tensors in the order of the model's inputs.
        threads: Threads inside operators; operators run one after another.

    Raises:
        MissingExtra: onnxruntime is not installed.
        UserError: No such file, not an ONNX model, or inputs that do not fit it.
    """
    session = onnx_session(model, threads=threads)
    feed = onnx_feed(session, inputs)

    def run(calls: int) -> None:
        for _ in range(calls):
            session.run(None, feed)

    return run


def import_onnxruntime() -> Any:
    """Return the module ``onnxruntime``, or raise ``MissingExtra``."""
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx", "Running ONNX files") from error
    return onnxruntime


def onnx_session(model: str | Path | bytes, *, threads: int, profile_prefix: str | None = None) -> Any:
    """Return an ``onnxruntime.InferenceSession`` on the CPU with all graph optimisations.

    Args:
        model: Path or content of an ``.onnx`` file.
        threads: Threads inside operators.
        profile_prefix: Write ONNX Runtime's own profile to a file whose name begins so.
    """
    onnxruntime = import_onnxruntime()
    if not isinstance(model, bytes) and not os.path.isfile(model):
        raise UserError("target", str(model), allowed="an existing .onnx file")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # Idle workers of one session must not spin on the cores while it is the turn of another.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.log_severity_level = 3
    if profile_prefix is not None:
        options.enable_profiling = True
        options.profile_file_prefix = profile_prefix
    source = model if isinstance(model, bytes) else os.fspath(model)
    try:
        return onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    except Exception as error:
        shown = f"{len(model)} bytes" if isinstance(model, bytes) else str(model)
        raise UserError(
            "target", Shown(f"{shown}, which ONNX Runtime refuses ({str(error).strip()})"), allowed="an ONNX model"
        ) from error


def onnx_feed(session: Any, inputs: Inputs) -> dict[str, np.ndarray[Any, Any]]:
    """Return the arrays that ``session`` takes, by input name; shapes are compared with what the model declares."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    declared = session.get_inputs()
    expected = ", ".join(f"{value.name} {value.shape}" for value in declared)
    fits = len(tensors) == len(declared) and all(
        len(value.shape) == tensor.dim()
        and all(not isinstance(want, int) or want == got for want, got in zip(value.shape, tensor.shape, strict=True))
        for value, tensor in zip(declared, tensors, strict=True)
    )
    if not fits:
        raise UserError("inputs", [tuple(tensor.shape) for tensor in tensors], allowed=expected)
    return {
        value.name: np.ascontiguousarray(tensor.detach().cpu().numpy())
        for value, tensor in zip(declared, tensors, strict=True)
    }
