"""Latency: what is reported, what is restored, and the rule for claims. Times are the test's own or not looked at."""

import json
import sys

import pytest
import torch
from torch import nn

from archsmith.core.errors import MissingExtra, UserError
from archsmith.cost import Latency, Provenance, claim, count, measure_latency, measure_many
from archsmith.cost.reference import reference_inputs, reference_network

PROVENANCE = Provenance(
    backend="torch",
    device="cpu",
    threads=1,
    precision="fp32",
    input_shapes=((4, 3, 8, 8), (4,)),
    reference="reference-1",
    warmup=10,
    block_ms=5.0,
    torch="2",
    onnxruntime=None,
    python="3",
    cpu="cpu",
    cpu_capability="AVX2",
    cores=2,
    load_average=(0.1, 0.2, 0.3),
)


def latency_of(*samples, reference=1.0):
    return Latency(samples, (reference,) * len(samples), 3, PROVENANCE)


STEADY = latency_of(*[4.0, 4.1, 4.2, 4.0, 4.1, 4.2, 4.0, 4.1, 4.2, 4.1])


def test_figures_derive_from_the_samples():
    latency = latency_of(*range(1, 11), reference=2.0)
    assert latency.median_ms == 5.5
    assert latency.iqr_ms == 4.5
    assert latency.interval_ms == (2, 9)
    assert latency.ratio == 2.75
    assert latency.throughput_per_s == pytest.approx(4 / 0.0055)
    assert latency.noisy and not STEADY.noisy


def test_noise_begins_above_a_tenth_of_the_median():
    # Quartiles of these 11 samples are 10 - d/2 and 10 + d/2.
    def spread(d):
        return latency_of(*[10 - d / 2] * 4, 10, 10, 10, *[10 + d / 2] * 4)

    assert not spread(1.0).noisy
    assert spread(1.01).noisy
    assert latency_of(*[0.0] * 10).noisy


def test_ratio_is_taken_round_by_round():
    # A machine that slows down by half doubles both: the ratio does not move.
    slowing = Latency((2.0,) * 5 + (4.0,) * 5, (1.0,) * 5 + (2.0,) * 5, 1, PROVENANCE)
    assert slowing.ratio == 2.0


def test_claims():
    assert claim(STEADY, 5.0) == "holds"
    assert STEADY.interval_ms == (4.0, 4.2)
    assert claim(STEADY, 4.05) == "holds"  # the median is above, the interval is not
    assert claim(STEADY, 4.0) == "holds"
    assert claim(STEADY, 3.99) == "violated"
    noisy = latency_of(*range(1, 11))
    assert claim(noisy, 0.5) == claim(noisy, 100.0) == "not verifiable now"
    with pytest.raises(UserError, match=r"limit_ms: got 0; allowed: a positive number"):
        claim(STEADY, 0)


def test_json_round_trip_is_exact():
    text = json.dumps(STEADY.to_dict())
    assert Latency.from_dict(json.loads(text)) == STEADY
    assert json.loads(text)["median_ms"] == STEADY.median_ms
    with pytest.raises(UserError, match=r"latency: got 2; allowed: format_version 1"):
        Latency.from_dict(STEADY.to_dict() | {"format_version": 2})
    with pytest.raises(UserError, match=r"a record with 'repeats'"):
        Latency.from_dict({k: v for k, v in STEADY.to_dict().items() if k != "repeats"})
    broken = STEADY.to_dict()
    broken["provenance"]["colour"] = "red"
    with pytest.raises(UserError, match=r"colour"):
        Latency.from_dict(broken)


class Spy(nn.Module):
    """Notes who was called and in which state (in the class: copies note there too); each call costs fake time."""

    now, log = 0.0, []

    def __init__(self, name, seconds=0.005):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.norm = nn.BatchNorm1d(2)
        self.name, self.seconds = name, seconds

    def forward(self, x):
        state = (self.training, torch.is_inference_mode_enabled(), torch.get_num_threads(), x.dtype, self.weight.dtype)
        Spy.log.append((self.name, state))
        Spy.now += self.seconds
        return self.norm(x * self.weight)


def spies(*names, **options):
    Spy.now, Spy.log = 0.0, []
    targets = {name: Spy(name, seconds=0.005 * (i + 1)) for i, name in enumerate(names)}
    reference = Spy("reference")
    x = torch.zeros(4, 2)
    result = measure_many(targets, x, reference=(reference, x), clock=lambda: Spy.now, warmup=1, **options)
    return targets, Spy.log, result


