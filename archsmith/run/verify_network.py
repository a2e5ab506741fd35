"""The checks of one folder of a finished network, each a row; ``archsmith.run.verify`` says what they are for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from archsmith.core.errors import UserError
from archsmith.core.files import read_json, sha256_file
from archsmith.cost import Deployed, Deployment
from archsmith.run.checks import Failed, NotChecked, Report, Rows
from archsmith.run.claims import RECORDED, check_accuracy, check_cost, check_latency
from archsmith.run.constructor import Call, parse_call
from archsmith.run.costs import exact_costs
from archsmith.run.export import FILES, FORMAT_VERSION, largest_gap, network_digest
from archsmith.run.onnx_file import onnx_faults, onnx_metadata, onnx_texts, run_onnx
from archsmith.run.rebuild import (
    ONNX_TOLERANCE,
    SOURCE_TOLERANCE,
    execute_source,
    read_weights,
    rebuild_network,
    run_fresh,
)
from archsmith.run.source import source_of
from archsmith.space import Architecture, ProductSpace
from archsmith.tasks.base import Task

_TASK_EXAMPLES = 32
_METRIC = "_accuracy"

OnTestRead = Callable[[], object]


def verify_network(
    folder: str | Path,
    *,
    trust: bool = False,
    task: Task | None = None,
    expected: Mapping[str, Any] | None = None,
    limits: Mapping[str, float] | None = None,
    label: str = "network",
    on_test_read: OnTestRead | None = None,
) -> Report:
    """Check one folder of a finished network.

    Args:
        folder: Folder with ``architecture.json``, ``model.py``, ``weights.safetensors`` and so on.
        trust: Execute a ``model.py`` that is not the one archsmith writes.
        task: The task it was trained for: adds real images and the accuracy.
        expected: What is claimed about it, an outcome of ``result.json`` with ``files``, ``metrics`` and ``costs``;
            without it the files are only compared with each other.
        limits: Absolute limits by cost: ``macs``, ``params``, ``memory`` in bytes, ``latency`` in milliseconds,
            ``throughput`` per second.
        label: Subject of the rows.
        on_test_read: Called before the test split of ``task`` is read, once.

    Raises:
        UserError: There is no such folder.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError("folder", str(folder), allowed="the folder of a finished network")
    return _Verification(folder, trust, task, expected or {}, limits or {}, label, once(on_test_read)).report()


