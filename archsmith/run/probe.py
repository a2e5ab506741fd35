"""The fresh process: builds a network from its ``model.py`` and runs it, without archsmith.

Run by path (``python -I probe.py``), never imported for its effects. Standard input: one line of JSON with the paths
``weights``, ``inputs``, ``outputs`` and the number ``threads``, then the source text to the end. ``inputs`` is a
safetensors file of named input batches. ``outputs`` gets, under each name, the logits of the whole batch and, as
``name/single``, those of its examples one by one.
"""

from __future__ import annotations

import json
import sys
import types

import torch
from safetensors.torch import load_file, save_file

MODULE = "standalone_model"


def main() -> None:
    """Do what the module says; any failure ends the process with a traceback and a non-zero status."""
    request = json.loads(sys.stdin.readline())
    torch.set_num_threads(request["threads"])
    module = types.ModuleType(MODULE)
    sys.modules[MODULE] = module  # where classes look for their own module
    exec(compile(sys.stdin.read(), "model.py", "exec"), module.__dict__)
    network = module.build()
    network.load_state_dict(load_file(request["weights"]), strict=True)
    network.eval()
    outputs = {}
    with torch.no_grad():
        for name, inputs in load_file(request["inputs"]).items():
            outputs[name] = network(inputs).contiguous()
            outputs[f"{name}/single"] = torch.cat([network(example) for example in inputs.split(1)])
    loaded = sorted(name for name in sys.modules if name.partition(".")[0] == "archsmith")
    if loaded:
        raise RuntimeError(f"model.py is not standalone: it brought in {', '.join(loaded)}")
    save_file(outputs, request["outputs"])


if __name__ == "__main__":
    main()