def test_rounds_interleave_the_reference_and_every_target():
    targets, log, result = spies("a", "b")
    order = [name for name, _ in log]
    assert order[-30:] == ["reference", "a", "b"] * 10
    assert [result[name].median_ms for name in targets] == pytest.approx([5.0, 10.0])
    assert [result[name].ratio for name in targets] == pytest.approx([1.0, 2.0])
    assert result["b"].provenance.reference == "given" and result["b"].provenance.input_shapes == ((4, 2),)


def test_networks_run_in_evaluation_mode_without_gradients_on_pinned_threads():
    before = torch.get_num_threads()
    other = 2 if before == 1 else 1
    targets, log, _ = spies("a", threads=other)
    assert {state for _, state in log} == {(False, True, other, torch.float32, torch.float32)}
    assert torch.get_num_threads() == before
    assert targets["a"].training and targets["a"].norm.training
    assert targets["a"].norm.num_batches_tracked == 0


def test_bf16_runs_on_a_copy():
    targets, log, result = spies("a", precision="bf16")
    assert {state[3:] for _, state in log} == {(torch.bfloat16, torch.bfloat16)}
    assert targets["a"].weight.dtype == torch.float32
    assert result["a"].provenance.precision == "bf16"


def test_everything_is_restored_after_a_failure():
    class Fails(nn.Module):
        def forward(self, x):
            raise RuntimeError("broken")

    net, before = Fails(), torch.get_num_threads()
    with pytest.raises(RuntimeError, match="broken"):
        measure_latency(net, torch.zeros(1), threads=before + 1)
    assert torch.get_num_threads() == before and net.training


def test_a_real_measurement_carries_its_provenance():
    latency = measure_latency(nn.Linear(4, 4), torch.zeros(2, 4), block_ms=0.1, warmup=1)
    where = latency.provenance
    assert len(latency.samples_ms) == len(latency.reference_ms) == 10 and min(latency.samples_ms) > 0
    assert (where.backend, where.device, where.threads, where.precision) == ("torch", "cpu", 1, "fp32")
    assert where.reference == "reference-1" and where.torch == torch.__version__ and where.onnxruntime is None
    assert where.cpu and where.cpu_capability and where.cores >= 1 and len(where.load_average) in (0, 3)
    assert Latency.from_dict(json.loads(json.dumps(latency.to_dict()))) == latency


def test_more_of_the_same_work_takes_longer():
    def net(depth):
        return nn.Sequential(*[nn.Linear(256, 256) for _ in range(depth)])

    measured = measure_many({"1x": net(4), "8x": net(32)}, torch.zeros(32, 256), block_ms=1.0)
    # Eight times the work in the same interleaved rounds: only the order is asserted, and of the least disturbed round.
    assert min(measured["8x"].samples_ms) > min(measured["1x"].samples_ms)


def test_reference_network_is_fixed():
    net = reference_network()
    assert count(net, reference_inputs()).macs == 5_522_688
    assert not net.training
    again = reference_network()(reference_inputs())
    assert torch.equal(net(reference_inputs()), again)
    assert again.abs().max() > 1e-3 and torch.isfinite(again).all()


@pytest.mark.parametrize(
    ("target", "options", "text"),
    [
        (nn.Identity(), {"backend": "tvm"}, r"backend: got 'tvm'; allowed: torch or onnxruntime"),
        (nn.Identity(), {"precision": "int3"}, r"precision: got 'int3'; allowed: fp32 or bf16"),
        (nn.Identity(), {"device": "meta"}, r"device: got 'meta'; allowed: cpu, or cuda"),
        (nn.Identity(), {"device": "toaster"}, r"device: got 'toaster'; allowed: cpu, or cuda"),
        (nn.Identity(), {"threads": 0}, r"threads: got 0; allowed: at least 1"),
        (nn.Identity(), {"rounds": 3}, r"rounds: got 3; allowed: at least 10"),
        (nn.Identity(), {"backend": "onnxruntime"}, r"target 'target': got a Identity for backend onnxruntime"),
        ("net.onnx", {}, r"target 'target': got a str for backend torch; allowed: an nn.Module"),
        ("net.onnx", {"backend": "onnxruntime", "precision": "bf16"}, r"onnxruntime with bf16 on cpu; allowed: fp32"),
        (nn.Linear(1, 1, device="meta"), {}, r"target: got a network on the meta device"),
    ],
)
def test_bad_options(target, options, text):
    with pytest.raises(UserError, match=text):
        measure_latency(target, torch.zeros(1, 1), **options)


def test_no_targets():
    with pytest.raises(UserError, match=r"targets: got \{\}; allowed: at least one network"):
        measure_many({}, torch.zeros(1))


def test_missing_onnxruntime_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingExtra, match=r"'onnxruntime'.*archsmith\[onnx\]"):
        measure_latency(b"", torch.zeros(1), backend="onnxruntime", reference=(b"", torch.zeros(1)))
