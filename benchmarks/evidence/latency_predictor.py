"""Latency predicted from networks that were measured, and from parts that were: a small mobile family on this machine.

150 networks of the family "mobile-chain" ("small" skeleton, 32x32 images; corners first, then random ones) are measured
in ONNX Runtime, batch 1, one thread; 100 teach a predictor, which then predicts 50 that it never saw. Those 50 are
measured a second time, in another order: what a measurement itself repeats to is printed beside the error. Predictors
pass with a median error of at most max(10 %, 1.5 x repeat error). The same networks fit a look-up table of blocks
measured one by one, and the table predicts the 50 as well.

A network's latency is the fastest of 45 rounds in three passes over all networks, each in another order, as everywhere
in look-up tables: other work on the machine only adds time. With ``--median`` it is the median over the rounds of the
ratio to a reference network in the same round, times the median of the reference: what to take on a quiet machine.

Run: ``python benchmarks/evidence/latency_predictor.py [--precision fp32] [--networks 150] [--median]``
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from archsmith.cost import (
    InterpolatedRow,
    activation_ranges,
    export_onnx,
    fit_whole_networks,
    measure_many,
    measure_table,
    onnx_layers,
    quantise_onnx,
)
from archsmith.cost.measured_table import Parts
from archsmith.families.mobile_chain import ChainFamily, chain_family
from archsmith.layers.mobile_chain import inverted_residual
from archsmith.predictors.latency import LatencyPredictor, next_networks
from archsmith.space import Architecture, LayerPolicy

IMAGE = (3, 32, 32)
TOGETHER = 10
PASSES = 3
ROUNDS = 15
UNSEEN = 50


def onnx_content(family: ChainFamily, architecture: Architecture, precision: str) -> bytes:
    """Return the file of a network: fp32, or all layers in static int8, per channel."""
    network = family.build(architecture, seed=0).eval()
    model = export_onnx(network, torch.zeros(2, *IMAGE))
    if precision == "fp32":
        return bytes(model.SerializeToString())
    images = torch.randn(8, *IMAGE, generator=torch.Generator().manual_seed(0))
    policy = {layer.name: LayerPolicy("int8") for layer in onnx_layers(model)}
    return quantise_onnx(model, policy, activation_ranges(model, [images])).content


def measure(files: list[bytes], rng: np.random.Generator, *, median: bool) -> tuple[np.ndarray, float, dict[str, Any]]:
    """Return latencies in ms in the order of ``files``, the reference's, and the protocol."""
    ratios: list[list[float]] = [[] for _ in files]
    samples: list[list[float]] = [[] for _ in files]
    references, where = [], {}
    for _ in range(PASSES):
        order = rng.permutation(len(files))
        for at in range(0, len(order), TOGETHER):
            found = measure_many(
                {str(number): files[number] for number in order[at : at + TOGETHER]},
                torch.zeros(1, *IMAGE),
                backend="onnxruntime",
                rounds=ROUNDS,
                block_ms=2.0,
            )
            for name, latency in found.items():
                pairs = zip(latency.samples_ms, latency.reference_ms, strict=True)
                ratios[int(name)] += [sample / reference for sample, reference in pairs]
                samples[int(name)] += latency.samples_ms
                references += latency.reference_ms
                where = latency.to_dict()["provenance"]
    if median:
        reference = statistics.median(references)
        return np.array([statistics.median(each) * reference for each in ratios]), reference, where
    return np.array([min(each) for each in samples]), min(references), where


def median_error(predicted: np.ndarray, true: np.ndarray) -> float:
    """Return the median relative error."""
    return float(np.median(np.abs(predicted - true) / true))


