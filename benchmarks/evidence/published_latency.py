"""The published networks on this machine: latency in eager torch and ONNX Runtime, beside MobileNetV2 of equal MACs.

Fresh weights (latency does not depend on them), batch 1, one thread, float32, 224x224. All networks of a backend are
measured in interleaved rounds with a fixed reference network; the spread is IQR over median.

Run: ``python benchmarks/evidence/published_latency.py``
"""

from __future__ import annotations

import torch
from torch import nn

from archsmith.cost import count, measure_many
from archsmith.families.mobile import mobile_family, published_network
from archsmith.run.onnx_file import onnx_bytes


def main() -> None:
    """Measure and print the table."""
    image = torch.zeros(1, 3, 224, 224)
    networks: dict[str, nn.Module] = {
        f"AtomNAS-{name}": published_network(f"AtomNAS-{name}", seed=0) for name in ("A", "B", "C", "A+", "B+", "C+")
    }
    family = mobile_family("mobilenetv2", image=(3, 224, 224), num_classes=1000)
    networks["MobileNetV2"] = family.build(family.largest(), seed=0)
    for network in networks.values():
        network.eval()
    torch_ms = measure_many(networks, image)
    models = {name: onnx_bytes(network, torch.zeros(2, 3, 224, 224), {}) for name, network in networks.items()}
    onnx_ms = measure_many(models, image, backend="onnxruntime")
    print("| network | MACs | parameters | torch, ms | spread | ONNX Runtime, ms | spread |")
    print("|---|---|---|---|---|---|---|")
    for name, network in networks.items():
        counts = count(network, image)
        cells = [f"{counts.macs / 1e6:.0f}M", f"{counts.params / 1e6:.2f}M"]
        for latency in (torch_ms[name], onnx_ms[name]):
            cells += [f"{latency.median_ms:.2f}", f"{latency.iqr_ms / latency.median_ms:.2f}"]
        print(f"| {name} | {' | '.join(cells)} |")
    where = torch_ms["MobileNetV2"].provenance
    print(f"\n{where}")


if __name__ == "__main__":
    main()
