"""What a searched latency is a latency of: a network made ready for a device, a precision and a number of threads.

A ``Deployment`` is what a user asks for. ``ready`` turns a network that was taken out of its supernet into what really
runs there: the module itself, or its exported file, quantised where that is asked. Latency and accuracy of the search
are those of the thing that comes out.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from archsmith.core.errors import MissingExtra, Shown, UserError
from archsmith.cost.backends import Backend, Target, import_onnxruntime, onnx_session
from archsmith.cost.latency import Latency, measure_latency
from archsmith.cost.layer_times import LayerTime, layer_times
from archsmith.cost.onnx_export import export_onnx
from archsmith.cost.onnx_layers import load_onnx, onnx_layers
from archsmith.cost.quantise_onnx import quantise_onnx, quantise_onnx_dynamically
from archsmith.cost.ranges import activation_ranges
from archsmith.space.quantisation import LayerPolicy

LatencyDevice = Literal["cpu", "onnxruntime", "cuda"]
LatencyPrecision = Literal["fp32", "bf16", "int8-dynamic", "int8-static"]

PRECISIONS: Mapping[str, tuple[str, ...]] = {
    "cpu": ("fp32", "bf16"),
    "onnxruntime": ("fp32", "int8-dynamic", "int8-static"),
    "cuda": ("fp32", "bf16"),
}
"""What each device can run: ONNX Runtime has no bf16 kernels for the CPU, eager torch no int8 for whole networks."""


@dataclass(frozen=True)
class Deployment:
    """Where a network is going to run.

    Args:
        device: "cpu" (eager torch), "onnxruntime" (its CPU provider, on the exported file), or "cuda" (eager torch,
            timed by events on the GPU).
        precision: "fp32"; "bf16" with torch; "int8-dynamic" (activations quantised anew in every call) or "int8-static"
            (calibrated on training examples) with ONNX Runtime.
        threads: Threads inside operators.

    Raises:
        UserError: Unknown words, a precision that the device does not have, or no positive number of threads.
    """

    device: LatencyDevice = "cpu"
    precision: LatencyPrecision = "fp32"
    threads: int = 1

    def __post_init__(self) -> None:
        if self.device not in PRECISIONS:
            raise UserError("latency device", self.device, allowed=", ".join(PRECISIONS))
        if self.precision not in get_args(LatencyPrecision):
            raise UserError("latency precision", self.precision, allowed=", ".join(get_args(LatencyPrecision)))
        if self.precision not in PRECISIONS[self.device]:
            others = [device for device, known in PRECISIONS.items() if self.precision in known]
            raise UserError(
                "latency precision",
                Shown(f"{self.precision} on {self.device}"),
                allowed=f"{', '.join(PRECISIONS[self.device])} on {self.device}",
                hint=f"{self.precision} runs on {' and '.join(others)}.",
            )
        if isinstance(self.threads, bool) or not isinstance(self.threads, int) or self.threads < 1:
            raise UserError("latency threads", self.threads, allowed="an integer from 1")

    @property
    def backend(self) -> Backend:
        """What runs the network."""
        return "onnxruntime" if self.device == "onnxruntime" else "torch"

    @property
    def place(self) -> str:
        """The device in torch's words."""
        return "cuda" if self.device == "cuda" else "cpu"

    @property
    def quantised(self) -> bool:
        """Whether the network runs from a file of its own beside that in fp32."""
        return self.precision.startswith("int8")

    def check(self) -> None:
        """Refuse what this machine does not have, before anything is trained.

        Raises:
            UserError: No CUDA device, or more threads than there are cores for this process.
            MissingExtra: onnx or onnxruntime is not installed.
        """
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError(
                "latency device",
                Shown("cuda, but torch finds no CUDA device here"),
                allowed="cpu, or onnxruntime",
                hint="Measure where the network is going to run: the latency of another device says little.",
            )
        if self.device == "onnxruntime":
            import_onnxruntime()
            try:
                import onnx  # noqa: F401
            except ImportError as error:
                raise MissingExtra("onnx", "onnx", "Exporting networks to measure them") from error
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if self.device != "cuda" and self.threads > cores:
            raise UserError("latency threads", self.threads, allowed=f"1 to {cores}, the cores of this process")

    def ready(self, network: nn.Module, calibration: Tensor) -> Deployed:
        """Return a network as it runs here.

        Args:
            network: A network of its own in evaluation mode, on the CPU in float32; it is only read.
            calibration: Training inputs (N, ...), N at least 2, as validation inputs come; "int8-static" takes the
                ranges of activations from them.
        """
        if self.backend == "torch":
            return Deployed(self, network.eval())
        return self.of_file(bytes(export_onnx(network, calibration[:2]).SerializeToString()), calibration)

    def of_file(self, content: bytes, calibration: Tensor) -> Deployed:
        """Return an exported fp32 file as it runs here; see ``ready``."""
        layers = tuple((layer.name, layer.node) for layer in onnx_layers(content))
        if self.precision == "int8-dynamic":
            file = quantise_onnx_dynamically(content)
        elif self.precision == "int8-static":
            policy = {name: LayerPolicy("int8") for name, _ in layers}
            file = quantise_onnx(content, policy, activation_ranges(load_onnx(content), [calibration]))
        else:
            return Deployed(self, content, layers)
        return Deployed(self, file.content, layers, file.note)

    def to_json(self) -> dict[str, Any]:
        """Return the three fields; ``Deployment(**data)`` is the way back."""
        return asdict(self)

    def __str__(self) -> str:
        name = {"cpu": "torch on the CPU", "onnxruntime": "ONNX Runtime on the CPU", "cuda": "torch on CUDA"}
        threads = "" if self.device == "cuda" else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{name[self.device]}, {self.precision}{threads}"