def study(precision: str, networks: int, out: dict[str, Any], *, median: bool) -> None:
    """Measure, learn, predict; print rows and keep the numbers."""
    family = chain_family("small", image=IMAGE, num_classes=10)
    rng = np.random.default_rng(0)
    drawn = next_networks(family.space, networks, rng)
    start = time.perf_counter()
    files = [onnx_content(family, each, precision) for each in drawn]
    exported = time.perf_counter() - start
    unseen = np.sort(rng.choice(np.arange(3, networks), UNSEEN, replace=False))
    seen = np.setdiff1d(np.arange(networks), unseen)
    times, reference, where = measure(files, rng, median=median)
    again, reference_again, _ = measure([files[number] for number in unseen], rng, median=median)
    repeat = median_error(again, times[unseen])
    limit = max(0.10, 1.5 * repeat)
    print(
        f"\n{precision}: {networks} networks, {times.min():.3f} to {times.max():.3f} ms, exported in {exported:.0f} s"
    )
    print(f"reference network {reference:.4f} ms, in the second session {reference_again:.4f} ms")
    print("| predictor | median error, left out in turn | median error, 50 unseen | largest | repeat error | passes |")
    print("|---|---|---|---|---|---|")
    rows: dict[str, Any] = {}
    for model in ("ridge", "svr", "boosting", "auto"):
        predictor = LatencyPredictor(family.space, model=model, provenance=where)
        predictor.fit([drawn[number] for number in seen], [float(times[number]) for number in seen])
        predicted = predictor.predict([drawn[number] for number in unseen]).mean
        error = median_error(predicted, times[unseen])
        largest = float((np.abs(predicted - times[unseen]) / times[unseen]).max())
        assert predictor.chosen is not None
        rows[model] = {"left_out": predictor.errors[predictor.chosen], "unseen": error, "largest": largest}
        scale = "log ms" if predictor.logarithmic else "ms"
        name = f"{model} ({predictor.chosen}, {scale})" if model == "auto" else f"{model} ({scale})"
        cells = f"{rows[model]['left_out']:.1%} | {error:.1%} | {largest:.1%} | {repeat:.1%} | {error <= limit}"
        print(f"| {name} | {cells} |")
    macs = np.array([[family.exact_costs(each)["macs"]] for each in drawn], dtype=np.float64)
    line = np.polyfit(macs[seen, 0], times[seen], 1)
    error = median_error(np.polyval(line, macs[unseen, 0]), times[unseen])
    print(f"| a line through MACs | | {error:.1%} | | {repeat:.1%} | {error <= limit} |")
    rows["times_ms"] = [round(float(each), 5) for each in times]
    out[precision] = {"repeat": repeat, "limit": limit, "predictors": rows, "macs_line": error, "provenance": where}
    if precision == "fp32":
        table = measure_table(family.measurable(), backend="onnxruntime")
        keys = [family.keys(each) for each in drawn]
        fitted, report = fit_whole_networks(table, [keys[n] for n in seen], [float(times[n]) for n in seen])
        error = median_error(np.array([fitted.cost(keys[n]) for n in unseen]), times[unseen])
        print(f"| table of {len(table)} parts, fitted | {report.median_error:.1%} | {error:.1%} | | {repeat:.1%} "
              f"| {error <= limit} |")  # fmt: skip
        print(f"table: {json.dumps(report.to_json())}")
        out[precision]["table"] = {**report.to_json(), "unseen": error}
    print(f"measured on: {json.dumps(where)}")


def widths() -> None:
    """Measure one kind of block at many widths and print what is lost by reading inner widths from their neighbours."""
    sizes = range(8, 137, 8)
    blocks: Parts = {
        str(size): (inverted_residual(size, size, 1, 3, 3, "relu6", 1e-3, 0.1), (1, size, 16, 16)) for size in sizes
    }
    table = measure_table(blocks, backend="onnxruntime", rounds=45)
    row = InterpolatedRow({size: table.row(str(size)) for size in sizes})
    shown = ", ".join(f"{size} {row.at(size).mean:.4f}" for size in sizes)
    errors = ", ".join(f"{size} {error:.0%}" for size, error in zip(list(sizes)[1:-1], row.errors, strict=True))
    print(f"block of kernel 3, expansion 3 at 16x16, ms by width: {shown}")
    print(f"read from both neighbours (16 apart): median error {row.median_error:.1%}, largest {max(row.errors):.1%}")
    print(f"by width: {errors}")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--precision", nargs="+", default=["fp32", "int8"], choices=["fp32", "int8"])
    parser.add_argument("--networks", type=int, default=150)
    parser.add_argument("--median", action="store_true")
    parser.add_argument("--widths", action="store_true", help="Only the interpolation between widths.")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.widths:
        widths()
        return
    out: dict[str, Any] = {}
    for precision in arguments.precision:
        study(precision, arguments.networks, out, median=arguments.median)
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(out, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
