"""Networks made ready for a device and a precision: what runs, how it is refused, what it computes."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from archsmith.core.errors import UserError
from archsmith.cost import PRECISIONS, Deployed, Deployment
from archsmith.cost.onnx_layers import onnx_precision


class Net(nn.Module):
    """Two convolutions and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 8, 3)
        self.classifier = nn.Linear(8, 5)

    def forward(self, x):
        return self.classifier(self.second(self.first(x).relu()).relu().mean((2, 3)))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"device": "tpu"}, r"latency device: got 'tpu'; allowed: cpu, onnxruntime, cuda"),
        ({"precision": "int4"}, r"latency precision: got 'int4'; allowed: fp32, bf16, int8-dynamic, int8-static"),
        ({"precision": "int8-static"}, r"got int8-static on cpu; allowed: fp32, bf16 on cpu.*runs on onnxruntime"),
        ({"device": "onnxruntime", "precision": "bf16"}, r"allowed: fp32, int8-dynamic, int8-static on onnxruntime"),
        ({"threads": 0}, r"latency threads: got 0; allowed: an integer from 1"),
        ({"threads": True}, r"latency threads: got True"),
    ],
)
def test_what_no_device_can_do_is_refused(given, text):
    with pytest.raises(UserError, match=text):
        Deployment(**given)


def test_what_is_not_here_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="torch finds no CUDA device here; allowed: cpu, or onnxruntime"):
        Deployment("cuda").check()
    with pytest.raises(UserError, match=r"latency threads: got 4096; allowed: 1 to \d+, the cores"):
        Deployment(threads=4096).check()
    Deployment().check()


def test_it_is_written_and_read_again():
    for device, precisions in PRECISIONS.items():
        for precision in precisions:
            deployment = Deployment(device, precision, 2)
            assert Deployment(**deployment.to_json()) == deployment
            assert precision in str(deployment)
    assert str(Deployment()) == "torch on the CPU, fp32, 1 thread"


def test_what_runs_is_the_module_or_its_file(network, images):
    plain = Deployment().ready(network, images)
    assert plain.target is network and plain.layers == () and plain.layer_times(images[:1]) == []
    file = Deployment("onnxruntime").ready(network, images)
    assert isinstance(file.target, bytes) and [name for name, _ in file.layers] == ["first", "second", "classifier"]
    with torch.no_grad():
        wanted = network(images)
    assert torch.equal(plain.forward()(images), wanted)
    assert torch.allclose(file.forward()(images), wanted, atol=1e-5)
    assert not torch.equal(Deployment(precision="bf16").ready(network, images).forward()(images), wanted)
    assert next(network.parameters()).dtype == torch.float32  # a copy was converted


@pytest.mark.parametrize("precision", ["int8-dynamic", "int8-static"])
def test_int8_is_really_int8_and_near_the_network(network, images, precision):
    ready = Deployment("onnxruntime", precision).ready(network, images)
    assert isinstance(ready.target, bytes) and "int8" in onnx_precision(ready.target) and "int8" in ready.note
    with torch.no_grad():
        wanted = network(images)
    found = ready.forward()(images)
    error = float((found - wanted).norm() / wanted.norm())
    assert 0 < error < 0.1
    rows = ready.layer_times(images[:1])
    assert {"first", "second", "classifier"} <= {row.layer for row in rows}
    assert any(row.integer for row in rows)


def test_static_ranges_come_of_the_calibration_examples(network, images):
    """Ranges of tiny inputs clip real ones."""
    deployment = Deployment("onnxruntime", "int8-static")
    good, bad = (deployment.ready(network, each).forward()(images) for each in (images, images * 1e-3))
    with torch.no_grad():
        wanted = network(images)
    assert (good - wanted).norm() < 0.2 * (bad - wanted).norm()


@pytest.mark.parametrize(("device", "precision"), [("cpu", "bf16"), ("onnxruntime", "int8-static")])
def test_a_measurement_says_what_it_is_of(network, images, device, precision):
    latency = Deployment(device, precision).ready(network, images).measure(images[:1], block_ms=0.5)
    where = latency.provenance
    assert len(latency.samples_ms) == 10 and where.device == "cpu" and where.threads == 1
    assert where.backend == ("torch" if device == "cpu" else "onnxruntime")
    assert (precision[:4] in where.precision) and (where.onnxruntime is not None) == (device == "onnxruntime")
    assert len(os.sched_getaffinity(0)) == where.cores


def test_a_file_stands_for_the_network(network, images):
    file = Deployment("onnxruntime").ready(network, images)
    assert isinstance(file.target, bytes)
    again = Deployment("onnxruntime", "int8-static").of_file(file.target, images)
    assert again == Deployed(again.deployment, again.target, file.layers, again.note)
    assert again.target == Deployment("onnxruntime", "int8-static").ready(network, images).target
