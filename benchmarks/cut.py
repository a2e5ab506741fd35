"""What one cut of half the width costs, after finding, and what finding costs: beside torch-pruning.

Networks of known shapes with random weights: ResNet-50 (25.6 M parameters), BERT-base (109 M), and a decoder with the
widths of a Llama of one billion parameters (hidden 2048, grouped queries, ``--layers`` of its 22 layers). Half of every
width goes (residual streams, inner widths, whole heads). Timed are

- *find*: ours ``find``, and ``check``: the first ``plan`` with the replay and the comparison of numbers with the masked
  original, forward and backward in float64; theirs the pruner with its dependency graph, unchecked;
- *cut*: ours from chosen units to the cut network (``plan_cut`` and ``apply_``); theirs ``pruner.step()`` with random
  importance, which groups, chooses and cuts.

In processor seconds, both tools in turns in one process; medians with quartiles (finding and checking: of three), the
ratio is of the medians. Both cut networks are run.

Run: ``python benchmarks/cut.py [--models resnet-50 bert-base llama-1b] [--layers 4] [--rounds 5] [--threads 1]``
(needs transformers; torch-pruning, for the comparison only: ``pip install torch-pruning``)
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from _rounds import machine
from torch import Tensor, nn

from archsmith.atoms.finding import FoundAtoms, find
from archsmith.atoms.plan import plan_cut
from archsmith.atoms.transaction import apply_


def resnet_50(layers: int) -> tuple[nn.Module, Tensor]:
    from transformers import ResNetConfig, ResNetForImageClassification

    return ResNetForImageClassification(ResNetConfig(num_labels=1000)), torch.randn(1, 3, 64, 64)


def bert_base(layers: int) -> tuple[nn.Module, Tensor]:
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(BertConfig()), torch.randint(0, 1000, (1, 16))


def llama_1b(layers: int) -> tuple[nn.Module, Tensor]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=layers,
        num_attention_heads=32,
        num_key_value_heads=4,
        vocab_size=32000,
        use_cache=False,
    )
    return LlamaForCausalLM(config), torch.randint(0, 1000, (1, 16))


MODELS: dict[str, Callable[[int], tuple[nn.Module, Tensor]]] = {
    "resnet-50": resnet_50,
    "bert-base": bert_base,
    "llama-1b": llama_1b,
}


def halves(atoms: FoundAtoms, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Choose half of the units of every width; heads go whole, their own width stays."""
    removed = {}
    for group in atoms.groups:
        if group.name.endswith(".columns") or group.frozen or group.balance or group.size < 2:
            continue
        removed[group.name] = np.sort(rng.choice(group.size, group.size // 2, replace=False))
    return removed


def params(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    gc.collect()
    start = time.process_time()
    result = run()
    return time.process_time() - start, result


def ours(model: nn.Module, x: Tensor) -> Callable[[bool], dict[str, Any]]:
    """Return what times one round: finding and checking where they are wanted, and cutting."""
    rng = np.random.default_rng(0)
    known: list[Any] = []

    def round_(checks: bool) -> dict[str, Any]:
        times: dict[str, Any] = {}
        if checks:
            times["find"], atoms = timed(lambda: find(model, x))
            times["check"], cut = timed(lambda: atoms.plan(halves(atoms, rng)))
            known[:] = [atoms.groups, cut.attributes, atoms]
        groups, attributes, atoms = known
        twin, removed = copy.deepcopy(model), halves(atoms, rng)
        times["cut"], _ = timed(lambda: apply_(twin, plan_cut(groups, removed, twin, attributes)))
        with torch.no_grad():
            twin(x)
        return times | {"params": params(twin)}

    return round_


def theirs(name: str, model: nn.Module, x: Tensor) -> dict[str, Any]:
    """Time the construction of the pruner and one step."""
    twin = copy.deepcopy(model)
    building, pruner = timed(lambda: _pruner(name, twin, x))
    cutting, _ = timed(pruner.step)
    left = params(twin)
    _fix_heads(name, twin)
    runs = "runs"
    try:
        with torch.no_grad():
            twin(x)
    except Exception as error:
        runs = f"does not run afterwards ({type(error).__name__}: {str(error).splitlines()[0][:80]})"
    return {"find": building, "cut": cutting, "params": left, "runs": runs}


def _pruner(name: str, model: nn.Module, x: Tensor) -> Any:
    """Build torch-pruning's pruner with the settings of its own examples for each kind of network."""
    import torch_pruning

    settings: dict[str, Any] = {
        "importance": torch_pruning.importance.RandomImportance(),
        "pruning_ratio": 0.5,
        "output_transform": lambda out: out.logits.sum(),
    }
    heads: dict[nn.Module, int] = {}
    for module in model.modules():
        kind = type(module).__name__
        if kind.startswith("Bert") and hasattr(module, "query"):
            heads.update(dict.fromkeys((module.query, module.key, module.value), 12))
        if kind == "LlamaAttention":
            heads.update({module.q_proj: 32, module.k_proj: 4, module.v_proj: 4})
    if heads:
        settings |= {
            "num_heads": heads,
            "prune_num_heads": True,
            "prune_head_dims": False,
            "head_pruning_ratio": 0.5,
        }
    last = {"resnet-50": "classifier.1", "bert-base": "classifier", "llama-1b": "lm_head"}[name]
    return torch_pruning.pruner.BasePruner(model, x, ignored_layers=[model.get_submodule(last)], **settings)


def _fix_heads(name: str, model: nn.Module) -> None:
    """Set the head counts by hand, as torch-pruning's examples do."""
    for module in model.modules():
        if type(module).__name__.startswith("Bert") and hasattr(module, "query"):
            module.num_attention_heads = module.query.out_features // module.attention_head_size
            module.all_head_size = module.query.out_features
        if type(module).__name__ == "LlamaAttention":
            module.num_key_value_groups = module.q_proj.out_features // module.k_proj.out_features


def main() -> None:
    """Print the times and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    try:
        import torch_pruning

        print(f"beside torch-pruning {torch_pruning.__version__}, {machine(arguments.threads, arguments.rounds)}")
    except ImportError:
        torch_pruning = None
        print(f"torch-pruning is not installed: ours alone, {machine(arguments.threads, arguments.rounds)}")
    for name in arguments.models:
        torch.manual_seed(0)
        model, x = MODELS[name](arguments.layers)
        model.eval()
        print(f"{name}: {params(model) / 1e6:.1f} M parameters", flush=True)
        round_ = ours(model, x)
        mine: list[dict[str, Any]] = []
        other: list[dict[str, Any]] = []
        peer = torch_pruning is not None
        for number in range(arguments.rounds):  # in turns: what the machine does meanwhile falls on both
            mine.append(round_(number < 3))
            if not peer:
                continue
            try:
                other.append(theirs(name, model, x))
            except Exception as error:
                print(f"  torch-pruning fails: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
                peer = False
        _show("archsmith", mine)
        if len(other) < arguments.rounds:
            continue
        _show("torch-pruning", other)
        print(f"  cut: {middle(other, 'cut') / middle(mine, 'cut'):.1f} times faster than torch-pruning")
        share = (middle(mine, "find") + middle(mine, "check")) / middle(other, "find")
        print(f"  finding with both checks: {share:.1f} times its building time", flush=True)


def middle(rounds: list[dict[str, Any]], key: str) -> float:
    return statistics.median(each[key] for each in rounds if key in each)


def _show(tool: str, rounds: list[dict[str, Any]]) -> None:
    parts = []
    for key in ("find", "check", "cut"):
        seconds = [each[key] for each in rounds if key in each]
        if seconds:
            low, high = np.quantile(seconds, [0.25, 0.75])
            parts.append(f"{key} {statistics.median(seconds):.3f} s ({low:.3f} to {high:.3f})")
    last = rounds[-1]
    print(f"  {tool}: {', '.join(parts)}; {last['params'] / 1e6:.1f} M left; {last.get('runs', 'runs')}", flush=True)


if __name__ == "__main__":
    main()
