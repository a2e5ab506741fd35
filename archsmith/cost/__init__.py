"""What a network costs: counted exactly, or measured with its spread and its provenance.

- Counted: ``count`` (MACs, parameters), ``count_onnx`` (the same of an ONNX file), ``peak_activation_bytes``,
  ``weight_bytes``
- Measured: ``measure_latency``, ``measure_many`` (interleaved), and ``claim`` (does a latency keep a limit?)
- Looked up: ``LookupTable``, the sum of measured operators (``read_lookup_table``, or measured here: ``measure_table``)
- Counted and measured, per layer: ``profile``
- As typed by a user: ``load_target``, ``parse_shapes``, ``example_inputs``
"""

from archsmith.cost.backends import Backend, Precision, Target
from archsmith.cost.counts import Convention, Counts, LayerCount, count
from archsmith.cost.latency import Latency, Provenance, Verdict, claim, measure_latency, measure_many
from archsmith.cost.lookup import LookupTable, Row, read_lookup_table
from archsmith.cost.measured_table import measure_table
from archsmith.cost.memory import peak_activation_bytes, weight_bytes
from archsmith.cost.onnx_counts import count_onnx
from archsmith.cost.profile import TABLE_COLUMNS, LayerProfile, Profile, profile
from archsmith.cost.reference import reference_inputs, reference_network
from archsmith.cost.targets import example_inputs, load_target, parse_shapes

__all__ = [
    "TABLE_COLUMNS",
    "Backend",
    "Convention",
    "Counts",
    "Latency",
    "LayerCount",
    "LayerProfile",
    "LookupTable",
    "Precision",
    "Profile",
    "Provenance",
    "Row",
    "Target",
    "Verdict",
    "claim",
    "count",
    "count_onnx",
    "example_inputs",
    "load_target",
    "measure_latency",
    "measure_many",
    "measure_table",
    "parse_shapes",
    "peak_activation_bytes",
    "profile",
    "read_lookup_table",
    "reference_inputs",
    "reference_network",
    "weight_bytes",
]