class _Verification:
    """The checks of one folder, in order; later ones use what earlier ones established."""

    def __init__(
        self,
        folder: Path,
        trust: bool,
        task: Task | None,
        expected: Mapping[str, Any],
        limits: Mapping[str, float],
        label: str,
        on_test_read: OnTestRead,
    ) -> None:
        self.folder = folder
        self.trust = trust
        self.task = task
        self.expected = expected
        self.deployed: Mapping[str, Any] = expected.get("deployed", {})
        self.limits = limits
        self.on_test_read = on_test_read
        self.rows = Rows(label)
        self.architecture: Mapping[str, Any] | None = None
        self.call: Call | None = None
        self.source: str | None = None  # set only when it may be executed
        self.network: nn.Module | None = None  # built from that source
        self.exact: Mapping[str, int] | None = None  # its costs, recounted
        self.probes: list[_Probe] = []

    def report(self) -> Report:
        """Run all checks."""
        check = self.rows.check
        if self.expected:
            for name in dict.fromkeys([*FILES, *self.expected.get("files", {})]):
                check(f"sha256 of {name}", partial(self._check_digest, name))
        check("architecture.json", self._check_architecture)
        check("weights.safetensors", self._check_weights)
        check("check.safetensors", self._check_examples)
        check("model.py", self._check_source)
        if self.task is not None:
            check("task images", self._check_task_images)
        check("fresh process", self._check_fresh)
        check("ONNX file", self._check_onnx_file)
        check("ONNX Runtime", self._check_onnx_outputs)
        costs = self.expected.get("costs", {})
        for cost, key in RECORDED.items():
            if key in costs or cost in self.limits:
                check(cost, partial(self._check_cost, cost))
        if self.deployed:
            check("as deployed", self._check_deployed)
        check("latency", self._check_latency)
        for name, value in self.expected.get("metrics", {}).items():
            if name.endswith(_METRIC):
                check(name, partial(self._check_accuracy, name.removesuffix(_METRIC), value))
        return self.rows.report()

    def _check_digest(self, name: str) -> str:
        recorded = self.expected.get("files", {}).get(name)
        if name not in FILES:
            raise Failed(f"result.json lists it, but a finished network has only {', '.join(FILES)}")
        path = self.folder / name
        if recorded is None:
            if name == "model.onnx" and not path.exists():
                raise NotChecked("the run did not write it, because the extra 'onnx' was not installed")
            raise Failed("result.json does not list it")
        if not path.is_file():
            raise Failed("the file is missing")
        if (found := sha256_file(path)) != recorded:
            raise Failed(f"the file has {found[:12]}..., result.json says {str(recorded)[:12]}...")
        return f"{found[:12]}..."

    def _check_architecture(self) -> str:
        content = read_json(self.folder / "architecture.json")
        version = content.get("format_version")
        if not isinstance(version, int) or not 1 <= version <= FORMAT_VERSION:
            raise Failed(f"format_version is {version!r}; this version of archsmith reads 1 to {FORMAT_VERSION}")
        call = parse_call(content.get("class"), content.get("arguments"))
        source_of(content)  # refuses what is missing or no literal
        self.architecture, self.call = content, call
        if content.get("space") and content.get("decisions") is not None:
            name = ProductSpace.from_json(content["space"]).name
            if Architecture(content["decisions"], space=name).digest != content.get("digest"):
                raise Failed("its digest is not that of its decisions")
        if (digest := network_digest(call)) != content.get("network_digest"):
            raise Failed(
                f"its network_digest is {str(content.get('network_digest'))[:12]}..., recomputed {digest[:12]}..."
            )
        return f"{call.path}, network digest {digest[:12]}..."

    def _check_weights(self) -> str:
        weights = read_weights(self.folder / "weights.safetensors")
        broken = [name for name, value in weights.items() if value.is_floating_point() and not value.isfinite().all()]
        if broken:
            raise Failed(f"NaN or infinite values in {', '.join(broken[:3])}")
        return f"{len(weights)} tensors, {sum(value.numel() for value in weights.values()):,} numbers"

    def _check_examples(self) -> str:
        stored = read_weights(self.folder / "check.safetensors")
        inputs, logits = stored.get("inputs"), stored.get("logits")
        if inputs is None or logits is None or len(inputs) < 2 or len(inputs) != len(logits):
            raise Failed("needs 'inputs' and 'logits' of the same number of examples, at least 2")
        self.probes.append(_Probe("check", "stored inputs", inputs, logits))
        return f"{len(inputs)} inputs of shape {tuple(inputs.shape[1:])} with the logits of the searched network"

    def _check_source(self) -> str:
        text = (self.folder / "model.py").read_bytes().decode("utf-8")
        own = source_of(self.architecture) if self.architecture is not None else None
        if text != own and not self.trust:
            where = (
                f"differs in line {_first_difference(text, own)} from" if own is not None else "cannot be compared with"
            )
            raise Failed(
                f"it {where} what archsmith writes for architecture.json, so nothing of it was executed; "
                "use --trust if you trust its author"
            )
        self.source = text
        self.network = execute_source(text, self.folder / "weights.safetensors")
        if text != own:
            raise NotChecked("it is not what archsmith writes for architecture.json; executed because you trust it")
        return "equals byte for byte what archsmith writes for architecture.json"

    def _check_task_images(self) -> str:
        assert self.task is not None
        facts = (self.architecture or {}).get("input", {})
        differing = [
            name
            for name, claimed, actual in (
                ("shape", facts.get("shape"), list(self.task.input_shape)),
                ("classes", facts.get("classes"), list(self.task.class_names)),
                ("normalisation", facts.get("normalisation"), {k: list(v) for k, v in self.task.normalisation.items()}),
            )
            if claimed != actual
        ]
        if differing:
            raise Failed(f"architecture.json and the task differ in {', '.join(differing)}")
        if self.call is None:
            raise NotChecked("architecture.json could not be read")
        split = "test" if "test" in self.task.splits else "valid"
        if split == "test":
            self.on_test_read()
        images = self.task.examples(min(_TASK_EXAMPLES, self.task.size(split)), split).contiguous()
        reference = rebuild_network(self.call, self.folder / "weights.safetensors")
        with torch.no_grad():
            self.probes.append(_Probe("task", f"{split} images", images, reference(images)))
        return f"{len(images)} {split} images; shape, classes and normalisation are the task's"

    def _check_fresh(self) -> str:
        if self.source is None:
            raise NotChecked("model.py was not executed")
        batches = self._batches()
        outputs = run_fresh(self.source, self.folder / "weights.safetensors", batches)
        return f"without archsmith: {self._compare('model.py', outputs, SOURCE_TOLERANCE)}"

    def _check_onnx_file(self) -> str:
        path = self._onnx()
        if faults := onnx_faults(path):
            raise Failed("; ".join(faults[:3]))
        if self.architecture is None:
            raise NotChecked("architecture.json could not be read")
        found = onnx_metadata(path)
        differing = [name for name, text in onnx_texts(self.architecture).items() if found.get(name) != text]
        if differing:
            raise Failed(f"its metadata and architecture.json differ in {', '.join(differing)}")
        return "one file, no traces of the machine, metadata as in architecture.json"

    def _check_onnx_outputs(self) -> str:
        path = self._onnx()
        return self._compare("model.onnx", run_onnx(path, self._batches()), ONNX_TOLERANCE)

    def _check_cost(self, cost: str) -> str:
        if self.exact is None:
            self.exact = exact_costs(self._rebuilt(), torch.ones(self._input().shape, dtype=self._input().dtype))
        return check_cost(cost, self.exact[cost], self.expected.get("costs", {}), self.limits)

    def _check_latency(self) -> str:
        claimed = self.expected.get("costs", {}).get("latency")
        onnx = self.folder / Path(self.deployed.get("file") or "model.onnx").name
        return check_latency(self._rebuilt(), onnx, self._input(), claimed, self.limits)

    def _check_deployed(self) -> str:
        """Compare the file that runs on the device, or the network in its precision, with what is recorded of it."""
        file, wanted = self.deployed.get("file"), self.deployed.get("metrics", {}).get("valid_accuracy")
        if file is not None:
            path = self.folder / Path(file).name
            if not path.is_file() or path.is_symlink():
                raise Failed(f"{file} is missing")
            if sha256_file(path) != self.deployed.get("sha256"):
                raise Failed(f"{file} is not the file that result.json records")
        text = f"{self.deployed.get('on')}: {file or 'the network itself'}"
        if wanted is None:
            return text
        if self.task is None or "valid" not in self.task.splits:
            raise NotChecked("the task's data are not at hand")
        terms = Deployment(**{name: self.deployed[name] for name in ("device", "precision", "threads")})
        if terms.device == "cuda" and not torch.cuda.is_available():
            raise NotChecked(f"{text}; there is no CUDA device here")
        target = self._rebuilt() if file is None else (self.folder / Path(file).name).read_bytes()
        found = float(self.task.evaluate(Deployed(terms, target).forward(), "valid")["accuracy"])
        if abs(found - wanted) > 1 / self.task.size("valid") + 1e-6:
            raise Failed(f"{text}: evaluated {found:.6f} on validation images, recorded {wanted:.6f}")
        return f"{text}, validation accuracy {found:.6f}, recorded {wanted:.6f}"

    def _check_accuracy(self, split: str, value: float) -> str:
        if self.task is None:
            raise NotChecked("the task's data are not at hand")
        if split not in self.task.splits:
            raise NotChecked(f"the task has no part '{split}'")
        network = self._rebuilt()
        if split == "test":
            self.on_test_read()
        return check_accuracy(network, self.task, split, value)

    def _rebuilt(self) -> nn.Module:
        if self.network is None:
            raise NotChecked("model.py was not executed" if self.source is None else "model.py could not be rebuilt")
        return self.network

    def _input(self) -> Tensor:
        if self.probes:
            return self.probes[0].inputs[:1]
        raise NotChecked("check.safetensors holds no inputs")

    def _onnx(self) -> Path:
        path = self.folder / "model.onnx"
        if not path.is_file():
            raise NotChecked("there is no model.onnx")
        return path

    def _batches(self) -> dict[str, Tensor]:
        if not self.probes:
            raise NotChecked("check.safetensors holds no inputs")
        return {probe.key: probe.inputs for probe in self.probes}

    def _compare(self, file: str, outputs: Mapping[str, Tensor], tolerance: float) -> str:
        """Compare the outputs on every probe, as a batch and one by one; return the gaps."""
        gaps = []
        for probe in self.probes:
            mine = {name: value for name, value in outputs.items() if name.split("/")[0] == probe.key}
            worst = largest_gap(f"{file} on the {probe.what}", mine, probe.logits, tolerance)
            gaps.append(f"{worst:.2g} on {len(probe.inputs)} {probe.what}")
        return f"largest gap {', '.join(gaps)}, batch 1 and all at once"


@dataclass(frozen=True)
class _Probe:
    """Inputs with the logits that every form of the network must give on them."""

    key: str
    what: str
    inputs: Tensor
    logits: Tensor


def once(hook: OnTestRead | None) -> OnTestRead:
    """Return a function that calls ``hook`` the first time and does nothing afterwards."""
    pending = [hook] if hook is not None else []

    def call() -> None:
        if pending:
            pending.pop()()

    return call


def _first_difference(text: str, own: str) -> int:
    """Return the number of the first line that differs."""
    lines, others = text.splitlines(keepends=True), own.splitlines(keepends=True)
    pairs = list(zip(lines, others, strict=False))
    return next((number for number, (a, b) in enumerate(pairs, start=1) if a != b), len(pairs) + 1)
