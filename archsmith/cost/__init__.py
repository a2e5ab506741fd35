"""What a network costs: counted exactly, or measured with its spread and its provenance.

- Counted: ``count`` (MACs, parameters), ``count_onnx`` (the same of an ONNX file), ``peak_activation_bytes``,
  ``weight_bytes``
- Measured: ``measure_latency``, ``measure_many`` (interleaved), and ``claim`` (does a latency keep a limit?)
- Quantised: ``export_onnx``, ``activation_ranges``, then ``quantise_onnx`` by a policy per layer (or
  ``quantise_onnx_dynamically``); ``simulated`` does the same to a module, for accuracy alone
- Also measured: ``measured_peak`` and ``resident_peak`` (memory), ``measure_energy`` (or ``NotAvailable``)
- Looked up: ``LookupTable``, the sum of measured operators (``read_lookup_table``, or here: ``measure_table``);
  ``fit_whole_networks`` says how well they add up, ``InterpolatedRow`` what lies between measured widths
- Counted and measured, per layer: ``profile``; ``layer_times`` sums up the kernels of an ONNX file, conversions apart
- Asked for by a user: a ``Deployment`` (device, precision, threads), which makes a network ready and measures it
- As typed by a user: ``load_target``, ``parse_shapes``, ``example_inputs``
"""

from archsmith.cost.additivity import Additivity, fit_whole_networks
from archsmith.cost.backends import Backend, Precision, Target
from archsmith.cost.counts import Convention, Counts, LayerCount, count
from archsmith.cost.deployment import PRECISIONS, Deployed, Deployment
from archsmith.cost.energy import Energy, NotAvailable, measure_energy
from archsmith.cost.interpolation import InterpolatedRow
from archsmith.cost.latency import Latency, Provenance, Verdict, claim, measure_latency, measure_many
from archsmith.cost.layer_times import LayerTime, layer_times
from archsmith.cost.lookup import LookupTable, Row, read_lookup_table
from archsmith.cost.measured_memory import PeakMemory, measured_peak, resident_peak
from archsmith.cost.measured_table import measure_table
from archsmith.cost.memory import peak_activation_bytes, weight_bytes
from archsmith.cost.onnx_counts import count_onnx
from archsmith.cost.onnx_export import export_onnx
from archsmith.cost.onnx_layers import OnnxLayer, onnx_layers, onnx_precision
from archsmith.cost.profile import TABLE_COLUMNS, LayerProfile, Profile, profile
from archsmith.cost.quantise_onnx import QuantisedFile, quantise_onnx, quantise_onnx_dynamically
from archsmith.cost.quantise_torch import layer_elements, quantisable_layers, simulated
from archsmith.cost.ranges import CalibrationMethod, Ranges, activation_ranges
from archsmith.cost.reference import reference_inputs, reference_network
from archsmith.cost.targets import example_inputs, load_target, parse_shapes

__all__ = [
    "PRECISIONS",
    "TABLE_COLUMNS",
    "Additivity",
    "Backend",
    "CalibrationMethod",
    "Convention",
    "Counts",
    "Deployed",
    "Deployment",
    "Energy",
    "InterpolatedRow",
    "Latency",
    "LayerCount",
    "LayerProfile",
    "LayerTime",
    "LookupTable",
    "NotAvailable",
    "OnnxLayer",
    "PeakMemory",
    "Precision",
    "Profile",
    "Provenance",
    "QuantisedFile",
    "Ranges",
    "Row",
    "Target",
    "Verdict",
    "activation_ranges",
    "claim",
    "count",
    "count_onnx",
    "example_inputs",
    "export_onnx",
    "fit_whole_networks",
    "layer_elements",
    "layer_times",
    "load_target",
    "measure_energy",
    "measure_latency",
    "measure_many",
    "measure_table",
    "measured_peak",
    "onnx_layers",
    "onnx_precision",
    "parse_shapes",
    "peak_activation_bytes",
    "profile",
    "quantisable_layers",
    "quantise_onnx",
    "quantise_onnx_dynamically",
    "read_lookup_table",
    "reference_inputs",
    "reference_network",
    "resident_peak",
    "simulated",
    "weight_bytes",
]