@dataclass(frozen=True)
class Deployed:
    """A network as it runs.

    Args:
        deployment: Where.
        target: The module, or the content of its ONNX file.
        layers: (layer, node) pairs of the fp32 file, for ``layer_times``.
        note: How it was quantised.
    """

    deployment: Deployment
    target: Target
    layers: tuple[tuple[str, str], ...] = ()
    note: str = ""

    def measure(self, example: Tensor, *, rounds: int = 10, block_ms: float = 5.0) -> Latency:
        """Return the latency of one input (with its batch axis), in interleaved rounds beside the reference network."""
        to = self.deployment
        return measure_latency(
            self.target,
            example,
            backend=to.backend,
            precision="bf16" if to.precision == "bf16" else "fp32",
            device=to.place,
            threads=to.threads,
            rounds=rounds,
            block_ms=block_ms,
        )

    def forward(self) -> Callable[[Tensor], Tensor]:
        """Return what computes logits (float32, on the CPU) in the precision in which the network runs."""
        if isinstance(self.target, nn.Module):
            dtype = torch.bfloat16 if self.deployment.precision == "bf16" else torch.float32
            network = copy.deepcopy(self.target).to(self.deployment.place, dtype).eval()

            def by_torch(inputs: Tensor) -> Tensor:
                with torch.inference_mode():
                    logits: Tensor = network(inputs.to(self.deployment.place, dtype))
                    return logits.float().cpu().clone()

            return by_torch
        session = onnx_session(self.target, threads=self.deployment.threads)
        (name,) = (value.name for value in session.get_inputs())
        return lambda inputs: torch.from_numpy(session.run(None, {name: inputs.float().contiguous().numpy()})[0])

    def layer_times(self, example: Tensor) -> list[LayerTime]:
        """Return where the file spends its time; empty for a module, which has no file."""
        if isinstance(self.target, nn.Module):
            return []
        return layer_times(self.target, example, layers=self.layers, threads=self.deployment.threads)
